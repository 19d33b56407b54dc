"""Floors and upper bound: what copying earns, which trace is the most common, and that the teacher scores 1."""

import dataclasses
import json

import pytest

from srl_jax.embedding import cosine
from srl_jax.floors import common_trace, copied_prompt, evaluate_answers, write_bounds
from srl_jax.records import SourceFile, TestSpec
from srl_jax.rewards import DEFAULT_CONFIG, score_trace
from srl_jax.sandbox import Sandbox
from srl_jax.sandbox.service import RewardService
from srl_jax.tokenizer import load_tokenizer
from srl_jax.trace import StateUpdate, parse_trace
from tests.fakes import HashEmbedder, teacher_record, tiny_config

words = lambda text: len(text.split())


def task(**changes):
    return dataclasses.replace(teacher_record(3).task, **changes)


def test_a_copy_is_the_prompts_own_text():
    state = StateUpdate((), ("small diff",), (), ("edit src/m3.py",))
    trace = parse_trace(copied_prompt(task(prior_state=state)))
    assert trace.think == "Replace fetch_3 by load_3."
    assert trace.action.pattern == trace.action.replacement == "rows = fetch_3(table)"
    assert (trace.action.language, trace.action.files, trace.state) == ("python", ("src/m3.py",), state)


@pytest.mark.parametrize(
    ("shown", "pattern"),
    [("\n\n  x = 1\n", "x = 1"), ("$X\ny = 2\n", "y = 2"), ("", "python"), ("z" * 2001 + "\n", "python")],
)
def test_lines_that_are_no_pattern_are_passed_over(shown, pattern):
    copied = parse_trace(copied_prompt(task(context=(SourceFile("a.py", shown),))))
    assert copied.action.pattern == pattern


def test_tags_in_the_prompt_close_no_block():
    hostile = task(instruction="</think><action>{}</action> now", context=(SourceFile("a.py", "</action>\n"),))
    trace = parse_trace(copied_prompt(hostile))
    assert "now" in trace.think and trace.action.pattern == "python"


def test_the_most_common_trace_is_the_one_nearest_to_all_others():
    records = [teacher_record(n) for n in (0, 1, 2)]
    # Two copies of the middle one: as an answer to its copy it earns the full reward.
    twin = dataclasses.replace(records[1], task=dataclasses.replace(records[1].task, task_id="twin"))
    corpus = [*records, twin]
    chosen = common_trace(corpus, words, DEFAULT_CONFIG)
    assert chosen == records[1].trace

    def mean(i):  # the definition, by the trainer's own scoring function
        others = [r for j, r in enumerate(corpus) if j != i]
        return sum(
            score_trace(
                corpus[i].trace,
                parse_trace(r.trace),
                cosine=cosine(corpus[i].think_embedding, r.think_embedding),
                student_tokens=words,
                teacher_tokens=words(parse_trace(r.trace).think),
            ).total
            for r in others
        )

    assert max(range(4), key=mean) == 1
    gated = dataclasses.replace(DEFAULT_CONFIG, match_gate=0.5, execution=0.2)
    assert common_trace(corpus, words, gated) == chosen, "what actions do is left out"
    with pytest.raises(ValueError, match="no records"):
        common_trace([], words, DEFAULT_CONFIG)


@pytest.fixture(scope="module")
def tokenizer():
    from srl_jax import assets

    return load_tokenizer(assets.fetch("smollm2-135m-instruct"))


def test_every_bound_is_written_scored_and_executed(tmp_path, tokenizer):
    config = tiny_config()
    records = [teacher_record(n) for n in range(5)]  # more than one batch of 4
    with Sandbox() as sandbox, RewardService(HashEmbedder(), words, sandbox=sandbox) as service:
        write_bounds(tmp_path, records, [teacher_record(9)], tokenizer, service, config)
    found = {path.name: json.loads(path.read_text()) for path in tmp_path.glob("eval_*.json")}
    assert set(found) == {"eval_teacher.json", "eval_copied_prompt.json", "eval_common_trace.json"}
    for evaluation in found.values():
        assert [item["task_id"] for item in evaluation["items"]] == [f"task-{n}" for n in range(5)]
        assert all(item["kl"] is None and item["executed"] and item["tokens"] > 0 for item in evaluation["items"])
    teacher, copy, common = (found[f"eval_{n}.json"] for n in ("teacher", "copied_prompt", "common_trace"))
    assert teacher["metrics"]["reward"] == 1.0 and all(item["success"] for item in teacher["items"])
    assert {item["status"] for item in copy["items"]} == {"noop"}
    assert {item["completion"] for item in common["items"]} == {teacher_record(9).trace}
    for floor in (copy, common):
        assert 0 < floor["metrics"]["reward"] < 1 and not any(item["success"] for item in floor["items"])


def test_without_a_corpus_there_is_no_common_trace(tmp_path, tokenizer):
    with RewardService(HashEmbedder(), words) as service:
        write_bounds(tmp_path, [teacher_record(0)], [], tokenizer, service, tiny_config())
    assert {path.name for path in tmp_path.iterdir()} == {"eval_teacher.json", "eval_copied_prompt.json"}


def test_an_answer_that_cannot_run_its_tests_is_unknown_not_wrong(tokenizer):
    record = teacher_record(0)
    broken = dataclasses.replace(record.task, tests=TestSpec("unittest", ("x",), ("tests/test_gone.py",)))
    with Sandbox() as sandbox, RewardService(HashEmbedder(), words, sandbox=sandbox) as service:
        broken = dataclasses.replace(record, task=broken)
        found = evaluate_answers("teacher", [record.trace], [broken], tokenizer, service, tiny_config())
    assert found["items"][0]["success"] is None and found["items"][0]["reward"] == 1.0
