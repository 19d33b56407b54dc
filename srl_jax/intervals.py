"""How sure a mean is: bootstrap intervals, single, paired and by cluster."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Interval:
    """A mean and its bootstrap interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap_ci(
    values: Sequence[float], *, clusters: Sequence[str] | None = None, level: float = 0.95, seed: int = 0
) -> Interval:
    """Percentile bootstrap interval of the mean (Efron 1979), from 10,000 resamples.

    `clusters` (one label a value) resamples whole clusters instead of values, for values that are alike within one.
    """
    data = np.asarray(values, np.float64)
    if data.ndim != 1 or data.size == 0 or not np.isfinite(data).all():
        raise ValueError("bootstrap_ci needs a non-empty sequence of finite numbers")
    labels = np.arange(data.size) if clusters is None else np.unique(np.asarray(clusters), return_inverse=True)[1]
    if labels.shape != data.shape:
        raise ValueError(f"{data.size} values but {labels.size} cluster labels")
    sums, sizes = np.bincount(labels, weights=data), np.bincount(labels)
    rng = np.random.default_rng(seed)
    means = []
    for _ in range(100):  # in parts, so that memory stays at 100 draws a value
        drawn = rng.integers(sums.size, size=(100, sums.size))
        means.append(sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1))
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(data.mean()), float(low), float(high))


def paired_bootstrap_ci(
    before: Sequence[float],
    after: Sequence[float],
    *,
    clusters: Sequence[str] | None = None,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Interval of the mean of `after[i] - before[i]`, pairs kept together."""
    if len(before) != len(after):
        raise ValueError(f"pairs needed, got {len(before)} values before and {len(after)} after")
    differences = np.asarray(after, np.float64) - np.asarray(before, np.float64)
    return bootstrap_ci(differences, clusters=clusters, level=level, seed=seed)
