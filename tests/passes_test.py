"""Further passes: samples with and without the grammar, gone on with after a break; a whole run's evaluation."""

import dataclasses
import json

import pytest

from srl_jax import evaluate as greedy_evaluation
from srl_jax.checkpoint import CheckpointError
from srl_jax.evaluate import answer_groups, evaluate
from srl_jax.evaluate_run import evaluate_run
from srl_jax.evaluation import write_json
from srl_jax.passes import Passes, add_answers
from srl_jax.report import load_evaluation
from srl_jax.run import Run
from srl_jax.sandbox.service import RewardService
from srl_jax.trace import parse_trace
from tests.episodes_test import an_episode
from tests.fakes import HashEmbedder, perturbed, teacher_record, tiny_config

RECORDS = [teacher_record(number) for number in range(6)]


def config_of_two():
    config = tiny_config()
    config.eval.batch_size = 2  # two rows at once, so four batches of two for samples of two
    return config


@pytest.fixture(scope="module")
def service(student):
    with RewardService(HashEmbedder(), lambda text: len(student.tokenizer.encode_text(text))) as opened:
        yield opened


@pytest.fixture(scope="module")
def alone(student, lora, service):
    """The greedy evaluation, as JSON, to be loaded anew by every test."""
    return json.dumps(evaluate(student, lora, RECORDS, service, config_of_two(), name="student"))


@pytest.fixture
def add(student, lora, service, alone, tmp_path):
    path = tmp_path / "eval_student.json"

    def run(kind, count, evaluation=None, **options):
        evaluation = json.loads(alone) if evaluation is None else evaluation
        given = (student, lora, RECORDS, service, config_of_two())
        add_answers(path, evaluation, kind, *given, count=count, **options)
        return evaluation

    run.path = path
    return run


def test_samples_parse_differ_and_have_a_kl_of_their_own(add):
    evaluation = add("sampled", 3)
    assert load_evaluation(add.path) == evaluation
    for item in evaluation["items"]:
        assert len(item["sampled"]) == 3 and len({answer["completion"] for answer in item["sampled"]}) > 1
        for answer in item["sampled"]:
            parse_trace(answer["completion"])
            assert answer["rejection"] is None and answer["kl"] != 0.0 and -0.2 <= answer["reward"] <= 1.0
    took = evaluation["passes"]["sampled"]
    assert took["count"] == 3 and took["seconds"] > 0 and {"rollout", "reference"} <= took["seconds_by_part"].keys()
    assert "free" not in evaluation["items"][0]


@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_adapters_that_change_nothing_have_no_kl_at_any_temperature(student, service, tmp_path, temperature):
    warm = dataclasses.replace(student, sampling=dataclasses.replace(student.sampling, temperature=temperature))
    fresh = student.fresh_lora(0)
    evaluation = evaluate(student, fresh, RECORDS[:2], service, config_of_two(), name="student")
    path = tmp_path / "eval_student.json"
    add_answers(path, evaluation, "sampled", warm, fresh, RECORDS[:2], service, config_of_two(), count=2)
    ratios = [answer["kl"] for item in evaluation["items"] for answer in item["sampled"]]
    assert max(map(abs, ratios)) < 1e-4, ratios


def test_without_the_grammar_a_random_model_writes_no_trace(add):
    evaluation = add("free", 2)
    answers = [answer for item in evaluation["items"] for answer in item["free"]]
    assert len(answers) == 12
    assert all(answer["rejection"] and answer["reward"] == -0.2 and answer["kl"] is None for answer in answers)
    assert all(item["rejection"] is None for item in evaluation["items"]), "the greedy answers keep their own"


def test_an_interrupted_pass_goes_on_and_ends_as_if_it_had_not_been(add):
    whole = add("sampled", 2)
    seen = []

    def interrupt(count):
        seen.append(count)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        add("sampled", 2, advance=interrupt)
    cut = load_evaluation(add.path)
    done = sum("sampled" in item for item in cut["items"])
    assert 0 < done < len(RECORDS)
    rest = []
    resumed = add("sampled", 2, cut, advance=rest.append)
    assert rest[0] == done and sum(rest) == len(RECORDS)
    assert [item["sampled"] for item in resumed["items"]] == [item["sampled"] for item in whole["items"]]


