"""Stored rollouts: what is written is read, what does not belong is refused, old and far samples count less."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from srl_jax.records import CorruptRecord, decode_replay, encode_replay
from srl_jax.replay import ReplayError, ReplayWriter, replay_stream
from srl_jax.replay_step import collect_replay, policy_version, store
from srl_jax.rollout import collect_rollouts
from srl_jax.steps import step_settings
from tests.fakes import CountingStream, perturbed, tiny_config
from tests.rollout_test import MALFORMED, SPREAD, TIED, UNSCORED, Scripted

P = 4


def replay_config(**changes):
    config = tiny_config()
    config.method, config.replay.dir = "replay", "stored"
    for name, value in changes.items():
        setattr(config.replay, name, value)
    return config


@pytest.fixture(scope="module")
def live(student, lora):
    """A live step: four groups, one of them tied, one with a member unscored and one malformed."""
    scores = [SPREAD, TIED, (0.9, UNSCORED, 0.1, MALFORMED), (0.1, 0.2, 0.3, 0.9)]
    config = tiny_config()
    config.grpo.kl_coef = 0.3
    return collect_rollouts(
        student, lora, CountingStream(), jax.random.key(0), Scripted(lambda number: scores[number]), config,
        step_settings(config), kl_coef=0.3,
    )  # fmt: skip


@pytest.fixture(scope="module")
def stored(student, live):
    config = tiny_config()
    return store(student, live.used, 7, policy_version(student, "c" * 64), config)


def collect(student, lora, groups, config=None, step=7):
    config = config or replay_config()
    return collect_replay(student, lora, itertools.cycle(groups), step, config, step_settings(config), kl_coef=0.3)


def test_stored_and_read_back_a_step_is_the_same_batch(student, lora, live, stored):
    again = [decode_replay(encode_replay(group)) for group in stored]
    assert again == stored
    batch, metrics = collect(student, lora, again)
    for name in ("prompt_tokens", "prompt_lengths", "completions", "completion_mask", "old_logprobs"):
        np.testing.assert_array_equal(getattr(batch, name), getattr(live.batch, name), err_msg=name)
    np.testing.assert_allclose(batch.advantages, live.batch.advantages, atol=1e-4)
    assert np.abs(batch.advantages).max() > 0.3
    assert metrics["kept_groups"] == 0.75 and metrics["replay/age"] == 0
    assert metrics["replay/ess"] == pytest.approx(1.0, abs=1e-3)
    assert metrics["kl"] == pytest.approx(live.metrics["kl"], abs=0.05)  # of the scored ones alone


def test_a_policy_gone_too_far_trains_on_nothing(student, lora, stored):
    far = perturbed(lora, scale=2.0, seed=1)
    batch, metrics = collect(student, far, stored)
    assert metrics["replay/ess"] < 0.5 and metrics["kept_groups"] == 0
    assert metrics["replay/too_far"] == 3 and not np.asarray(batch.completion_mask).any()
    _, metrics = collect(student, far, stored, replay_config(min_ess=0.0))
    assert metrics["kept_groups"] == 0.75


def test_old_groups_are_left_out_and_stale_negatives_count_less(student, lora, stored):
    fresh, _ = collect(student, lora, stored, step=7)
    stale, metrics = collect(student, lora, stored, step=10)
    assert metrics["replay/age"] == 3
    fresh, stale = np.asarray(fresh.advantages), np.asarray(stale.advantages)
    np.testing.assert_allclose(stale[fresh > 0], fresh[fresh > 0])
    np.testing.assert_allclose(stale[fresh < 0], 0.5 * fresh[fresh < 0])
    assert (fresh < 0).any()
    for step, kept in ((9, 0.75), (10, 0.0), (4, 0.0)):  # a later policy's samples are as far away
        _, metrics = collect(student, lora, stored, replay_config(max_age=2), step=step)
        assert metrics["kept_groups"] == kept and metrics["replay/too_old"] == (0 if kept else 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: {"tokenizer": "0" * 64}, "tokenizer of task-0 is 0000"),
        (lambda g: {"policy_version": "beef/cafe"}, "base weights of task-0 is beef"),
        (lambda g: {"sampler": dataclasses.replace(g.sampler, temperature=0.5)}, "sampler of task-0 .*config.sampling"),
        (lambda g: {"sampler": dataclasses.replace(g.sampler, max_think_tokens=9)}, "sampler of task-0"),
        (lambda g: {"prompt_ids": np.zeros(500, np.int32)}, "raise config.data.max_prompt_tokens=192"),
        (lambda g: {"grammar_states": g.grammar_states + 1}, "trace grammar is another one"),
    ],
)
def test_groups_that_do_not_belong_here_are_refused(student, lora, stored, change, message):
    wrong = dataclasses.replace(stored[0], **change(stored[0]))
    with pytest.raises(ReplayError, match=message):
        collect(student, lora, [wrong])


def test_another_group_size_is_refused(student, lora, stored):
    config = replay_config()
    config.grpo.group_size = 8
    with pytest.raises(ReplayError, match=r"group size of task-0 is 4, here 8; set config.grpo.group_size"):
        collect(student, lora, stored, config)


def test_a_group_without_log_probs_cannot_be_stored(stored, tmp_path):
    lost = dataclasses.replace(stored[0], sampler_logprobs=None)
    with pytest.raises(CorruptRecord, match="cannot be trained on"):
        encode_replay(lost)
    with pytest.raises(CorruptRecord, match="cannot be trained on"), ReplayWriter(tmp_path / "r") as writer:
        writer.add(1, [lost])
        writer.wait()


def test_steps_come_back_in_order_and_the_stream_goes_on_where_it_was(stored, tmp_path):
    with ReplayWriter(tmp_path / "replay") as writer:
        for step in (1, 2, 10):
            writer.add(step, [dataclasses.replace(group, policy_step=step) for group in stored])
        writer.add(2, [dataclasses.replace(group, policy_step=2) for group in stored])  # again, after a resume
    assert len(list((tmp_path / "replay").iterdir())) == 3
    stream = replay_stream(tmp_path / "replay", shuffle=False, seed=0)
    assert [next(stream).policy_step for _ in range(3 * P + 1)] == [1] * P + [2] * P + [10] * P + [1]
    position = stream.get_state()
    following = [next(stream) for _ in range(3)]
    other = replay_stream(tmp_path / "replay", shuffle=False, seed=0)
    other.set_state(position)
    assert [next(other) for _ in range(3)] == following
    shuffled = replay_stream(tmp_path / "replay", shuffle=True, seed=0)
    steps = [next(shuffled).policy_step for _ in range(3 * P)]
    assert sorted(steps) == [1] * P + [2] * P + [10] * P and steps != sorted(steps)


def test_what_is_no_replay_directory_is_said_so(tmp_path):
    with pytest.raises(ReplayError, match=r"config\.replay\.record=True"):
        replay_stream(tmp_path, shuffle=False, seed=0)
    (tmp_path / "step-00000001.arrayrecord").write_bytes(b"rubbish")
    with pytest.raises(ReplayError, match="record the run again"):
        next(replay_stream(tmp_path, shuffle=False, seed=0))


def test_a_disk_that_fails_is_told_by_the_next_step(stored, tmp_path):
    with pytest.raises(ReplayError, match=r"cannot be written: .*; free space"), ReplayWriter(tmp_path / "r") as writer:
        (tmp_path / "r").rmdir()
        (tmp_path / "r").write_text("in the way")
        writer.add(1, stored)
        writer.wait()
