"""A build that is killed anywhere, by its user or by what it executes, gives the data set that was never disturbed."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline import pipeline
from data_pipeline.config import DataSetConfig
from data_pipeline.load import verify
from data_pipeline.pipeline import prepare
from data_pipeline.stages import Judging
from tests.fakes import HashEmbedder

ROOT = Path(__file__).parents[1]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# --------------------------------------------------------------------------------------------- killed as a whole


def build(out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "launch/prepare_data.py", "--config=configs/data_demo.py", f"--out={out}"]
    sizes = {"train": 16, "dev": 4, "test": 4, "real_share": 0.0, "workers": 2}
    command += [f"--config.{name}={value}" for name, value in sizes.items()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def killed(out: Path, when: Callable[[], bool]) -> bool:
    """Builds until `when()` and kills the process then; whether it was still at work."""
    with build(out) as process:
        while process.poll() is None and not when():
            time.sleep(0.001)
        running = process.poll() is None
        process.send_signal(signal.SIGKILL)
    return running


def known(out: Path) -> int:
    """Verdicts that stand whole in the journal."""
    try:
        lines = out.with_name(f"{out.name}.journal").read_bytes().split(b"\n")
    except FileNotFoundError:
        return 0
    whole = 0
    for line in lines:
        with contextlib.suppress(ValueError):
            whole += bool(json.loads(line))
    return whole


def test_killed_at_every_stage_it_ends_with_the_bytes_of_an_undisturbed_build(tmp_path):
    alone, out = tmp_path / "alone", tmp_path / "killed"
    with build(alone) as process:
        assert process.wait(300) == 0, process.stderr.read().decode()
    partial = out.with_name("killed.partial")
    moments = [  # nothing judged yet; some, more; the first shard being written; what the teacher said being written
        partial.exists,
        lambda: known(out) >= 3,
        lambda: known(out) >= 14,
        lambda: any(partial.glob("*/*.arrayrecord")),
        lambda: (partial / "raw").exists(),
    ]
    counts = []
    for moment in moments:
        assert killed(out, moment) and not out.exists()
        counts.append(known(out))
    assert counts == sorted(counts) and counts[1] >= 3 and counts[2] >= 14  # no verdict is lost by a later kill
    with build(out) as process:
        assert process.wait(300) == 0, process.stderr.read().decode()
    assert tree(out) == tree(alone)
    verify(out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "killed"]


# ------------------------------------------------------------------------------------- killed in what it executes


class Interrupted(Exception):
    pass


class PulledOut:
    """An embedder that ends the build after everything was judged and before anything is complete."""

    def embed(self, texts):
        raise Interrupted


@pytest.mark.parametrize("ended", ["action:timeout", "action:crash", "tests_did_not_run_before:cut"])
def test_what_the_machine_did_not_finish_is_executed_again(tmp_path, monkeypatch, ended):
    config = DataSetConfig(tag="t", train=4, dev=0, test=0, languages=("python",), real_share=0.0, workers=1)
    prepare(config, tmp_path / "alone", embedder=HashEmbedder())
    asked = []

    class Watched(Judging):
        def judge(self, draft, answer, sandbox):
            asked.append(draft.task.task_id)
            return super().judge(draft, answer, sandbox)

    class Stalling(Watched):
        def judge(self, draft, answer, sandbox):
            verdict = super().judge(draft, answer, sandbox)
            return replace(verdict, reason=ended) if len(asked) == 2 else verdict

    monkeypatch.setattr(pipeline, "Judging", Stalling)
    with pytest.raises(Interrupted):
        prepare(config, tmp_path / "set", embedder=PulledOut())
    stalled, judged = asked[1], len(asked)
    assert judged == 5  # the step that stalled and another in its place
    asked.clear()
    monkeypatch.setattr(pipeline, "Judging", Watched)
    prepare(config, tmp_path / "set", embedder=HashEmbedder())
    assert asked == [stalled]
    assert tree(tmp_path / "set") == tree(tmp_path / "alone")
