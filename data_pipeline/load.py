"""Reads a data set: Grain over ArrayRecord, balanced by slice, shuffled by seed, resumable to the record."""

import hashlib
import itertools
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource

from data_pipeline.chunked import Exchange, chunked
from data_pipeline.errors import DataError
from data_pipeline.order import Order, Plan, SliceIndex
from data_pipeline.write import FORMAT, MANIFEST
from srl_jax.episodes import whole
from srl_jax.records import (
    SCHEMA_VERSION,
    CorruptRecord,
    TeacherRecord,
    decode_record,
    encode_record,
)

__all__ = [
    "DataError",
    "benchmark",
    "make_episodes",
    "make_loader",
    "make_stream",
    "read_manifest",
    "read_sample",
    "read_split",
    "split_rules",
    "verify",
]

log = logging.getLogger(__name__)

# Beyond this share of unreadable records a data set is broken rather than scratched.
MAX_CORRUPT_SHARE = 0.01
_REBUILD = "build it again with launch/prepare_data.py"

Share = Callable[[Sequence[bytes]], Sequence[Sequence[bytes]]]


def read_manifest(data_dir: str | Path) -> dict[str, Any]:
    """The manifest of a data set this program can read; DataError otherwise."""
    path = Path(data_dir) / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"{data_dir} holds no {MANIFEST}, so it is not a data set; {_REBUILD} --out={data_dir}"
        ) from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}); {_REBUILD}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else None
        raise DataError(f"{path}: format is {found!r}, this program reads {FORMAT!r}; {_REBUILD}")
    if manifest.get("schema") != SCHEMA_VERSION:
        found = manifest.get("schema")
        raise DataError(
            f"{path}: schema is {found!r}, this program reads {SCHEMA_VERSION!r}; migrate the data set with "
            f"python launch/prepare_data.py migrate --out={data_dir}"
        )
    return manifest


class _CorruptionLimit:
    """Counts distinct unreadable records over all slices and stops the run beyond the allowed share."""

    def __init__(self, total: int, max_share: float) -> None:
        self._total, self._max_share = total, max_share
        self._seen: set[tuple[str, int]] = set()
        self._lock = threading.Lock()

    def report(self, shard: str, index: int, error: Exception) -> None:
        with self._lock:
            if (shard, index) in self._seen:
                return
            self._seen.add((shard, index))
            count = len(self._seen)
        log.warning("skipping record %d of %s: %s", index, shard, error)
        if count > self._max_share * self._total:
            raise DataError(
                f"{count} of {self._total} records cannot be read, the last being record {index} of {shard}; {_REBUILD}"
            ) from error


class _SliceSource:
    """Random access to one slice's records; an unreadable one is None."""

    def __init__(self, data_dir: Path, shards: Sequence[Mapping[str, Any]], limit: _CorruptionLimit) -> None:
        self._names = [str(data_dir / shard["file"]) for shard in shards]
        self._counts = [int(shard["records"]) for shard in shards]
        self._limit = limit
        for name, shard in zip(self._names, shards, strict=True):
            size = Path(name).stat().st_size if Path(name).is_file() else None
            if size != shard["bytes"]:
                state = "is missing" if size is None else f"has {size} bytes instead of {shard['bytes']}"
                raise DataError(f"{name} {state}; {_REBUILD}")
        try:
            self._records = ArrayRecordDataSource(self._names)
        except (RuntimeError, ValueError, OSError) as error:  # a damaged container, known by its own checksums
            raise DataError(f"{self._names[0]} or a shard beside it is damaged ({error}); {_REBUILD}") from error

    def __len__(self) -> int:
        return sum(self._counts)

    def __getitem__(self, index: int) -> Any | None:
        try:
            return decode_record(self._records[index])
        except (CorruptRecord, RuntimeError, ValueError) as error:  # damaged content, damaged container
            shard, within = self._locate(index)
            self._limit.report(shard, within, error)
            return None

    def _locate(self, index: int) -> tuple[str, int]:
        for name, count in zip(self._names, self._counts, strict=True):
            if index < count:
                return name, index
            index -= count
        raise IndexError(index)


