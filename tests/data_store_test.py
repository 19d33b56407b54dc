"""The store: scores rebuilt without a teacher, older schemas migrated."""

import dataclasses
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from array_record.python import array_record_module

from data_pipeline import commands
from data_pipeline.errors import DataError
from data_pipeline.load import make_stream, read_manifest, read_split, verify
from data_pipeline.migrate import UPGRADES
from data_pipeline.quality import QualityConfig, trace_quality
from data_pipeline.rescore import read_raw, rescore
from data_pipeline.tasks.catalogue import rule_named
from data_pipeline.tasks.generated import generate
from data_pipeline.teacher import OracleTeacher
from data_pipeline.write import FORMAT, RAW_STEP, begin, commit, file_entry, write_raw, write_shards
from srl_jax.records import (
    SCHEMA_VERSION,
    CorruptRecord,
    TeacherRecord,
    Versions,
    encode_record,
    task_from_json,
    task_to_json,
)
from srl_jax.rewards import REWARD_VERSION
from srl_jax.trace import parse_trace, render_trace
from tests.fakes import HashEmbedder

REPORT = {"success": True, "diff": "-a\n+b"}
NAME = "python/generated"


def line(index, reason=None, think=None, report=REPORT):
    """A raw line as the pipeline writes it; a short `think` lowers its quality."""
    draft = generate(rule_named("python-rename-method"), index, 0, 300)
    trace = parse_trace(OracleTeacher().write(draft))
    text = render_trace(dataclasses.replace(trace, think=think or trace.think)).replace('","', '", "')
    quality = trace_quality(parse_trace(text), report) if reason in (None, "low_quality") else None
    return {"task_id": draft.task.task_id, "slice": NAME, "teacher": "t", "text": text, "rejected": reason,
            "env_report": report, "quality": quality, "task": task_to_json(draft.task)}  # fmt: skip


def record(raw):
    trace = parse_trace(raw["text"])
    versions = Versions(SCHEMA_VERSION, "tag", "srl-reward/0")
    embedding = HashEmbedder().embed([trace.think])[0]
    task = task_from_json(raw["task"])
    return TeacherRecord(task, render_trace(trace), embedding, raw["quality"], REPORT, versions, "t")


@pytest.fixture
def data(tmp_path):
    """Six kept steps, one of them with nothing to say; one rejected for that, one for its action."""
    lines = [line(index) for index in range(5)] + [line(5, think="so it is said")]
    lines += [line(6, "low_quality", think="no"), line(7, "action:no_match", report={**REPORT, "success": False})]
    partial = begin(tmp_path / "data")
    records = [record(raw) for raw in lines if raw["rejected"] is None]
    shards = write_shards(partial / "train", NAME, records, 4)
    write_raw(partial / "raw" / "train.jsonl.gz", lines)
    manifest = {
        "format": FORMAT,
        "schema": SCHEMA_VERSION,
        "dataset": "tag",
        "raw_format": RAW_STEP,
        "splits": {"train": {"slices": {NAME: {"records": 6, "wanted": 6, "shards": shards}}}},
        "raw": [{**file_entry(partial / "raw" / "train.jsonl.gz", partial), "records": len(lines)}],
    }
    commit(partial, tmp_path / "data", manifest)
    return tmp_path / "data"


def scores(folder):
    return {row.task.task_id[-1]: row.trace_quality for row in read_split(folder, "train")}


# -------------------------------------------------------------------------------------------------- rescoring


def test_new_weights_move_scores_and_records_without_a_teacher(data):
    before = {row.task.task_id: row for row in read_split(data, "train")}
    assert len(before) == 6 and scores(data)["5"] < scores(data)["0"]
    manifest = rescore(data, QualityConfig(agreement=2.0, threshold=0.9), HashEmbedder())
    assert sorted(scores(data)) == ["0", "1", "2", "3", "4"] and commands.records_in(manifest) == 5
    after = read_split(data, "train")
    for row in after:
        old = before[row.task.task_id]
        assert row.versions.reward == REWARD_VERSION and row.trace == old.trace
        assert np.array_equal(row.think_embedding, old.think_embedding)
    kinds = [raw["rejected"] for raw in read_raw(data / "raw" / "train.jsonl.gz")]
    assert kinds == [None] * 5 + ["low_quality", "low_quality", "action:no_match"]
    verify(data)


def test_what_was_too_poor_may_come_in_and_what_failed_never(data):
    rescore(data, QualityConfig(threshold=0.1), HashEmbedder())
    assert sorted(scores(data)) == ["0", "1", "2", "3", "4", "5", "6"]
    [newcomer] = [row for row in read_split(data, "train") if row.task.task_id[-1] == "6"]
    assert newcomer.trace == render_trace(parse_trace(newcomer.trace)) and "no</think>" in newcomer.trace
    first = {path.name: path.read_bytes() for path in data.rglob("*") if path.is_file()}
    rescore(data, QualityConfig(threshold=0.1), HashEmbedder())
    assert first == {path.name: path.read_bytes() for path in data.rglob("*") if path.is_file()}


