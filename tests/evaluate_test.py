"""The report's numbers: which tasks are taken, short batches, the base's KL, what execution says."""

import json

import numpy as np
import pytest

from srl_jax.evaluate import NothingToEvaluate, evaluate, evaluated_before, fitting_tasks
from srl_jax.evaluation import write_json
from srl_jax.report import write_report
from srl_jax.sandbox.service import RewardService
from srl_jax.trace import parse_trace
from tests.fakes import HashEmbedder, perturbed, teacher_record, tiny_config, tiny_student

RECORDS = [teacher_record(number, ("python/generated", "python/real")[number % 3 == 0]) for number in range(9)]


@pytest.fixture(scope="module")
def student():
    return tiny_student()


@pytest.fixture(scope="module")
def service(student):
    with RewardService(HashEmbedder(), lambda text: len(student.tokenizer.encode_text(text))) as opened:
        yield opened


def run(student, lora, service, records, name="student", batch_size=4):
    config = tiny_config()
    config.eval.batch_size = batch_size
    seen = []
    result = evaluate(student, lora, records, service, config, name=name, advance=seen.append)
    assert sum(seen) == len(records)
    return result


def test_slices_take_turns_up_to_the_limit(student):
    config = tiny_config()
    config.eval.max_tasks = 5
    chosen = fitting_tasks(student, RECORDS, config)
    assert [r.task.slice for r in chosen] == ["python/generated", "python/real"] * 2 + ["python/generated"]
    assert [r.task.task_id for r in chosen] == ["task-1", "task-0", "task-2", "task-3", "task-4"]
    config.eval.max_tasks = 100
    every = fitting_tasks(student, RECORDS, config)
    assert sorted(r.task.task_id for r in every) == sorted(r.task.task_id for r in RECORDS)


def test_what_cannot_be_evaluated_is_left_out_with_a_notice(student):
    config, notes = tiny_config(), []
    needs_node = teacher_record(20, tests="node")
    chosen = fitting_tasks(student, [*RECORDS, needs_node], config, runners=frozenset({"unittest"}), note=notes.append)
    assert needs_node not in chosen
    assert notes == ["notice: 1 of 10 held-out tasks left out: their tests need node, which this machine lacks"]
    assert fitting_tasks(student, [needs_node], config, note=notes.append) == [needs_node], "nothing is executed"
    assert len(notes) == 1
    with pytest.raises(NothingToEvaluate, match=r"none of the 1 held-out tasks .* need node"):
        fitting_tasks(student, [needs_node], config, runners=frozenset())
    config.data.max_prompt_tokens = 10
    with pytest.raises(NothingToEvaluate, match=r"none of the 9 .* prompts exceed data.max_prompt_tokens=10"):
        fitting_tasks(student, RECORDS, config)


def test_the_base_has_a_kl_of_exactly_zero_and_adapters_have_not(student, service):
    base = run(student, None, service, RECORDS[:4], name="base")
    fresh = run(student, student.fresh_lora(0), service, RECORDS[:4])
    moved = run(student, perturbed(student.fresh_lora(0)), service, RECORDS[:4])
    assert all(item["kl"] == 0.0 for item in base["items"])
    assert all(abs(item["kl"]) < 1e-5 for item in fresh["items"])
    assert [item["completion"] for item in fresh["items"]] == [item["completion"] for item in base["items"]]
    assert all(abs(item["kl"]) > 1e-3 for item in moved["items"])
    assert base["name"] == "base" and base["config"] == moved["config"]


def test_a_short_last_batch_changes_nothing(student, service):
    lora = perturbed(student.fresh_lora(0))
    whole = run(student, lora, service, RECORDS[:6], batch_size=6)
    split = run(student, lora, service, RECORDS[:6], batch_size=4)
    assert len(split["items"]) == 6
    for one, other in zip(whole["items"], split["items"], strict=True):
        assert one["completion"] == other["completion"] and one["task_id"] == other["task_id"]
        assert one["kl"] == pytest.approx(other["kl"], abs=1e-5)
    assert split["metrics"]["tasks"] == 6 and split["metrics"]["parse_rate"] == 1.0
    assert split["metrics"]["reward"] == pytest.approx(np.mean([item["reward"] for item in split["items"]]))
    for item, record in zip(split["items"], RECORDS, strict=False):
        parse_trace(item["completion"])
        assert item["teacher"] == record.trace and record.task.instruction in item["prompt"]
        assert item["success"] is None and not item["executed"]


def test_a_perfect_answer_scores_one(student, service, monkeypatch):
    """The teacher's own text through the same path: reward 1, all components 1."""
    record = RECORDS[1]
    answer = lambda student, tokens, mask: [record.trace] * len(tokens)
    monkeypatch.setattr("srl_jax.rollout.decode_completions", answer)
    (item,) = run(student, None, service, [record], batch_size=4)["items"]
    assert (item["reward"], item["action"], item["state"], item["think"], item["brevity"]) == (1.0, 1.0, 1.0, 1.0, 0.0)
    assert item["rejection"] is None and item["think_tokens"] > 0


@pytest.mark.parametrize(("execute", "success"), [(False, None), (True, False)])
def test_a_malformed_answer_fails_only_where_answers_are_executed(student, service, monkeypatch, execute, success):
    monkeypatch.setattr("srl_jax.rollout.decode_completions", lambda student, tokens, mask: ["no trace"] * len(tokens))
    config = tiny_config()
    config.eval.execute = execute
    result = evaluate(student, None, RECORDS[:1], service, config, name="base")
    (item,) = result["items"]
    assert item["rejection"] == "missing_tag" and item["reward"] == -0.2 and item["action"] is None
    assert item["success"] is success
    assert result["metrics"]["parse_rate"] == 0.0


def test_an_evaluation_is_reused_only_for_the_same_tasks_and_settings(student, service, tmp_path):
    path, config = tmp_path / "eval_base.json", tiny_config()
    assert not evaluated_before(path, RECORDS[:4], config)
    write_json(path, run(student, None, service, RECORDS[:4], name="base"))
    assert evaluated_before(path, RECORDS[:4], config)
    assert not evaluated_before(path, RECORDS[:3], config)
    config.optim.learning_rate *= 2
    assert evaluated_before(path, RECORDS[:4], config), "the base does not depend on how the student is trained"
    config.sampling.max_think_tokens += 1
    assert not evaluated_before(path, RECORDS[:4], config)


def test_its_files_make_a_report(student, service, tmp_path):
    for name, lora in (("base", None), ("student", perturbed(student.fresh_lora(0)))):
        write_json(tmp_path / f"eval_{name}.json", run(student, lora, service, RECORDS[:4], name=name))
    assert json.loads((tmp_path / "eval_base.json").read_text())["metrics"]["tasks"] == 4
    assert "Held-out reward" in write_report(tmp_path).read_text()
