"""Scores a data set anew, for other weights or a newer reward, without asking a teacher or executing anything.

`trace_quality` follows from the stored trace and report; steps that were good enough but for their quality are read
from the raw lines and may come in, others may go out.
"""

import dataclasses
import gzip
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.load import read_manifest, read_split
from data_pipeline.quality import QualityConfig, trace_quality
from data_pipeline.stages import Embeds, Kept, Scoring
from data_pipeline.validate import Drop
from data_pipeline.write import RAW_STEP, begin, commit, file_entry, write_raw, write_shards
from srl_jax.records import TeacherRecord, task_from_json
from srl_jax.rewards import REWARD_VERSION
from srl_jax.trace import parse_trace, render_trace


def rescore(data_dir: Path, quality: QualityConfig, embedder: Embeds | None = None) -> dict[str, Any]:
    """Rewrites a data set of teacher records in place, at once or not at all; returns its new manifest.

    Embeddings are kept with the records that have one; `embedder` (default: the pinned one) serves those that come in.
    """
    manifest = read_manifest(data_dir)
    if manifest.get("raw_format") != RAW_STEP:
        raise DataError(f"{data_dir} holds no raw lines of {RAW_STEP}; build it again with launch/prepare_data.py")
    partial, raw = begin(data_dir), []
    scoring = Scoring(manifest["dataset"], embedder)
    for entry in manifest["raw"]:
        split = Path(entry["file"]).name.partition(".")[0]
        slices = manifest["splits"][split]["slices"]
        filled = any(content["records"] for content in slices.values())
        known = {record.task.task_id: record for record in read_split(data_dir, split)} if filled else {}
        lines = [_judged_again(line, quality) for line in read_raw(data_dir / entry["file"])]
        by_slice: dict[str, list[TeacherRecord]] = {name: [] for name in slices}
        for line in lines:
            if line["rejected"] is None:
                by_slice.setdefault(line["slice"], []).append(_record(line, known, scoring))
        per_shard = manifest.get("config", {}).get("records_per_shard", 1000)
        for name, records in by_slice.items():
            shards = write_shards(partial / split, name, records, per_shard) if records else []
            wanted = slices.get(name, {}).get("wanted", len(records))
            slices[name] = {"records": len(records), "wanted": wanted, "shards": shards}
        path = partial / entry["file"]
        write_raw(path, lines)
        raw.append({**file_entry(path, partial), "records": len(lines)})
    manifest.update(reward=REWARD_VERSION, quality=dataclasses.asdict(quality), raw=raw)
    commit(partial, data_dir, manifest)
    return manifest


def read_raw(path: Path) -> list[dict[str, Any]]:
    """The lines of a data set's raw file; DataError for one that is damaged."""
    try:
        return [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"{path} is missing or damaged ({error}); restore it, or build the data set again") from None


def _judged_again(line: dict[str, Any], quality: QualityConfig) -> dict[str, Any]:
    """The line with a new verdict, where the old one hung on quality alone."""
    if line["rejected"] not in (None, Drop.LOW_QUALITY):
        return line
    score = trace_quality(parse_trace(line["text"]), line["env_report"], quality)
    return {**line, "quality": score, "rejected": None if score >= quality.threshold else Drop.LOW_QUALITY.value}


def _record(line: Mapping[str, Any], known: Mapping[str, TeacherRecord], scoring: Scoring) -> TeacherRecord:
    trace = parse_trace(line["text"])
    old = known.get(line["task_id"])
    if old is not None and old.trace == render_trace(trace):
        versions = dataclasses.replace(old.versions, reward=REWARD_VERSION)
        return dataclasses.replace(old, trace_quality=line["quality"], versions=versions)
    task, report = task_from_json(line["task"]), line["env_report"]
    return scoring(None, [Kept(task, render_trace(trace), trace.think, line["quality"], report, line["teacher"])])[0]
