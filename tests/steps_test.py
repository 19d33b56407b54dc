"""The loop around a step: several updates, broken batches, the best state, early ends, and a run repeated."""

import json
import re
import shutil
import time
from importlib import resources

import jax
import numpy as np
import pytest

from srl_jax import steps, train
from srl_jax.config import ConfigError, NotARun
from srl_jax.control import ControlState, Diverged
from srl_jax.environment import check_same
from srl_jax.metrics import _ROWS, HISTOGRAMS_FILE, read_metrics
from srl_jax.reproduce import recorded_environment, verdict
from srl_jax.run import Run
from srl_jax.steps import take_step
from srl_jax.student import Student
from tests.fakes import CountingStream, teacher_record, tiny_config

HELD_OUT = [teacher_record(number) for number in (20, 21)]


def small(**changes):
    config = tiny_config()
    config.steps, config.eval.max_tasks, config.eval.batch_size = 4, 2, 2
    config.data.prompts_per_step, config.grpo.micro_batch, config.grpo.group_size = 2, 1, 2
    config.checkpoint.every = 2
    for path, value in changes.items():
        section, name = path.split("__")
        setattr(config.__dict__[section], name, value)
    return config


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    config = small(eval__every=1, eval__split="dev", control__keep_best=True, replay__record=True)
    config.control.kl_target = 1e-6
    assert train.train(config, workdir, CountingStream(), HELD_OUT)
    return config, workdir


def test_a_run_shows_what_it_does(whole):
    _, workdir = whole
    metrics = read_metrics(workdir)
    assert [m["step"] for m in metrics] == [1, 2, 3, 4]
    timed = ("seconds/checkpoint", "seconds/record", "seconds/data_wait")
    for name in ("kl_coef", "model_tflops", "compiles", *timed, "clip_low", "entropy"):
        assert all(m[name] is not None and np.isfinite(m[name]) for m in metrics), name
    page = resources.files("srl_jax").joinpath("page.html").read_text(encoding="utf-8")
    shown = {*re.findall(r'"(seconds/[a-z_]+)"', page), *(name for _, names, _ in _ROWS for name in names)}
    assert shown <= metrics[0].keys() and len(shown) > 15, "what the page and the live view look for is measured"
    assert metrics[0]["compiles"] > 0
    assert metrics[-1]["kl_coef"] > metrics[0]["kl_coef"] == 0.05, "a KL over its target raises lambda"
    histograms = read_metrics(workdir, HISTOGRAMS_FILE)
    assert all(sum(h["reward/total"]["counts"]) == 4 for h in histograms)
    assert len(list((workdir / "replay").glob("*.arrayrecord"))) == 4
    assert "Storing their rollouts took " in (workdir / "report.md").read_text()
    environment = recorded_environment(workdir)
    assert len(environment["base_weights"]) == len(environment["tokenizer"]) == len(environment["data"]) == 64


def test_the_best_state_is_kept_and_is_the_student(whole):
    config, workdir = whole
    reward = lambda name: json.loads((workdir / f"eval_{name}.json").read_text())["metrics"]["reward"]
    rewards = {step: reward(f"step{step}") for step in (1, 2, 3, 4)}
    best = max(rewards, key=lambda step: (rewards[step], -step))
    assert [path.name for path in (workdir / "best").iterdir()] == [str(best)]
    assert reward("student") == pytest.approx(rewards[best], abs=1e-6)
    with Run(config, workdir, read_only=True) as run:
        assert run.resume()[0] == best
    with Run(config, workdir) as run:
        assert run.resume()[0] == 4 and run.control.best_step == best


