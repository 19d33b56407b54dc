"""Which record stands at which position of a training stream: arithmetic on indices, no record is read.

Every position is found on its own, from the seed alone, so that a stream can be resumed, or split over hosts, by
counting. Permutations are drawn whole by numpy: a format-preserving cipher, as Grain shuffles with, walks through
65,536 places to permute a slice of a hundred.
"""

import functools
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

ENDLESS = 2**62
_CYCLE = 4096  # positions after which the mixture of slices repeats; every cycle holds the weights as well as it can


@dataclass(frozen=True)
class Plan:
    """How records are ordered.

    `weights` mixes the slices for ever; None is one pass over everything. `curriculum` in [0, 1] is how strictly the
    first epoch goes from easy and short to difficult and long: 0 is a plain shuffle, 1 a sort. `bucket` batches of
    `batch_size` records are drawn together, sorted by length and cut, so that a batch holds records of like length; 1
    leaves them as they come. Host `host` of `hosts` takes every `hosts`-th record: with equal batches on every host
    the k-th batches together are the k-th batch of one big host.
    """

    seed: int
    weights: Mapping[str, float] | None
    curriculum: float = 0.0
    bucket: int = 1
    batch_size: int = 1
    host: int = 0
    hosts: int = 1


@dataclass(frozen=True)
class SliceIndex:
    """What is known of a slice's records without reading them; `difficulty` and `length` are int32 [records].

    They may be None where the plan needs neither.
    """

    records: int
    difficulty: np.ndarray | None = None
    length: np.ndarray | None = None


class Order:
    """A sequence of (slice name, index within the slice). Safe to read from several threads."""

    def __init__(self, slices: Mapping[str, SliceIndex], plan: Plan) -> None:
        """`plan.weights` must name slices of `slices` and hold at least one positive weight."""
        self._slices, self._plan = slices, plan
        if plan.weights is None:
            self._names = list(slices)
            self._total = sum(index.records for index in slices.values())
        else:
            self._names = [name for name in slices if plan.weights.get(name, 0) > 0]
            self._total = ENDLESS
            self._pattern, self._ranks, self._per_cycle = _mixture([plan.weights[name] for name in self._names])
        self._starts = np.cumsum([0, *(slices[name].records for name in self._names)])
        # One permutation a slice is in use, and at its end the next; a reader's threads stay within two windows.
        self._permutation = functools.lru_cache(2 * len(self._names) + 2)(self._draw_permutation)
        self._window = functools.lru_cache(3)(self._draw_window)

    def __len__(self) -> int:
        """How many positions this host has: `ENDLESS` but for a single pass."""
        return -((self._plan.host - self._total) // self._plan.hosts)

    def __getitem__(self, position: int) -> tuple[str, int]:
        place = position * self._plan.hosts + self._plan.host
        if not 0 <= place < self._total:
            raise IndexError(position)
        if self._plan.bucket > 1:
            window, offset = divmod(place, self._window_size)
            place = window * self._window_size + int(self._window(window)[offset])
        return self._drawn(place)

    @property
    def _batch(self) -> int:
        return self._plan.batch_size * self._plan.hosts

    @property
    def _window_size(self) -> int:
        return self._batch * self._plan.bucket

    def _drawn(self, place: int) -> tuple[str, int]:
        """The record at `place` before any bucketing."""
        if self._plan.weights is None:
            number = int(self._permutation(None, 0)[place])
            part = int(np.searchsorted(self._starts, number, side="right")) - 1
            return self._names[part], number - int(self._starts[part])
        cycle, offset = divmod(place, _CYCLE)
        part = int(self._pattern[offset])
        drawn_before = cycle * int(self._per_cycle[part]) + int(self._ranks[offset])
        name = self._names[part]
        epoch, index = divmod(drawn_before, self._slices[name].records)
        return name, int(self._permutation(name, epoch)[index])

    def _draw_permutation(self, name: str | None, epoch: int) -> np.ndarray:
        """The order of one slice, or of everything, in one epoch: int64 [records]."""
        parts = [self._slices[part] for part in ([name] if name is not None else self._names)]
        rng = np.random.default_rng([self._plan.seed, zlib.crc32((name or "").encode()), epoch])
        count = sum(part.records for part in parts)
        if not self._plan.curriculum or epoch:
            return rng.permutation(count)
        length = np.concatenate([part.length for part in parts])
        difficulty = np.concatenate([part.difficulty for part in parts])
        rank = np.empty(count)
        rank[np.lexsort((length, difficulty))] = np.arange(count) / count
        strength = self._plan.curriculum
        return np.argsort(strength * rank + (1 - strength) * rng.random(count), kind="stable")

    def _draw_window(self, window: int) -> np.ndarray:
        """Where each offset of a window is drawn from: int64 [records of the window]."""
        start = window * self._window_size
        drawn = [self._drawn(place) for place in range(start, min(start + self._window_size, self._total))]
        lengths = [self._slices[name].length[index] for name, index in drawn]
        by_length = np.argsort(lengths, kind="stable")
        whole = len(drawn) // self._batch * self._batch
        rng = np.random.default_rng([self._plan.seed, 1, window])
        batches = rng.permutation(by_length[:whole].reshape(-1, self._batch), axis=0)
        return np.concatenate([batches.reshape(-1), by_length[whole:]])  # a short batch can only come last


def _mixture(weights: Sequence[float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One cycle of the mixture: the slice at each offset, how many of that slice came before it, and the totals.

    Each slice's places are spread evenly. A slice whose share is below 1 in `_CYCLE` still gets one place.
    """
    shares = np.asarray(weights, np.float64) / sum(weights) * _CYCLE
    counts = np.maximum(1, np.floor(shares)).astype(int)
    # The largest remainders take what rounding down left over; the largest slices give back what the rare ones took.
    while counts.sum() < _CYCLE:
        counts[np.argmax(shares - counts)] += 1
    while counts.sum() > _CYCLE:
        counts[np.argmax(counts)] -= 1
    places = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
    owners = np.repeat(np.arange(len(counts)), counts)
    pattern = owners[np.lexsort((owners, places))]
    ranks = np.empty(_CYCLE, int)
    for part in range(len(counts)):
        ranks[pattern == part] = np.arange(counts[part])
    return pattern, ranks, counts
