"""From records to a batch, with scripted rewards: what is trained on, what is masked out, and what is counted."""

import dataclasses
import itertools
from collections.abc import Callable
from concurrent.futures import Future

import jax
import numpy as np
import pytest

from srl_jax.config import TrainConfig
from srl_jax.groups import joined
from srl_jax.rewards import Reward, RewardConfig
from srl_jax.rollout import PromptTooLong, collect_rollouts, executable, executable_only, take_prompts
from srl_jax.sandbox import EngineResult, EnvReport, RunnerUnavailable, SandboxConfig, SandboxCrash, Status
from srl_jax.sandbox.service import RewardService, Score, ServiceConfig
from srl_jax.steps import step_settings
from srl_jax.trace import Rejection
from tests.fakes import CountingStream, HashEmbedder, teacher_record, tiny_config

SPREAD = (0.9, 0.5, 0.1, 0.5)
TIED = (0.4, 0.4, 0.4, 0.4)
MALFORMED = Score(Reward(-0.2, None, None, None, None, Rejection.BAD_JSON))
RIGHT = Score(Reward(0.9, 0.9, 0.5, 0.25, 0.1))
UNSCORED = Score(None, None, "infrastructure: killed")
P = G = 4


class Scripted:
    """Scores groups by a function of the group's number; `service_test` tests the real one."""

    size = G  # completions sampled for each prompt

    def __init__(self, group: Callable[[int], tuple]) -> None:
        self.group, self.count, self.requests = group, 0, []

    def submit(self, requests):
        self.requests += requests
        scores = []
        for _ in range(len(requests) // self.size):
            scores += [
                value if isinstance(value, Score) else Score(Reward(value, value, 0.5, 0.25, 0.1))
                for value in self.group(self.count)
            ]
            self.count += 1
        future: Future = Future()
        future.set_result(scores)
        return future


def collect(student, lora, service, config=None, stream=None, key=0):
    config = config or tiny_config()
    config.grpo.kl_coef = 0.0
    return collect_rollouts(
        student, lora, stream or CountingStream(), jax.random.key(key), service, config, step_settings(config)
    )[:3]


def with_grpo(**changes) -> TrainConfig:
    config = tiny_config()
    for name, value in changes.items():
        setattr(config.grpo, name, value)
    return config


def test_groups_of_equal_rewards_get_an_empty_mask_and_shapes_stay(student, lora):
    service = Scripted(lambda number: SPREAD if number == 2 else TIED)
    batch, metrics, drawn = collect(student, lora, service)
    assert batch.completions.shape == (P, G, 72) and batch.advantages.shape == (P, G)
    np.testing.assert_allclose(batch.advantages[0], [0.4, 0.0, -0.4, 0.0], atol=1e-6)
    assert not np.asarray(batch.advantages)[1:].any()
    live = np.asarray(batch.completion_mask).any(axis=(1, 2))
    assert live.tolist() == [True, False, False, False]
    # The informative group comes first, with its own prompt and tokens.
    np.testing.assert_array_equal(batch.prompt_tokens[0], drawn.arrays["prompt_tokens"][2])
    np.testing.assert_array_equal(batch.completions[0], drawn.arrays["tokens"][2])
    assert metrics["kept_groups"] == 0.25 and metrics["groups_drawn"] == 4 and service.count == 4
    assert metrics["seconds/queue_mean"] is None and metrics["seconds/queue_max"] is None, "nothing was executed"


def test_uninformative_groups_are_replaced_while_the_budget_lasts(student, lora):
    # Rounds of four groups with 1, 2 and 3 informative ones: the third round has more than are still missing.
    informative = {0, 4, 5, 8, 9, 10}
    service, stream = Scripted(lambda number: SPREAD if number in informative else TIED), CountingStream()
    batch, metrics, drawn = collect(student, lora, service, with_grpo(max_extra_rollouts=5), stream)
    assert service.count == 12 and stream.position == 12, "a fourth round was not needed"
    assert len(drawn.records) == 12 and metrics["groups_drawn"] == 12 and metrics["kept_groups"] == 0.5
    assert batch.completions.shape == (P, G, 72)
    assert np.asarray(batch.completion_mask).any(axis=(1, 2)).all()
    for row, number in enumerate((0, 4, 5, 8)):
        np.testing.assert_array_equal(batch.completions[row], drawn.arrays["tokens"][number])
    assert not np.array_equal(drawn.arrays["tokens"][0], drawn.arrays["tokens"][4]), "each round has its own key"
    exhausted = Scripted(lambda number: TIED)
    batch, metrics, _ = collect(student, lora, exhausted, with_grpo(max_extra_rollouts=1))
    assert exhausted.count == 8 and metrics["kept_groups"] == 0
    assert not np.asarray(batch.completion_mask).any() and not np.asarray(batch.advantages).any()


def test_the_unscored_take_no_part(student, lora):
    service = Scripted(lambda number: (0.9, UNSCORED, 0.1, 0.2) if number else (UNSCORED,) * 4)
    batch, metrics, _ = collect(student, lora, service)
    np.testing.assert_allclose(batch.advantages[0], [0.5, 0.0, -0.3, -0.2], atol=1e-6)  # mean of three: .4
    assert np.asarray(batch.completion_mask).any(-1)[0].tolist() == [True, False, True, True]
    assert not np.asarray(batch.completion_mask)[3].any(), "the group without a score is last and dead"
    assert metrics["unscored"] == 4 + 3 and metrics["parse_rate"] == 1.0
    assert metrics["reward/total"] == pytest.approx(0.4)


def test_how_long_executions_stood_in_the_queue_is_told(student, lora):
    waits = {0: (0.5, 0.25, None, 1.5)}
    score = lambda number, i: dataclasses.replace(RIGHT, queued_s=waits.get(number, (None,) * G)[i])
    told = collect(student, lora, Scripted(lambda number: tuple(score(number, i) for i in range(G))))[1]
    assert told["seconds/queue_mean"] == pytest.approx(0.75) and told["seconds/queue_max"] == 1.5


class FailingSandbox:
    """Loses every first run, and every run of the first group's task, as a machine in trouble would."""

    def __init__(self, lost):
        self.config, self.lost, self.seen = SandboxConfig(slots=1), lost.task.files[0].path, set()

    def execute(self, action, files, *, tests, expected):
        key = (str(action), *files)
        if key not in self.seen or self.lost in files:
            self.seen.add(key)
            raise SandboxCrash("the sandbox was killed from outside")
        return EnvReport(False, Status.NO_MATCH, "", "", 0, 0, "not_run", (), (), "", None, 0.1, "a fake")

    def apply(self, action, files, *, protected):
        return EngineResult(Status.OK, files, places=frozenset())


def test_a_crash_of_the_infrastructure_is_retried_then_masked_out_of_the_group(student, lora):
    stream = CountingStream()
    config, reward = with_grpo(dynamic_sampling_min_std=0.0), RewardConfig(execution=0.2)
    sandbox = FailingSandbox(next(CountingStream()))
    with RewardService(HashEmbedder(), len, reward=reward, sandbox=sandbox, config=ServiceConfig(retries=1)) as service:
        batch, metrics, drawn = collect(student, lora, service, config, stream)
        counts = service.counts
    assert metrics["unscored"] == counts["unscored"] == G, "never 0 or -0.2: no reward at all"
    assert all("killed from outside" in score.unscored for score in drawn.scores[0])
    assert all(score.reward is not None for row in drawn.scores[1:] for score in row)
    assert counts["retries"] >= P, "each execution failed once"
    tokens = drawn.arrays["tokens"][0]
    masks = np.asarray(batch.completion_mask)
    dead = [row for row in range(P) if np.array_equal(batch.completions[row], tokens)]
    assert dead and not masks[dead].any() and not np.asarray(batch.advantages)[dead].any()
    assert masks.any(axis=(1, 2)).sum() == P - len(dead)


@pytest.mark.parametrize(("option", "own"), [("zero", 0.0), ("penalize", -0.6)])
def test_the_malformed_count_in_the_mean_and_by_choice_for_themselves(student, lora, option, own):
    service = Scripted(lambda number: (0.8, 0.6, MALFORMED, 0.4))
    batch, metrics, _ = collect(student, lora, service, with_grpo(malformed_advantage=option))
    np.testing.assert_allclose(batch.advantages, [[0.4, 0.2, own, 0.0]] * P, atol=1e-6)
    assert metrics["parse_rate"] == 0.75 and metrics["rejected/bad_json"] == P
    assert metrics["reward/total"] == pytest.approx(0.4) and metrics["reward/action"] == pytest.approx(0.6)


def test_without_a_baseline_equal_rewards_still_teach(student, lora):
    service = Scripted(lambda number: TIED if number else (UNSCORED,) * 4)
    batch, metrics, _ = collect(student, lora, service, with_grpo(baseline="none"))
    np.testing.assert_allclose(np.asarray(batch.advantages)[:3], 0.4)
    assert metrics["kept_groups"] == 0.75 and not np.asarray(batch.completion_mask)[3].any()


def test_each_completion_is_scored_against_its_own_record(student, lora):
    service = Scripted(lambda number: SPREAD)
    batch, metrics, drawn = collect(student, lora, service)
    asked = [request.record.task.task_id for request in service.requests]
    assert asked == [f"task-{number}" for number in range(P) for _ in range(G)]
    texts = [request.completion for request in service.requests]
    assert texts == [text for row in drawn.texts for text in row]
    assert all(text.startswith("<think>") and text.endswith("</state_update>") for text in texts)
    assert metrics["finished"] == 1.0
    assert metrics["completion_tokens"] == pytest.approx(np.asarray(batch.completion_mask).sum(-1).mean())
    assert metrics["reward/group_std"] == pytest.approx(np.std(SPREAD), abs=1e-6)
    gap = drawn.arrays["logprobs"] - drawn.arrays["ref"]
    mean = (gap * drawn.arrays["mask"]).sum(-1) / drawn.arrays["mask"].sum(-1)
    assert metrics["kl"] == pytest.approx(mean.mean(), rel=1e-4) and abs(metrics["kl"]) > 1e-3


def test_the_kl_of_a_completion_lowers_its_advantage(student, lora):
    config = with_grpo(kl_coef=0.5)
    batch, _, drawn = collect_rollouts(
        student, lora, CountingStream(), jax.random.key(0), Scripted(lambda number: SPREAD), config,
        step_settings(config),
    )[:3]  # fmt: skip
    mask = drawn.arrays["mask"]
    kl = ((drawn.arrays["logprobs"] - drawn.arrays["ref"]) * mask).sum(-1) / mask.sum(-1)
    expected = np.asarray([0.4, 0.0, -0.4, 0.0]) - 0.5 * (kl - kl.mean(axis=1, keepdims=True))
    np.testing.assert_allclose(batch.advantages, expected, atol=1e-5)


def test_the_same_key_and_position_give_the_same_batch(student, lora):
    one, other = (collect(student, lora, Scripted(lambda number: SPREAD), key=3)[0] for _ in range(2))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)
    third = collect(student, lora, Scripted(lambda number: SPREAD), key=4)[0]
    assert not np.array_equal(one.completions, third.completions)


