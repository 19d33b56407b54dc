"""launch/train.py on two hosts: two processes with a CPU device each, one workdir, one coordinator between them."""

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from data_pipeline.config import DataSetConfig
from data_pipeline.pipeline import prepare
from srl_jax import hosts
from srl_jax.config import ConfigError
from srl_jax.replay import replay_stream
from tests.fakes import tiny_config
from tests.train_test import ROOT, answers, complete_lines, finish, start, trajectory

STEPS = 3
# Together they take every way on which hosts meet: refilled groups, executed rewards, scores of the trainer's own.
RECIPE = (
    f"--config.steps={STEPS}", "--config.eval.max_tasks=2", "--config.eval.every=0", "--config.checkpoint.every=1",
    "--config.reward.execution=0.2", "--config.grpo.importance_cap=2.0", "--config.replay.record=True",
)  # fmt: skip
BOUND_S = 60  # within which a survivor has to end


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "set"
    prepare(
        DataSetConfig(
            tag="test", train=16, dev=0, test=4, languages=("python",), real_share=0.0, max_excerpt=180, max_trace=440
        ),
        folder,
    )
    return folder


def start_pair(data: Path, workdir: Path) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = (*RECIPE, f"--coordinator_address={address}", "--num_processes=2")
    return [start(data, workdir, *flags, f"--process_id={number}") for number in range(2)]