def test_nothing_left_is_an_empty_slice_not_an_error(data):
    rescore(data, QualityConfig(agreement=0.0, length=0.0, threshold=1.0), HashEmbedder())
    assert len(scores(data)) == 7  # all that was executed with success
    rescore(data, QualityConfig(schema=0.0, agreement=0.0, execution=0.0, threshold=1.0), HashEmbedder())
    assert sorted(scores(data)) == ["0", "1", "2", "3", "4"]  # the others say too little
    rescore(data, QualityConfig(schema=0.0, length=0.0, execution=0.0, agreement=1e-9, threshold=1.0), HashEmbedder())
    rescore(data, QualityConfig(), HashEmbedder())


def test_a_data_set_without_raw_lines_cannot_be_rescored(data):
    manifest = json.loads((data / "manifest.json").read_text())
    del manifest["raw_format"]
    (data / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"holds no raw lines of srl-raw-step/1; build it again"):
        rescore(data, QualityConfig(), HashEmbedder())


def test_a_damaged_raw_file_is_named_and_nothing_is_touched(data):
    path = data / "raw" / "train.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=rf"{path} is missing or damaged"):
        rescore(data, QualityConfig(), HashEmbedder())
    assert len(scores(data)) == 6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("speed=1", "no weight 'speed'; it has agreement, execution"),
        ("length=long", "length is 'long'; must be a number"),
        ("threshold=2", "threshold must be at most 1"),
        ("length=-1", r"quality\.length is -1\.0"),
        ("schema=0,execution=0,length=0,agreement=0", "one weight above 0"),
    ],
)
def test_weights_are_checked(text, message):
    with pytest.raises(DataError, match=message):
        commands.quality_of(text)
    assert commands.quality_of("execution=0.5,threshold=0.7") == QualityConfig(execution=0.5, threshold=0.7)


# -------------------------------------------------------------------------------------------------- migration


def made_by_schema_1(folder):
    """Turns the data set in `folder` into one as schema 1 wrote it."""
    old = next(iter(UPGRADES))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["schema"] = old
    for entry in manifest["splits"]["train"]["slices"].values():
        for shard in entry["shards"]:
            path = folder / shard["file"]
            reader = array_record_module.ArrayRecordReader(str(path))
            rows = [json.loads(row) for row in reader.read_all()]
            reader.close()
            writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
            for row in rows:
                row["record"]["versions"]["schema"] = old
                del row["record"]["task"]["episode"]
                writer.write(json.dumps(row, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode())
            writer.close()
            del shard["index"]
            shard["bytes"] = path.stat().st_size
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return old


def test_an_older_schema_is_refused_with_the_command_that_migrates_it(data):
    before = read_split(data, "train")
    old = made_by_schema_1(data)
    with pytest.raises(DataError, match=rf"schema is '{old.replace('+', '.')}'.*prepare_data.py migrate --out={data}"):
        make_stream(data, "train", seed=0)
    said = commands.run("migrate", data, "")
    assert said == f"{data}: migrated from {old} to {SCHEMA_VERSION}"
    assert read_split(data, "train") == before and [row.task.episode for row in before] == [None] * 6
    verify(data)
    next(make_stream(data, "train", seed=0, curriculum=1.0))  # the index is new as well
    assert "is current" in commands.run("migrate", data, "")


def test_a_schema_without_a_way_is_refused_and_damage_stops_a_migration(data, tmp_path):
    made_by_schema_1(data)
    shard = sorted((data / "train").glob("*.arrayrecord"))[0]
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=str(shard)):
        commands.run("migrate", data, "")
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["schema"] = "srl-record/0+x"
    (data / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="no way from schema 'srl-record/0"):
        commands.run("migrate", data, "")
    with pytest.raises(DataError, match="holds no data set"):
        commands.run("migrate", tmp_path / "nowhere", "")


def test_a_foreign_record_in_a_shard_names_the_command(data):
    value = json.loads(encode_record(read_split(data, "train")[0]))
    value["record"]["versions"]["schema"] = "srl-record/9"
    from srl_jax.records import decode_record

    with pytest.raises(CorruptRecord, match=r"launch/prepare_data\.py migrate"):
        decode_record(json.dumps(value).encode())


# -------------------------------------------------------------------------------------------------- the commands


def test_the_launch_file_runs_the_commands(data):
    root = Path(__file__).parents[1]

    def launch(*arguments):
        command = [sys.executable, "launch/prepare_data.py", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(root)}
        return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)

    good = launch("verify", f"--out={data}")
    assert good.returncode == 0 and "every file is as the manifest says" in good.stdout, good.stderr
    shard = sorted((data / "train").glob("*.arrayrecord"))[0]
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    bad = launch("verify", f"--out={data}")
    assert bad.returncode == 2 and "differs from the manifest" in bad.stderr.splitlines()[-1]
    assert read_manifest(data)
    assert gzip.decompress((data / "raw" / "train.jsonl.gz").read_bytes())
