"""Data set on disk: ArrayRecord shards, raw teacher output, and a manifest that is written last.

Everything is built in a folder beside the target and moved into place in one step. A folder without a manifest is
not a data set, so an interrupted run leaves nothing that could be mistaken for one.
"""

import gzip
import hashlib
import io
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import array_record_module

from data_pipeline.errors import DataError
from srl_jax.records import TeacherRecord, encode_record
from srl_jax.trace import render_state

MANIFEST = "manifest.json"
FORMAT = "srl-dataset/1"
RAW_STEP = "srl-raw-step/1"  # a line of raw/*.jsonl.gz: task, what the teacher said, verdict


def begin(target: Path) -> Path:
    """An empty folder beside `target` to build in. DataError if `target` holds something that is not a data set."""
    if target.exists() and not target.is_dir():
        raise DataError(f"{target} is a file; give a folder with --out")
    if target.is_dir() and any(target.iterdir()) and not (target / MANIFEST).is_file():
        raise DataError(f"{target} is not empty and holds no data set; give another --out or remove it")
    partial = target.with_name(target.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    return partial


def commit(partial: Path, target: Path, manifest: Mapping[str, Any]) -> None:
    """Writes the manifest and puts `partial` in the place of `target`."""
    write_bytes(partial / MANIFEST, (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode())
    old = target.with_name(target.name + ".old")
    if old.exists():
        shutil.rmtree(old)
    if target.exists():
        target.rename(old)
    partial.rename(target)
    sync_folder(target.parent)
    if old.exists():
        shutil.rmtree(old)


def write_shards(
    folder: Path, slice_name: str, records: Sequence[TeacherRecord], per_shard: int
) -> list[dict[str, Any]]:
    """Writes `records` as ``<slice>-0000i-of-0000N.arrayrecord`` and returns the manifest's entries for them."""
    return _write(folder, slice_name, [encode_record(record) for record in records], _measure(records), per_shard)


def _write(
    folder: Path, slice_name: str, rows: Sequence[bytes], index: Sequence[tuple[int, int]], per_shard: int
) -> list[dict[str, Any]]:
    folder.mkdir(parents=True, exist_ok=True)
    count = max(1, -(-len(rows) // per_shard))
    entries = []
    for number in range(count):
        part = slice(number * per_shard, (number + 1) * per_shard)
        path = folder / f"{slice_name.replace('/', '-')}-{number:05d}-of-{count:05d}.arrayrecord"
        # One record a group: random access reads nothing else, and a damaged record costs only itself.
        writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
        for row in rows[part]:
            writer.write(row)
        writer.close()
        _sync_file(path)
        known = path.with_suffix(".index.npy")
        buffer = io.BytesIO()
        np.save(buffer, np.asarray(index[part], np.int32).reshape(-1, 2))
        write_bytes(known, buffer.getvalue())
        entry = {**file_entry(path, folder.parent), "index": file_entry(known, folder.parent)}
        entries.append({**entry, "records": len(rows[part])})
    return entries


def _measure(records: Sequence[TeacherRecord]) -> list[tuple[int, int]]:
    """What a loader orders records by without reading them: difficulty and characters.

    The characters are those the student reads and writes that differ between tasks: instruction, excerpts, state and
    trace. Tokens would need a tokenizer; to sort by, this is as good.
    """
    return [
        (
            record.task.difficulty,
            len(record.task.instruction)
            + sum(len(file.text) for file in record.task.context)
            + len(render_state(record.task.prior_state))
            + len(record.trace),
        )
        for record in records
    ]


def write_raw(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Compressed JSON lines without a time stamp, so that equal lines give equal bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line, ensure_ascii=False, sort_keys=True) + "\n" for line in lines)
    write_bytes(path, gzip.compress(text.encode("utf-8", "backslashreplace"), mtime=0))  # as `RawStore.add` does


def file_entry(path: Path, root: Path) -> dict[str, Any]:
    """A file's name relative to `root`, its size and its SHA-256."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"file": path.relative_to(root).as_posix(), "bytes": path.stat().st_size, "sha256": digest}


def write_bytes(path: Path, data: bytes) -> None:
    """Writes `data` and waits until it is on disk."""
    path.write_bytes(data)
    _sync_file(path)


def replace_bytes(path: Path, data: bytes) -> None:
    """Puts a file with `data` in the place of `path`, at once or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    write_bytes(temporary, data)
    temporary.replace(path)
    sync_folder(path.parent)


def copy_file(source: Path, target: Path) -> None:
    """A copy that is on disk."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    _sync_file(target)


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Waits until the names in a folder are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
