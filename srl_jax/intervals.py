"""How sure a mean or a difference is: bootstrap intervals and a permutation test, single, paired and by cluster."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_EXACT_PAIRS, _FLIPS = 12, 10_000


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


def sign_flip_p(
    before: Sequence[float], after: Sequence[float], *, clusters: Sequence[str] | None = None, seed: int = 0
) -> float:
    """Two-sided p-value of the paired permutation test (Fisher 1935) that the mean of `after - before` is 0.

    Had nothing changed, each difference were as likely to have the other sign: p is the share of all flips of signs
    whose sum is at least as far from 0. All of them up to 12 pairs, 10,000 drawn ones beyond (so never below 1e-4).
    `clusters` flips whole clusters, whose differences then need not be independent of each other.
    """
    if len(before) != len(after) or not len(before):
        raise ValueError(f"pairs needed, got {len(before)} values before and {len(after)} after")
    differences = np.asarray(after, np.float64) - np.asarray(before, np.float64)
    if not np.isfinite(differences).all():
        raise ValueError("sign_flip_p needs finite numbers")
    labels = np.arange(len(before)) if clusters is None else np.unique(np.asarray(clusters), return_inverse=True)[1]
    if labels.shape != differences.shape:
        raise ValueError(f"{differences.size} values but {labels.size} cluster labels")
    sums = np.bincount(labels, weights=differences)
    # Sums that are equal but for rounding count as equal.
    least = abs(sums.sum()) * (1 - 1e-9) - 1e-12 * np.abs(sums).sum()
    if sums.size <= _EXACT_PAIRS:
        signs = np.asarray(list(itertools.product((-1.0, 1.0), repeat=sums.size)))
        return float((np.abs(signs @ sums) >= least).mean())
    rng = np.random.default_rng(seed)
    hits = 0
    for _ in range(100):
        signs = rng.integers(0, 2, size=(_FLIPS // 100, sums.size)) * 2.0 - 1.0
        hits += int((np.abs(signs @ sums) >= least).sum())
    # The observed signs are one of the permutations, so that p is never 0 (Phipson and Smyth 2010).
    return (hits + 1) / (_FLIPS + 1)