def finish_pair(pair: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    try:
        return [finish(process) for process in pair]
    finally:
        for process in pair:
            process.kill()


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "alone"
    code, _, err = finish(start(data, workdir, *RECIPE))
    assert code == 0, err
    return workdir


@pytest.fixture(scope="module")
def pair(data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "pair"
    (code, out, err), (other, quiet, other_err) = finish_pair(start_pair(data, workdir))
    assert (code, other) == (0, 0), err + other_err
    assert f"step {STEPS}/{STEPS}" in out and "report: " in out and "step" not in quiet and "report" not in quiet
    return workdir


def saved(workdir: Path, step: int) -> dict[str, np.ndarray | bytes]:
    """Every array of a checkpoint, whichever devices of whichever hosts it was saved from, and the data's position."""
    folder = (workdir / "checkpoints" / str(step)).absolute()
    handler = ocp.PyTreeCheckpointHandler()
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), handler.metadata(folder / "state").tree)
    with ocp.Checkpointer(handler) as reader:
        tree = reader.restore(folder / "state", args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    arrays = {str(path): leaf for path, leaf in ocp.tree.to_flat_dict(tree, keep_empty_nodes=False).items()}
    assert len(arrays) > 40 and all(isinstance(array, np.ndarray) for array in arrays.values())
    return arrays | {"iterator": (folder / "iterator" / "metadata").read_bytes()}


def assert_near(ours: dict, theirs: dict, tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    places = [json.loads(arrays.pop("iterator"))["json"] for arrays in (ours, theirs)]
    assert places[0]["stream"] == places[1]["stream"]
    assert places[0]["control"] == pytest.approx(places[1]["control"], abs=1e-4)
    for name, array in ours.items():
        np.testing.assert_allclose(array, theirs[name], atol=tolerance, rtol=0, err_msg=name)


def test_two_hosts_go_the_way_of_one(alone, pair):
    one, two = trajectory(alone), trajectory(pair)
    assert [record["step"] for record in two] == list(range(1, STEPS + 1))
    assert any(record["groups_drawn"] > 2 for record in two)  # some batch was filled up by a further rollout
    for ours, theirs in zip(two, one, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert value == pytest.approx(theirs[name], abs=1e-4), (ours["step"], name)
    assert_near(saved(pair, STEPS), saved(alone, STEPS), 1e-5)
    for name in ("base", "student", "teacher", "copied_prompt", "common_trace"):
        for ours, theirs in zip(answers(pair, name), answers(alone, name), strict=True):
            kl = ours.pop("kl"), theirs.pop("kl")
            assert ours == theirs and (kl == (None, None) or kl[0] == pytest.approx(kl[1], abs=1e-4))
    assert "Held-out reward, student minus base" in (pair / "report.md").read_text()
    groups = [replay_stream(workdir / "replay", shuffle=False, seed=0) for workdir in (pair, alone)]
    for _ in range(2 * STEPS):
        ours, theirs = (next(stream) for stream in groups)
        assert (ours.task_id, ours.policy_step) == (theirs.task_id, theirs.policy_step)
        np.testing.assert_array_equal(ours.completion_ids, theirs.completion_ids)
        np.testing.assert_allclose(ours.rewards, theirs.rewards, atol=1e-6)
    assert {path.name for path in pair.iterdir()} == {path.name for path in alone.iterdir()}


def as_it_was(run: Path, step: int, workdir: Path) -> None:
    """A copy of a run as it was after `step` steps."""
    shutil.copytree(run, workdir)
    for later in range(step + 1, STEPS + 1):
        shutil.rmtree(workdir / "checkpoints" / str(later))
    for name in ("metrics.jsonl", "histograms.jsonl"):
        lines = complete_lines(workdir / name)[:step]
        (workdir / name).write_text("".join(line + "\n" for line in lines))


def test_one_host_goes_on_where_two_were(data, alone, pair, tmp_path):
    as_it_was(pair, STEPS - 1, tmp_path / "run")
    code, out, err = finish(start(data, tmp_path / "run", *RECIPE))
    assert code == 0, err
    assert f"resumed at step {STEPS - 1} of {STEPS}" in out
    assert_near(saved(tmp_path / "run", STEPS), saved(alone, STEPS), 1e-5)


def test_killed_on_one_host_then_stopped_on_one_they_go_on_as_if_nothing_had_been(data, pair, tmp_path):
    workdir = tmp_path / "run"
    as_it_was(pair, 1, workdir)
    killed = start_pair(data, workdir)
    while "resumed" not in json.loads((workdir / "environment.json").read_text()) and killed[0].poll() is None:
        time.sleep(0.1)
    time.sleep(1.0)  # into the step, and out of what comes before it
    killed[1].kill()
    began = time.monotonic()
    code, out, err = finish(killed[0])
    assert (code, time.monotonic() - began < BOUND_S) == (5, True), err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in err, err
    assert "host 0 of 2 lost another one" in errors[0] and "start all hosts again with the same command" in errors[0]
    code, _, err = finish(killed[1])
    assert code == -signal.SIGKILL and "host 1 of 2 was ended, by a kill or by JAX" in err
    assert f"resumed at step 1 of {STEPS}" in out and not (workdir / "checkpoints" / str(STEPS)).exists()

    stopped = start_pair(data, workdir)
    while not (workdir / "checkpoints" / str(STEPS - 1)).exists() and stopped[0].poll() is None:
        time.sleep(0.02)
    time.sleep(0.3)  # into the last step, where there is time for that
    stopped[1].send_signal(signal.SIGTERM)
    ends = finish_pair(stopped)
    assert [code for code, _, _ in ends] == [3, 3], ends
    step = int(re.search(r"stopped by SIGTERM; saved at step (\d+)", ends[0][1]).group(1))
    assert step >= STEPS - 1 and trajectory(workdir) == trajectory(pair)[:step]
    ours, theirs = saved(workdir, step), saved(pair, step)
    assert ours.keys() == theirs.keys()
    assert ours.pop("iterator") == theirs.pop("iterator")
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)
    assert not list((workdir / "checkpoints").glob("*tmp*"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--num_processes=2", "--process_id=0"], "also needs --coordinator_address"),
        (["--coordinator_address=h:1", "--num_processes=2", "--process_id=2"], "less than --num_processes"),
        (["--coordinator_address=h", "--num_processes=2", "--process_id=0"], "must be host:port"),
    ],
)
def test_wrong_flags_are_one_error(tmp_path, flags, words):
    command = [sys.executable, "launch/train.py", "--config=configs/tiny.py", f"--workdir={tmp_path}/run", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: ") and words in done.stderr


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda c: setattr(c, "method", "sft"), "method"),
        (lambda c: setattr(c, "method", "replay"), "method"),
        (lambda c: setattr(c.grpo, "returns", "episode"), "grpo.returns"),
        (lambda c: setattr(c.grpo, "baseline", "value"), "grpo.baseline"),
        (lambda c: setattr(c.sampling, "slots", 2), "sampling.slots"),
        (lambda c: setattr(c.sandbox, "server", "ray"), "sandbox.server"),
        (lambda c: setattr(c.data, "prompts_per_step", 3), "data.prompts_per_step"),
    ],
)
def test_what_hosts_cannot_do_together_is_named(monkeypatch, change, field):
    monkeypatch.setattr(hosts, "count", lambda: 2)
    config = tiny_config()
    hosts.check_settings(config)
    change(config)
    with pytest.raises(ConfigError, match=rf"config\.{re.escape(field)} = .*hosts"):
        hosts.check_settings(config)