def _sources(data_dir: str | Path, split: str, max_corrupt_share: float) -> dict[str, _SliceSource]:
    slices = _slices(data_dir, split)
    total = sum(shard["records"] for entry in slices.values() for shard in entry["shards"])
    limit = _CorruptionLimit(total, max_corrupt_share)
    return {name: _SliceSource(Path(data_dir), entry["shards"], limit) for name, entry in slices.items()}


def _slices(data_dir: str | Path, split: str) -> dict[str, dict[str, Any]]:
    """The manifest's entries of a split's slices, in the order of their names; at least one holds a record."""
    manifest = read_manifest(data_dir)
    if split not in manifest["splits"]:
        raise DataError(f"{data_dir} has no split {split!r}; it has {', '.join(manifest['splits'])}")
    slices = {name: entry for name, entry in sorted(manifest["splits"][split]["slices"].items()) if entry["records"]}
    if not slices:
        raise DataError(f"split {split!r} of {data_dir} is empty; {_REBUILD}")
    return slices


def _slice_index(data_dir: Path, entry: Mapping[str, Any], needed: bool) -> SliceIndex:
    if not needed:
        return SliceIndex(entry["records"])
    parts = []
    for shard in entry["shards"]:
        if "index" not in shard:
            raise DataError(f"{data_dir / shard['file']} has no index, which curriculum and bucketing need; {_REBUILD}")
        path = data_dir / shard["index"]["file"]
        try:
            part = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{path} is missing or damaged ({error}); {_REBUILD}") from None
        if part.shape != (shard["records"], 2):
            raise DataError(f"{path} has shape {part.shape} instead of {(shard['records'], 2)}; {_REBUILD}")
        parts.append(part)
    whole = np.concatenate(parts)
    return SliceIndex(entry["records"], whole[:, 0], whole[:, 1])


class _EpisodeSource:
    """Random access to one slice's whole episodes, each the list of its steps' records in order.

    An episode with an unreadable step is None. Which records belong together stands in the records alone, so every
    one of the slice is read once when this is made.
    """

    def __init__(self, records: _SliceSource) -> None:
        self._records = records
        read = ((index, records[index]) for index in range(len(records)))
        self._places = whole((row.task.episode, index) for index, row in read if row is not None and row.task.episode)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> list[TeacherRecord] | None:
        steps = [self._records[place] for place in self._places[index]]
        return None if None in steps else steps

    def index(self, records: SliceIndex) -> SliceIndex:
        """What is known of the episodes, from what is known of the records: the hardest step, the length of all."""
        if records.difficulty is None or records.length is None:
            return SliceIndex(len(self))
        of = lambda known, total: np.asarray([total(known[places]) for places in self._places], np.int32)
        return SliceIndex(len(self), of(records.difficulty, np.max), of(records.length, np.sum))


class _Planned:
    """A data source whose element at a position is the record, or the episode, that the order puts there."""

    def __init__(self, sources: Mapping[str, _SliceSource | _EpisodeSource], order: Order) -> None:
        self._sources, self._order = sources, order

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, position: int) -> Any | None:
        name, index = self._order[position]
        return self._sources[name][index]


def _checked_plan(data_dir: str | Path, split: str, slices: Mapping[str, Any], plan: Plan) -> Plan:
    weights = plan.weights
    if weights is not None:
        unknown = sorted(set(weights) - set(slices))
        if unknown:
            raise DataError(f"slice_weights names {', '.join(unknown)}; {split} of {data_dir} has {', '.join(slices)}")
        if any(not 0 <= weight < float("inf") for weight in weights.values()) or not sum(weights.values()) > 0:
            raise DataError(f"slice_weights is {weights}; every weight must be at least 0 and one more than 0")
    if not 0 <= plan.curriculum <= 1:
        raise DataError(f"curriculum is {plan.curriculum}; must lie between 0 (a shuffle) and 1 (a sort)")
    for name, value in {"bucket": plan.bucket, "batch_size": plan.batch_size, "hosts": plan.hosts}.items():
        if type(value) is not int or value < 1:
            raise DataError(f"{name} is {value!r}; must be a whole number of at least 1")
    if not 0 <= plan.host < plan.hosts:
        raise DataError(f"host is {plan.host}; must be one of 0 to {plan.hosts - 1}")
    return plan


