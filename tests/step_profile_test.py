"""Where a step's time goes: the parts add up, and collectives are those of the trace that was written."""

import pytest

from srl_jax.config import ConfigError
from srl_jax.step_profile import PARTS, Profile, collective_seconds, divide, profile
from tests.fakes import CountingStream, tiny_config

MEASURED = {"rollout": 4.0, "reward_wait": 0.5, "reference": 1.0, "update": 3.0, "step": 9.0}


def small_config():
    config = tiny_config()
    config.sampling.max_new_tokens = 64
    config.grpo.max_extra_rollouts = 0
    return config


def test_the_parts_of_a_step_by_hand():
    apart = {"prefill": 0.5, "forward": 0.8, "optimiser": 0.2}
    collectives = {"jit_train_step": 0.25, "jit_forward_logprobs": 0.125, "jit__decode": 0.5}
    parts = divide(MEASURED, apart, collectives)
    assert list(parts) == list(PARTS)
    assert parts == pytest.approx({
        "prefill": 0.5, "decode": 3.0, "reward wait": 0.5, "log-probs": 0.875, "forward": 0.8, "backward": 1.75,
        "optimiser": 0.2, "collectives": 0.875, "host": 0.5,
    })  # fmt: skip


def test_what_was_timed_apart_takes_no_more_than_there_is():
    parts = divide(MEASURED, {"prefill": 5.0, "forward": 4.5, "optimiser": 1.5}, {"jit_current_scores": 7.0})
    assert parts == pytest.approx({
        "prefill": 4.0, "decode": 0.0, "reward wait": 0.5, "log-probs": 0.0, "forward": 2.25, "backward": 0.0,
        "optimiser": 0.75, "collectives": 1.0, "host": 0.5,
    })  # fmt: skip


def test_the_table_says_shares_and_what_spoils_them():
    parts = divide(MEASURED, {"prefill": 0.5, "forward": 0.8, "optimiser": 0.2}, {})
    table = Profile(parts, 9.0, 0).table()
    assert "\n  decode           3,500.0 ms   38.9%\n" in table
    assert table.endswith("\n  step             9,000.0 ms  100.0%")
    assert "compiled" not in table and "2 programs were compiled" in Profile(parts, 9.0, 2).table()


def test_real_steps_on_two_devices_with_their_trace(tmp_path):
    config = small_config()
    config.mesh.data = 2
    found = profile(config, CountingStream(), tmp_path, 2)
    assert list(found.parts) == list(PARTS) and found.compiled == 0
    assert sum(found.parts.values()) == pytest.approx(found.step)
    assert all(seconds >= 0 for seconds in found.parts.values())
    assert all(found.parts[name] > 0 for name in ("prefill", "decode", "log-probs", "forward", "optimiser", "host"))
    assert list(tmp_path.glob("plugins/profile/*/*.trace.json.gz")), "what Perfetto opens"
    by_program = collective_seconds(tmp_path)
    gradients = [seconds for name, seconds in by_program.items() if "train_step" in name]
    assert len(gradients) == 1 and gradients[0] > 0, by_program
    assert found.parts["collectives"] == pytest.approx(sum(by_program.values()) / 2 / 2)  # two steps, two devices


def test_a_step_that_samples_nothing_is_refused(tmp_path):
    config = small_config()
    config.method = "sft"
    with pytest.raises(ConfigError, match="method"):
        profile(config, CountingStream(), tmp_path, 1)