def test_a_run_can_be_repeated_by_its_directory(whole, tmp_path):
    config, workdir = whole
    assert train.train(config, tmp_path / "again", CountingStream(), HELD_OUT, repeats=workdir)
    same, line = verdict(workdir, tmp_path / "again")
    assert same and "4 steps and the last checkpoint" in line
    other = tmp_path / "other"
    shutil.copytree(workdir, other)
    lines = (other / "metrics.jsonl").read_text().splitlines()
    lines[2] = json.dumps({**json.loads(lines[2]), "loss": 0.5})
    (other / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert verdict(other, tmp_path / "again")[1].startswith("not reproduced: loss of step 3 is ")
    now = recorded_environment(workdir)
    assert check_same({**now, "commit": "beef", "packages": {**now["packages"], "jax": "0.1"}}, now, workdir) == [
        f"commit was beef, here {now['commit']}", f"jax was 0.1, here {now['packages']['jax']}",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="cannot be repeated here: its data was beef"):
        check_same({**now, "data": "beef"}, now, workdir)
    with pytest.raises(NotARun, match="no environment record"):
        recorded_environment(tmp_path)


def test_a_base_that_another_run_evaluated_is_taken_where_it_would_be_the_same(whole, tmp_path, monkeypatch):
    evaluated = []
    real = train.evaluate
    monkeypatch.setattr(
        train, "evaluate", lambda *given, name, **rest: evaluated.append(name) or real(*given, name=name, **rest)
    )
    alike = small(eval__every=1, eval__split="dev", optim__learning_rate=0.02)
    other = small(eval__every=1, eval__split="dev", reward__think_weight=0.1)
    for name, config in (("alike", alike), ("other", other)):
        config.steps = 1
        (tmp_path / name).mkdir()
        shutil.copy(whole[1] / "eval_base.json", tmp_path / name)  # as a sweep does between its cells
        assert train.train(config, tmp_path / name, CountingStream(), HELD_OUT)
    assert evaluated == ["student", "base", "student"]
    told = [(tmp_path / name / "eval_base.json").read_bytes() for name in ("alike", "other")]
    assert told[0] == (whole[1] / "eval_base.json").read_bytes() != told[1]


def test_updates_that_stay_broken_end_the_run_and_it_goes_on_afterwards(tmp_path, monkeypatch):
    config = small(control__max_broken_updates=2, grpo__dynamic_sampling_min_std=0.0)
    real = steps.train_step

    def poisoned(state, params, automaton, batch, *rest, **options):
        if int(state.step) >= 1:
            batch = batch._replace(advantages=batch.advantages * np.nan)
        return real(state, params, automaton, batch, *rest, **options)

    monkeypatch.setattr(steps, "train_step", poisoned)
    with pytest.raises(Diverged, match=r"2 steps in a row had only updates of a non-finite loss or gradient.*broken"):
        train.train(config, tmp_path / "run", CountingStream(), HELD_OUT)
    assert sorted(path.name for path in (tmp_path / "run" / "broken").iterdir()) == ["step2.npz", "step3.npz"]
    with np.load(tmp_path / "run" / "broken" / "step2.npz") as dump:
        assert np.isnan(dump["['batch']['advantages']"]).any() or "['batch']['completions']" in dump
    monkeypatch.setattr(steps, "train_step", real)
    assert train.train(config, tmp_path / "run", CountingStream(), HELD_OUT)
    metrics = read_metrics(tmp_path / "run")
    assert [m["skipped"] for m in metrics] == [0.0, 1.0, 1.0, 0.0]
    # The schedule counts the updates that were made, and what is logged is the rate in use.
    rates = [m["learning_rate"] for m in metrics]
    assert rates[1] == rates[2] == rates[3] < rates[0]


@pytest.mark.parametrize("cap", [0.0, 2.0])
def test_a_sampler_without_the_adapters_ends_the_run_and_it_goes_on_when_they_are_back(tmp_path, monkeypatch, cap):
    config = small(control__gap_stop=1e-3, control__gap_steps=2, grpo__baseline="none", grpo__importance_cap=cap)
    real = Student.sampling_variables
    monkeypatch.setattr(Student, "sampling_variables", lambda self, lora: {"params": self.params})
    with pytest.raises(Diverged, match=r"for 2 steps in a row the sampler's log-probs were not the trainer's"):
        train.train(config, tmp_path / "run", CountingStream(), HELD_OUT)
    gaps = [m["logprob_gap"] for m in read_metrics(tmp_path / "run")]
    assert gaps[0] < 1e-5, "fresh adapters change nothing"
    assert len(gaps) == 3 and min(gaps[1:]) > 1e-3
    monkeypatch.setattr(Student, "sampling_variables", real)
    assert train.train(config, tmp_path / "run", CountingStream(), HELD_OUT)
    metrics = read_metrics(tmp_path / "run")
    assert [m["step"] for m in metrics] == [1, 2, 3, 4] and metrics[3]["logprob_gap"] < 1e-5


def test_a_kl_that_runs_away_ends_training_and_the_student_is_judged(tmp_path):
    config = small(control__kl_stop=1e-7)
    assert train.train(config, tmp_path / "run", CountingStream(), HELD_OUT)
    done = len(read_metrics(tmp_path / "run"))
    assert 0 < done < 4 and (tmp_path / "run" / "report.md").exists()
    assert train.train(config, tmp_path / "run", CountingStream(), HELD_OUT), "and stays ended"
    assert len(read_metrics(tmp_path / "run")) == done


class Slow(CountingStream):
    """A loader that is not ahead of the run."""

    def __next__(self):
        time.sleep(0.05)
        return super().__next__()


def test_several_updates_a_rollout_go_off_policy_and_are_all_counted(tmp_path):
    config = small(grpo__epochs=2, grpo__mini_batches=2, grpo__dynamic_sampling_min_std=0.0)
    with Run(config, tmp_path / "run") as run:
        before = jax.tree.map(np.array, run.state.lora)
        done = take_step(run, Slow(), 0, None)
        assert 0.1 <= done.metrics["seconds/data_wait"] < done.metrics["seconds/step"], "two records a step"
        assert int(run.state.step) == 4 and done.metrics["skipped"] == 0
        assert done.metrics["logprob_gap"] < 1e-4, "of the first update, which is on policy"
        assert float(run.rates(0)) > float(run.rates(8)) > 0 == float(run.rates(16)), "the schedule spans 4 * 4 updates"
        same = jax.tree.map(np.array_equal, before, jax.tree.map(np.asarray, run.state.lora))
        assert not all(jax.tree.leaves(same)) and run.control != ControlState()