def _dataset(
    data_dir: str | Path,
    split: str,
    *,
    seed: int,
    slice_weights: Mapping[str, float] | None,
    repeat: bool,
    max_corrupt_share: float,
    episodes: bool = False,
    share: Share | None = None,
    **ordering: Any,
) -> grain.IterDataset:
    slices = _slices(data_dir, split)
    weights = dict.fromkeys(slices, 1.0) if slice_weights is None else dict(slice_weights)
    plan = _checked_plan(data_dir, split, slices, Plan(seed, weights if repeat else None, **ordering))
    needed = plan.curriculum > 0 or plan.bucket > 1
    index = {name: _slice_index(Path(data_dir), entry, needed) for name, entry in slices.items()}
    sources: Mapping[str, _SliceSource | _EpisodeSource] = _sources(data_dir, split, max_corrupt_share)
    if episodes:
        found = {name: _EpisodeSource(source) for name, source in sources.items() if weights.get(name, 0) > 0}
        sources = {name: source for name, source in found.items() if len(source)}
        if slice_weights is not None and (without := sorted(found.keys() - sources.keys())):
            raise DataError(f"slice_weights names {', '.join(without)}, without a whole episode; name other slices")
        if not sources:
            raise DataError(f"split {split!r} of {data_dir} holds no whole episode; build it with an episode_share")
        index = {name: source.index(index[name]) for name, source in sources.items()}
    planned = _Planned(sources, Order(index, plan))
    return chunked(planned) if share is None else chunked(planned, _exchanged(share), plan.hosts)


def _exchanged(share: Share) -> Exchange:
    """Record i of host h becomes the i * hosts + h-th of all, as in the order that the hosts divided."""

    def exchange(mine: list[TeacherRecord | None]) -> list[TeacherRecord | None]:
        everyones = share([b"" if record is None else encode_record(record) for record in mine])
        return [decode_record(data) if data else None for turn in zip(*everyones, strict=True) for data in turn]

    return exchange


def make_stream(
    data_dir: str | Path,
    split: str,
    *,
    seed: int,
    slice_weights: Mapping[str, float] | None = None,
    repeat: bool = True,
    max_corrupt_share: float = MAX_CORRUPT_SHARE,
    curriculum: float = 0.0,
    bucket: int = 1,
    batch_size: int = 1,
    host: int = 0,
    hosts: int = 1,
    share: Share | None = None,
) -> grain.DatasetIterator:
    """An iterator of `TeacherRecord`s with `get_state()` and `set_state(state)`; endless if `repeat`.

    Slices are mixed by `slice_weights` (default: all alike; an unnamed slice then weighs 0), each shuffled anew every
    epoch; a single pass takes every slice by its size. `curriculum`, `bucket`, `batch_size` (records this host uses
    together), `host` and `hosts` are those of `order.Plan`. Equal arguments give equal sequences, and the state is
    only a position. Unreadable records are skipped and logged with shard and index; more than `max_corrupt_share` of
    them raise DataError, as do a missing or foreign manifest, unknown slices and values out of range.

    With `share`, which gives each host what all hand over, by host, each of the `hosts` reads its own records only and
    has the others' from them: the sequence and its positions are those of a single host with their batches together.
    All must then ask for records at the same time; the stream must be endless.
    """
    return iter(
        _dataset(
            data_dir,
            split,
            seed=seed,
            slice_weights=slice_weights,
            repeat=repeat,
            max_corrupt_share=max_corrupt_share,
            curriculum=curriculum,
            bucket=bucket,
            batch_size=batch_size,
            host=host,
            hosts=hosts,
            share=share,
        )
    )


def make_episodes(
    data_dir: str | Path,
    split: str,
    *,
    seed: int,
    slice_weights: Mapping[str, float] | None = None,
    max_corrupt_share: float = MAX_CORRUPT_SHARE,
    curriculum: float = 0.0,
    bucket: int = 1,
    batch_size: int = 1,
    host: int = 0,
    hosts: int = 1,
) -> grain.DatasetIterator:
    """Like an endless `make_stream`, of whole episodes: lists of all steps' records, in order.

    Everything that is said there of records holds here of episodes: weights, shuffling, curriculum (by the hardest
    step), buckets (by the length of all steps), position and hosts. Records that are no step of a whole episode are
    left out, and with them slices that hold no other. Opening reads every record of the slices drawn from. Raises
    DataError too where there is no whole episode, or none in a slice of `slice_weights`.
    """
    return iter(
        _dataset(
            data_dir,
            split,
            seed=seed,
            slice_weights=slice_weights,
            repeat=True,
            max_corrupt_share=max_corrupt_share,
            episodes=True,
            curriculum=curriculum,
            bucket=bucket,
            batch_size=batch_size,
            host=host,
            hosts=hosts,
        )
    )


