"""Sweeps: planned whole before any work, resumable, failures shown; and the real trainer as one cell's process."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from srl_jax.sweep import Sweep, SweepError, load_recipe, plan, run_jobs
from srl_jax.sweep_report import write_sweep_report
from tests.report_test import item, table_row

ROOT = Path(__file__).parents[1]
TINY = str(ROOT / "configs" / "tiny.py")

# Stands for launch/train.py: same flags, exit codes and files. A cell of kl_coef 0.9 crashes until `heal` exists.
TRAINER = """
import ast, json, pathlib, signal, sys, time
flags = dict(argument.removeprefix("--").split("=", 1) for argument in sys.argv[1:])
workdir = pathlib.Path(flags["workdir"])
texts = [n.value for n in ast.walk(ast.parse(open(flags["config"]).read())) if isinstance(n, ast.Constant)]
kl_coef = json.loads(next(text for text in texts if str(text).startswith("{")))["grpo"]["kl_coef"]
(workdir / "tries").open("a").write("x")
if kl_coef == 0.9 and not (workdir.parents[1] / "heal").exists():
    print("Traceback ...\\nValueError: boom")
    sys.exit(1)
if kl_coef == 0.8:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
    (workdir / "waiting").touch()
    time.sleep(60)
for name, gain in (("base", 0.0), ("student", kl_coef)):
    items = json.loads(pathlib.Path(__file__).with_name("items.json").read_text())
    items = [{**item, "reward": item["reward"] + gain} for item in items]
    (workdir / f"eval_{name}.json").write_text(json.dumps({"items": items}))
