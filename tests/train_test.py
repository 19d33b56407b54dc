"""A whole run through `launch/train.py`: real data, tokenizer, grammar, rewards and checkpoints, a random tiny model.

What is killed, stopped or refused here is a process of its own, as it is for a user.
"""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest

from data_pipeline.config import DataSetConfig
from data_pipeline.pipeline import prepare
from srl_jax.metrics import is_timing

ROOT = Path(__file__).parents[1]
STEPS = 12


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "set"
    prepare(
        DataSetConfig(
            tag="test", train=16, dev=0, test=6, languages=("python",), real_share=0.0, max_excerpt=180, max_trace=440
        ),
        folder,
    )
    return folder


def start(data: Path, workdir: Path, *flags: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    # One device, as on a user's machine; the compiled programs come from the cache of the runs before.
    environment["XLA_FLAGS"] = re.sub(
        r"--xla_force_host_platform_device_count=\d+", "", os.environ["XLA_FLAGS"]
    ).strip()
    settings = {
        "steps": STEPS, "data.dir": data, "data.prompts_per_step": 2, "data.max_prompt_tokens": 320,
        "sampling.max_new_tokens": 64, "sampling.max_think_tokens": 8, "grpo.max_extra_rollouts": 1,
        "optim.learning_rate": 0.01, "eval.max_tasks": 3, "eval.batch_size": 2, "eval.every": 4, "checkpoint.every": 2,
    }  # fmt: skip
    command = [sys.executable, "launch/train.py", "--config=configs/tiny.py", f"--workdir={workdir}"]
    command += [f"--config.{name}={value}" for name, value in settings.items()]
    return subprocess.Popen(
        [*command, *flags], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    with process:
        try:
            out, err = process.communicate(timeout=600)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    return process.returncode, out, err


def wait_for_step(process: subprocess.Popen[str], workdir: Path, step: int) -> None:
    """Returns while a step after `step` is computed, at least one checkpoint being complete."""
    path = workdir / "metrics.jsonl"
    while process.poll() is None:
        saved_once = any((workdir / "checkpoints").glob("[0-9]"))
        if saved_once and any(json.loads(line)["step"] >= step for line in complete_lines(path)):
            return
        time.sleep(0.02)
    raise AssertionError(f"ended before step {step}: {finish(process)}")


def complete_lines(path: Path) -> list[str]:
    return path.read_text().split("\n")[:-1]


def trajectory(workdir: Path) -> list[dict]:
    records = [json.loads(line) for line in complete_lines(workdir / "metrics.jsonl")]
    return [{name: value for name, value in record.items() if not is_timing(name)} for record in records]


def saved(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint, and where the data stream stood."""
    folder = workdir / "checkpoints" / str(step)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sharding info not provided")  # read on one device, as it was written
        tree = reader.restore((folder / "state").absolute(), args=ocp.args.PyTreeRestore(restore_args=None))
    arrays = {str(path): np.asarray(leaf) for path, leaf in ocp.tree.to_flat_dict(tree, keep_empty_nodes=False).items()}
    position = (folder / "iterator" / "metadata").read_bytes()
    return arrays | {"iterator": np.frombuffer(position, np.uint8)}


def answers(workdir: Path, name: str) -> list[dict]:
    return json.loads((workdir / f"eval_{name}.json").read_text())["items"]


def the_error(result: tuple[int, str, str]) -> str:
    """The one line a refused run prints."""
    code, _, err = result
    assert code == 2, err
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and err.endswith(lines[0] + "\n"), err
    return lines[0]


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    code, out, err = finish(start(data, workdir))
    assert code == 0, err
    return workdir, out


def test_a_run_leaves_metrics_evaluations_checkpoints_and_a_report(uninterrupted):
    workdir, out = uninterrupted
    steps = trajectory(workdir)
    assert [record["step"] for record in steps] == list(range(1, STEPS + 1))
    assert all(record["parse_rate"] == 1.0 and record["finished"] == 1.0 for record in steps)
    assert all(record["unscored"] == 0.0 and record["skipped"] == 0.0 for record in steps)
    assert all(abs(record["ratio_mean"] - 1) < 1e-5 for record in steps)
    assert abs(steps[0]["kl"]) < 1e-5 < max(abs(record["kl"]) for record in steps)
    assert {len(answers(workdir, name)) for name in ("base", "student", "step4", "step8")} == {3}
    assert all(item["kl"] == 0.0 and item["executed"] for item in answers(workdir, "base"))
    assert any(item["kl"] != 0.0 for item in answers(workdir, "student"))
    assert "Held-out reward, student minus base" in (workdir / "report.md").read_text()
    assert f"step {STEPS}/{STEPS}" in out and "report: " in out
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"8", "10", "12"}
    assert json.loads((workdir / "environment.json").read_text())["packages"]["jax"]


def test_killed_then_stopped_it_goes_on_as_if_it_had_never_been_interrupted(data, uninterrupted, tmp_path):
    whole, workdir = uninterrupted[0], tmp_path / "run"
    killed = start(data, workdir)
    wait_for_step(killed, workdir, 3)
    time.sleep(0.1)
    killed.send_signal(signal.SIGSTOP)
    assert "run: another process trains there" in the_error(finish(start(data, workdir)))
    killed.send_signal(signal.SIGKILL)
    assert finish(killed)[0] == -signal.SIGKILL
    assert not (workdir / "checkpoints" / str(STEPS)).exists()

    stopped = start(data, workdir)
    wait_for_step(stopped, workdir, 6)
    stopped.send_signal(signal.SIGTERM)
    code, out, err = finish(stopped)
    assert code == 3, err
    assert re.search(r"^resumed at step \d*[02468] of 12$", out, re.MULTILINE) and "evaluating base" not in out
    left_at = int(re.search(r"stopped by SIGTERM; saved at step (\d+)", out).group(1))
    assert left_at >= 6
    assert (workdir / "checkpoints" / str(left_at)).is_dir()
    assert not (workdir / "eval_student.json").exists()

    code, out, err = finish(start(data, workdir))
    assert code == 0, err
    assert f"resumed at step {left_at}" in out
    assert trajectory(workdir) == trajectory(whole)
    ours, theirs = saved(workdir, STEPS), saved(whole, STEPS)
    assert ours.keys() == theirs.keys() and len(ours) > 40
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)
    for name in ("base", "step4", "step8", "student"):
        for one, other in zip(answers(workdir, name), answers(whole, name), strict=True):
            assert one == other


def test_another_tokenizer_is_refused_and_nothing_is_touched(data, uninterrupted):
    workdir = uninterrupted[0]
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file()}
    error = the_error(
        finish(start(data, workdir, "--config.model.atomic_tags=false", "--config.sampling.max_new_tokens=80"))
    )
    assert "tokenizer" in error and str(workdir) in error and "new workdir" in error
    assert before == {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file()}


def test_a_full_disk_is_one_error_and_the_last_checkpoint_stays(data, uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    process = start(data, workdir)
    wait_for_step(process, workdir, 2)
    # No file may grow any more: what the process meets from here on is what a full disk gives it.
    size = (workdir / "metrics.jsonl").stat().st_size
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, size))
    error = the_error(finish(process))
    assert "File too large" in error or "disk is full" in error
    code, out, err = finish(start(data, workdir))
    assert code == 0, err
    assert "resumed at step" in out
    assert trajectory(workdir) == trajectory(uninterrupted[0])


@pytest.mark.parametrize("damage", ["flipped", "truncated"])
def test_a_damaged_shard_is_named_before_any_work(data, tmp_path, damage):
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    (shard,) = (copy / "test").glob("*.arrayrecord")
    content = bytearray(shard.read_bytes())
    if damage == "flipped":
        for index in range(100, len(content) // 4):  # the middle of the file is padding
            content[index] ^= 0xFF
    else:
        del content[len(content) // 2 :]
    shard.write_bytes(content)
    error = the_error(finish(start(copy, tmp_path / "run")))
    assert shard.name in error and "launch/prepare_data.py" in error
    assert not (tmp_path / "run").exists()


def test_no_room_for_a_trace_is_refused(data, tmp_path):
    error = the_error(finish(start(data, tmp_path / "run", "--config.sampling.max_new_tokens=20")))
    assert re.search(r"max_new_tokens is 20; the shortest trace takes \d+ tokens", error)
    assert not (tmp_path / "run").exists()