def test_what_is_done_is_not_done_again_and_another_count_starts_anew(add, monkeypatch):
    evaluation = add("sampled", 2)
    sampled = greedy_evaluation.sample_groups

    def refuse(*arguments, **options):
        raise AssertionError("sampled again")

    monkeypatch.setattr(greedy_evaluation, "sample_groups", refuse)
    add("sampled", 2, evaluation)
    monkeypatch.setattr(greedy_evaluation, "sample_groups", sampled)
    assert {len(item["sampled"]) for item in add("sampled", 3, evaluation)["items"]} == {3}


@pytest.mark.parametrize(("group_size", "like"), [(1, 0), (2, 0), (1, 6)])
def test_every_record_gets_its_group_once(student, service, group_size, like):
    records = RECORDS[:5]
    found = list(answer_groups(student, None, records, service, config_of_two(), group_size=group_size, like=like))
    assert [record for groups, _ in found for record in groups.records] == records
    assert all(len(texts) == group_size for groups, _ in found for texts in groups.texts)
    assert all(took["rollout"] > 0 for _, took in found)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    config = tiny_config()
    with Run(config, path) as run:
        run.state = run.state._replace(lora=perturbed(run.state.lora))
        run.save(1, {})
        run.wait()
    return path


def test_one_command_gives_one_table_and_the_second_time_repeats_nothing(workdir, tmp_path, monkeypatch):
    config = tiny_config()
    config.eval.max_tasks = 3
    held_out = [*RECORDS[:3], *an_episode(steps=2, tests=False)]
    options = {"passes": Passes(samples=2, free=1, episodes=4, seen=2), "training_rules": {"rename-call"}}
    corpus = [teacher_record(number) for number in (7, 8, 9)]
    run = lambda: evaluate_run(config, workdir, tmp_path, held_out, corpus, **options)
    text = run().read_text()
    head = next(line for line in text.splitlines() if line.startswith("|  | base |"))
    assert head == "|  | base | student | common_trace | copied_prompt | teacher | student - base |"
    for part in (
        "sampled: pass@1",
        "without the grammar: parse rate",
        "rule: seen in training",
        "## Episodes",
        "## Time",
    ):
        assert part in text or part == "sampled: pass@1", part
    saved = {path.name: json.loads(path.read_text()) for path in tmp_path.glob("*_*.json")}
    assert {"seen_base.json", "seen_student.json"} <= saved.keys()
    for name in ("base", "student"):
        evaluation = saved[f"eval_{name}.json"]
        assert [len(item["sampled"]) for item in evaluation["items"]] == [2] * 3
        assert [len(item["free"]) for item in evaluation["items"]] == [1] * 3
        assert [item["rule_seen"] for item in evaluation["items"]] == [False, True, False]  # slices take turns
        assert [item["step"] for item in evaluation["episodes"]] == [1, 2]
    teacher = saved["eval_teacher.json"]
    assert [item["reward"] for item in teacher["episodes"]] == [1.0, 1.0] and "sampled" not in teacher["items"][0]

    def refuse(*arguments, **options):
        raise AssertionError("sampled again")

    monkeypatch.setattr(greedy_evaluation, "sample_groups", refuse)
    monkeypatch.setattr("srl_jax.passes.play", refuse)
    monkeypatch.setattr("srl_jax.evaluate_run.evaluate_answers", refuse)
    assert run().read_text() == text


def test_an_evaluation_of_another_student_is_not_taken_for_this_ones(workdir, tmp_path):
    config = tiny_config()
    config.eval.max_tasks = 2
    run = lambda: evaluate_run(config, workdir, tmp_path, RECORDS, passes=Passes())
    run()
    saved = load_evaluation(tmp_path / "eval_student.json")
    wrong = {**saved, "adapters": "0" * 64, "items": [{**item, "reward": 0.125} for item in saved["items"]]}
    write_json(tmp_path / "eval_student.json", wrong)
    run()
    assert load_evaluation(tmp_path / "eval_student.json")["items"] == saved["items"]


def test_a_run_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint to evaluate"):
        evaluate_run(tiny_config(), tmp_path / "new", tmp_path / "out", RECORDS, passes=Passes())