"""


@pytest.fixture
def trainer(tmp_path):
    path = tmp_path / "train.py"
    path.write_text(TRAINER)
    (tmp_path / "items.json").write_text(json.dumps([item(n, 0.2 + n / 100) for n in range(10)]))
    return [sys.executable, str(path)]


def sweep(**changes):
    values = {"base": TINY, "cells": {"a": {}, "b": {"grpo.kl_coef": 0.25}}, "seeds": (0, 1)}
    return Sweep(**{**values, **changes})


def tries(jobs):
    return [len((job.workdir / "tries").read_text()) for job in jobs]


class TestPlan:
    def test_every_cell_once_before_any_twice(self, tmp_path):
        jobs = plan(sweep(overrides={"steps": 7, "grpo.kl_coef": 0.1}), tmp_path)
        assert [(job.cell, job.seed) for job in jobs] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
        assert [job.config.grpo.kl_coef for job in jobs[:2]] == [0.1, 0.25]
        assert all(job.config.steps == 7 and job.config.seed == job.seed for job in jobs)
        assert jobs[3].workdir == tmp_path / "b" / "seed1" and not list(tmp_path.iterdir())

    def test_a_smaller_one_by_flags(self, tmp_path):
        changes = ["steps=7", "model.quantize=bfloat16", "grpo.kl_coef=0.1"]
        jobs = plan(sweep(overrides={"steps": 9}), tmp_path, seeds=[4], overrides=changes)
        assert [(job.cell, job.seed, job.config.steps, job.config.grpo.kl_coef) for job in jobs] == [
            ("a", 4, 7, 0.1), ("b", 4, 7, 0.25)
        ]  # fmt: skip
        assert all(job.config.model.quantize == "bfloat16" for job in jobs)

    def test_some_cells_in_the_order_given(self, tmp_path):
        jobs = plan(sweep(overrides={"grpo.kl_coef": 0.1}), tmp_path, seeds=[0], cells=["b", "a"])
        assert [(job.cell, job.config.grpo.kl_coef) for job in jobs] == [("b", 0.25), ("a", 0.1)]
        with pytest.raises(SweepError, match="cell 'c': not in the sweep, which has a, b"):
            plan(sweep(), tmp_path, cells=["a", "c"])

    @pytest.mark.parametrize("override", ["steps", "steps=", "=7", "stepss=7", "steps=many", "steps=-1"])
    def test_a_wrong_override_is_one_error(self, tmp_path, override):
        with pytest.raises(SweepError, match=r"step|=7"):
            plan(sweep(), tmp_path, overrides=[override])

    def test_a_cells_recipe_is_its_whole_configuration(self, tmp_path):
        changes = {"data.slice_weights": {"python/real": 1.0}, "model.source": "a'\"\\n"}
        [job, *_] = plan(sweep(cells={"x": changes}), tmp_path)
        (tmp_path / "recipe.py").write_text(job.recipe)
        assert load_recipe(tmp_path / "recipe.py") == job.config

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"cells": {"bad": {"grpo.kl_coeff": 1}}}, "cell 'bad'.*kl_coeff"),
            ({"cells": {"bad": {"gro.kl_coef": 1}}}, "cell 'bad'.*gro is no section"),
            ({"cells": {"bad": {"grpo.kl_coef": -1.0}}}, "cell 'bad'.*kl_coef.*at least 0"),
            ({"cells": {"../up": {}}}, "names are directories"),
            ({"cells": {}}, "at least one cell"),
            ({"seeds": ()}, "at least one"),
            ({"seeds": (1, 1)}, "one twice"),
            ({"base": "gone.py"}, "gone.py: no such file"),
        ],
    )
    def test_mistakes_come_before_any_work(self, tmp_path, changes, message):
        with pytest.raises(SweepError, match=message):
            plan(sweep(**changes), tmp_path)
        assert not list(tmp_path.iterdir())

    def test_a_recipe_is_no_sweep(self, tmp_path):
        with pytest.raises(SweepError, match=r"must return a srl_jax.sweep.Sweep, not TrainConfig"):
            plan(load_recipe(Path(TINY)), tmp_path)

    @pytest.mark.parametrize("name", ["ablations", "languages", "teacher"])
    def test_the_shipped_sweeps_are_valid(self, tmp_path, monkeypatch, name):
        monkeypatch.chdir(ROOT)
        jobs = plan(load_recipe(ROOT / "configs" / f"sweep_{name}.py"), tmp_path)
        assert len({job.recipe for job in jobs}) == len(jobs)

    def test_the_teachers_temperature_is_the_one_number_that_its_sweep_changes(self):
        text = (ROOT / "configs" / "teacher.yaml").read_text()
        assert text.count("temperature: 0.3") == 1
        assert "temperature: 0.3/temperature: $t" in (ROOT / "configs" / "sweep_teacher.py").read_text()

    def test_python_only_trains_on_slices_that_its_data_set_has(self, tmp_path, monkeypatch):
        monkeypatch.chdir(ROOT)
        data = load_recipe(ROOT / "configs" / "data_languages.py")
        cells = load_recipe(ROOT / "configs" / "sweep_languages.py").cells
        kinds = {"generated": True, "real": data.real_share > 0, "episodes": data.episode_share > 0}
        assert set(cells["python_only"]["data.slice_weights"]) == {
            f"python/{kind}" for kind, used in kinds.items() if used
        }
        assert {"javascript", "java"} <= set(data.languages)


def test_what_is_done_is_not_done_again_and_what_failed_is_tried_again(tmp_path, trainer):
    out = tmp_path / "out"
    jobs = plan(sweep(cells={"a": {}, "b": {"grpo.kl_coef": 0.25}, "bad": {"grpo.kl_coef": 0.9}}), out)
    notes = []
    assert run_jobs(jobs, trainer, parallel=2, note=notes.append)
    assert [job.status["state"] for job in jobs] == ["done", "done", "failed"] * 2
    assert any("bad, seed 0: failed" in note and "ValueError: boom" in note for note in notes)
    text = write_sweep_report(jobs, out).read_text()
    # Students gain kl_coef (0.05 in `a`) on base rewards of mean .245; every task gains alike.
    assert table_row(text, "`a`")[:4] == ["2 of 2", *table_row(text, "`a`")[1:2], "0.050 [0.050, 0.050]", "reference"]
    assert table_row(text, "`a`")[1].startswith("0.295 [")
    assert table_row(text, "`b`")[2:4] == ["0.250 [0.250, 0.250]", "0.200 [0.200, 0.200]"]
    assert table_row(text, "`bad`") == ["0 of 2", "-", "-", "-", "-", "-"]
    measures, by_slice = text.split("## By measure")[1].split("## Reward by slice")
    assert (
        "| answers | R_action | R_state | R_think | parse rate | match-set F1 | mean reward of each seed |" in measures
    )
    assert table_row(measures, "`b`")[-1] == "0.495, 0.495" and table_row(measures, "base of `a`")[-1] == "0.245, 0.245"
    assert table_row(measures, "`b`")[3] == "1.000 [1.000, 1.000]" and "copied_prompt" not in measures
    assert "| cell | <code>javascript</code> | <code>python</code> |" in by_slice
    # Even tasks are JavaScript: .20, .22 ... .28, and odd ones Python: .21 ... .29; `a` adds .05, `b` .25.
    assert [cell[:7] for cell in table_row(by_slice, "`a`")] == ["0.290 [", "0.300 ["]
    assert [cell[:7] for cell in table_row(by_slice, "`b`")] == ["0.490 [", "0.500 ["]
    assert table_row(by_slice, "`bad`") == ["-", "-"]
    assert "- `bad`, seed 1: **failed** with exit code 1: `ValueError: boom`" in text
    assert (out / "plots" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    (out / "heal").touch()
    assert run_jobs(plan(sweep(cells={"a": {}, "bad": {"grpo.kl_coef": 0.9}}), out), trainer, parallel=1, note=print)
    assert tries(jobs) == [1, 1, 2] * 2 and "Every cell is done." in write_sweep_report(jobs, out).read_text()


def test_a_changed_cell_does_not_mix_with_what_it_was(tmp_path, trainer):
    run_jobs(plan(sweep(cells={"a": {}}), tmp_path), trainer, parallel=1, note=print)
    with pytest.raises(SweepError, match=r"another configuration.*delete that directory"):
        plan(sweep(cells={"a": {"steps": 9}}), tmp_path)


def test_a_signal_lets_the_running_save_and_starts_no_other(tmp_path, trainer):
    slow = sweep(cells={"slow": {"grpo.kl_coef": 0.8}, "never": {}}, seeds=(0,))
    jobs = plan(slow, tmp_path)

    def interrupt():
        while not (jobs[0].workdir / "waiting").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert not run_jobs(jobs, trainer, parallel=1, note=print)
    thread.join()
    assert [job.status["state"] for job in jobs] == ["stopped", "missing"]
    assert "`slow`, seed 0: stopped" in write_sweep_report(jobs, tmp_path).read_text()


def test_runs_share_the_devices_out(tmp_path):
    show = tmp_path / "show.py"
    show.write_text("import os, time; time.sleep(0.5); print(os.environ['CUDA_VISIBLE_DEVICES'])")
    jobs = plan(sweep(), tmp_path / "out")
    run_jobs(jobs, [sys.executable, str(show)], parallel=2, devices=["4", "7"], note=print)
    assert {(job.workdir / "log.txt").read_text().strip() for job in jobs} == {"4", "7"}


def test_the_base_is_evaluated_once_for_cells_that_share_it(tmp_path, trainer):
    cells = {"a": {}, "bad": {"grpo.kl_coef": 0.9}, "b": {"grpo.kl_coef": 0.25}, "c": {"reward.think_weight": 0.1}}
    jobs = plan(sweep(cells=cells), tmp_path)
    notes = []
    run_jobs(jobs, trainer, parallel=1, note=notes.append)
    assert [note for note in notes if "base" in note] == [
        *(f"{cell}, seed 0: its base is that of a, already evaluated" for cell in ("bad", "b")),
        *(f"{cell}, seed 1: its base is that of a, already evaluated" for cell in ("a", "bad", "b")),
        "c, seed 1: its base is that of c, already evaluated",
    ]


def test_the_real_trainer_fails_by_its_own_words(tmp_path):
    [job] = plan(sweep(cells={"a": {"data.dir": str(tmp_path / "nothing")}}, seeds=(0,)), tmp_path / "out")
    run_jobs([job], [sys.executable, str(ROOT / "launch" / "train.py")], parallel=1, note=print)
    assert job.status["state"] == "failed" and job.status["code"] == 2
    assert "is not a data set" in job.status["said"]