def make_loader(
    data_dir: str | Path,
    split: str,
    *,
    seed: int,
    batch_size: int,
    slice_weights: Mapping[str, float] | None = None,
    repeat: bool = True,
    max_corrupt_share: float = MAX_CORRUPT_SHARE,
    curriculum: float = 0.0,
    bucket: int = 1,
    host: int = 0,
    hosts: int = 1,
) -> grain.DatasetIterator:
    """Like `make_stream`, in lists of `batch_size` records (the last one of a single pass may be shorter)."""
    records = _dataset(
        data_dir,
        split,
        seed=seed,
        slice_weights=slice_weights,
        repeat=repeat,
        max_corrupt_share=max_corrupt_share,
        curriculum=curriculum,
        bucket=bucket,
        batch_size=batch_size,
        host=host,
        hosts=hosts,
    )
    return iter(records.batch(batch_size, batch_fn=list))


def read_split(
    data_dir: str | Path, split: str, *, max_corrupt_share: float = MAX_CORRUPT_SHARE
) -> list[TeacherRecord]:
    """All readable records of a split, in an order that mixes slices and rules and never changes."""
    sources = _sources(data_dir, split, max_corrupt_share)
    records = [record for source in sources.values() for i in range(len(source)) if (record := source[i]) is not None]
    return sorted(records, key=lambda record: hashlib.sha256(record.task.task_id.encode()).digest())


def read_sample(data_dir: str | Path, split: str, count: int) -> list[TeacherRecord]:
    """At most `count` records of a split, every slice by its size; the same ones every time."""
    return list(itertools.islice(make_stream(data_dir, split, seed=0, repeat=False), count))


def split_rules(data_dir: str | Path, split: str) -> frozenset[str]:
    """Names of the rules that a split's tasks are made from."""
    return frozenset(read_manifest(data_dir)["splits"][split]["rules"])


def benchmark(data_dir: str | Path, split: str = "train", *, records: int = 20_000) -> dict[str, float]:
    """How fast `make_stream` gives records in the order of training: per second, and per second of CPU time.

    Every record is read from its shard and decoded anew whenever its turn comes; nothing is kept. The shards are put
    out of the page cache first, so that those which are read once (`distinct` near `records`) come from storage.
    `bytes` is what the split's shards hold.
    """
    shards = [shard for entry in _slices(data_dir, split).values() for shard in entry["shards"]]
    for shard in shards:
        _drop_from_page_cache(Path(data_dir) / shard["file"])
    stream = make_stream(data_dir, split, seed=0)
    for _ in itertools.islice(stream, 200):  # threads started, files opened
        pass
    seen = set()
    clock, cpu = time.perf_counter(), time.process_time()
    for record in itertools.islice(stream, records):
        seen.add(record.task.task_id)
    clock, cpu = time.perf_counter() - clock, time.process_time() - cpu
    return {
        "records": records,
        "distinct": len(seen),
        "bytes": sum(shard["bytes"] for shard in shards),
        "records_per_second": records / clock,
        "records_per_cpu_second": records / cpu,
    }


def _drop_from_page_cache(path: Path) -> None:
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def verify(data_dir: str | Path) -> None:
    """Compares every file of a data set with the manifest's SHA-256; DataError naming the first that differs."""
    manifest = read_manifest(data_dir)
    shards = [
        shard
        for split in manifest["splits"].values()
        for entry in split["slices"].values()
        for shard in entry["shards"]
    ]
    indices = [shard["index"] for shard in shards if "index" in shard]
    for entry in [*shards, *indices, *manifest["raw"]]:
        path = Path(data_dir) / entry["file"]
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != entry["sha256"]:
            raise DataError(f"{path} is missing or differs from the manifest; {_REBUILD}")
