"""Brings a data set of an older record schema up to this program's: nothing is asked or executed again."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from array_record.python import array_record_module

from data_pipeline.errors import DataError
from data_pipeline.write import FORMAT, MANIFEST, begin, commit, copy_file, write_shards
from srl_jax.records import SCHEMA_VERSION, CorruptRecord, TeacherRecord, decode_record

Upgrade = tuple[str, Callable[[dict[str, Any]], None]]


def _to_2(record: dict[str, Any]) -> None:
    """Tasks may be steps of an episode; those of schema 1 never were."""
    record["task"]["episode"] = None


# Schema -> the next one, and what changes on the way.
UPGRADES: dict[str, Upgrade] = {"srl-record/1+srl-action/1": ("srl-record/2+srl-action/1", _to_2)}


def migrate(data_dir: Path) -> tuple[str, str]:
    """Rewrites the data set's shards in place, at once or not at all; (old schema, new schema).

    DataError when there is no way from its schema to this program's, or a record cannot be read: a migrated data set
    is whole.
    """
    manifest = json.loads((data_dir / MANIFEST).read_text(encoding="utf-8")) if data_dir.is_dir() else None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DataError(f"{data_dir} holds no data set of format {FORMAT}; give its folder with --out")
    old = str(manifest.get("schema"))
    if old == SCHEMA_VERSION:
        return old, old
    _path_from(old)
    partial = begin(data_dir)
    for split, content in manifest["splits"].items():
        for name, entry in content["slices"].items():
            records = [row for shard in entry["shards"] for row in _upgraded(data_dir / shard["file"], old)]
            per_shard = max([1, *(shard["records"] for shard in entry["shards"])])
            entry["shards"] = write_shards(partial / split, name, records, per_shard)
    for raw in manifest["raw"]:
        copy_file(data_dir / raw["file"], partial / raw["file"])
    manifest["schema"] = SCHEMA_VERSION
    commit(partial, data_dir, manifest)
    return old, SCHEMA_VERSION


def _path_from(schema: str) -> list[Callable[[dict[str, Any]], None]]:
    steps = []
    while schema != SCHEMA_VERSION:
        if schema not in UPGRADES:
            raise DataError(
                f"there is no way from schema {schema!r} to {SCHEMA_VERSION!r}; build the data set again with "
                "launch/prepare_data.py, or read it with the version that wrote it"
            )
        schema, step = UPGRADES[schema]
        steps.append(step)
    return steps


def _upgraded(path: Path, schema: str) -> Iterator[TeacherRecord]:
    try:
        reader = array_record_module.ArrayRecordReader(str(path))
        rows = reader.read_all()
        reader.close()
    except (RuntimeError, ValueError, OSError) as error:
        raise DataError(f"{path} is damaged ({error}); restore it before migrating") from error
    for index, data in enumerate(rows):
        try:
            yield decode_record(upgraded(data, schema))
        except (CorruptRecord, ValueError, KeyError, TypeError) as error:
            raise DataError(f"record {index} of {path} cannot be migrated: {error}") from error


def upgraded(data: bytes, schema: str) -> bytes:
    """A record's bytes under `schema` as bytes of this program's schema."""
    value: Mapping[str, Any] = json.loads(data)
    for step in _path_from(schema):
        step(value["record"])
    value["record"]["versions"]["schema"] = SCHEMA_VERSION
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()