def test_long_prompts_are_passed_over_and_counted(student):
    lengths = [len(student.tokenizer.encode_prompt(teacher_record(n).task, few_shot=0)) for n in range(16)]
    limit = min(lengths)  # numbers of one digit make shorter prompts
    assert 0 < sum(length <= limit for length in lengths) < 16
    records, prompts, skipped = take_prompts(student, CountingStream(), 12, max_tokens=limit, few_shot=0)
    assert len(records) == len(prompts) == 12 and max(map(len, prompts)) <= limit
    fitting = [n % 16 for n in range(100) if lengths[n % 16] <= limit][:12]
    assert [record.task.task_id for record in records] == [f"task-{n}" for n in fitting]
    assert skipped > 0
    with pytest.raises(PromptTooLong, match=r"1000 prompts in a row are longer than data.max_prompt_tokens=10"):
        take_prompts(student, CountingStream(), 1, max_tokens=10, few_shot=0)


def test_tasks_that_cannot_run_here_are_left_out():
    needs_node = teacher_record(1, tests="node")
    assert executable(teacher_record(0), frozenset()) and executable(needs_node, None)
    assert executable(needs_node, frozenset({"unittest", "node"})) and not executable(needs_node, frozenset())
    mixed = itertools.cycle([needs_node, teacher_record(2)])
    taken = itertools.islice(executable_only(mixed, frozenset({"unittest"})), 3)
    assert [record.task.task_id for record in taken] == ["task-2"] * 3
    with pytest.raises(RunnerUnavailable, match="1000 tasks in a row need it"):
        next(executable_only(itertools.repeat(needs_node), frozenset({"unittest"})))


def test_groups_of_prompts_of_different_widths_are_put_together():
    parts = [
        {"prompt_tokens": np.full((2, width), width), "prompt_lengths": np.asarray([width, 1])} for width in (3, 5)
    ]
    whole = joined(parts)
    assert whole["prompt_tokens"].tolist() == [[3, 3, 3, 0, 0]] * 2 + [[5] * 5] * 2
    assert whole["prompt_lengths"].tolist() == [3, 1, 5, 1]
    own = [{"prompt_tokens": np.ones((2, 4, width))} for width in (3, 5)]  # each completion's own
    assert joined(own)["prompt_tokens"].sum(-1).tolist() == [[3] * 4] * 2 + [[5] * 4] * 2
