"""The controllers on scripted runs: lambda moves as told, runs end for the reason given, nothing is forgotten."""

import json

import pytest

from srl_jax import control
from srl_jax.config import TrainConfig
from srl_jax.control import ControlState, Diverged, after_evaluation, after_step, check_broken, check_gap, kl_coef


def configured(**changes) -> TrainConfig:
    config = TrainConfig(steps=100)
    config.grpo.kl_coef = 0.1
    for name, value in changes.items():
        setattr(config.control, name, value)
    return config


def after(config: TrainConfig, *kls: float, spread: float = 0.2, state: ControlState | None = None) -> ControlState:
    state = state or ControlState()
    for kl in kls:
        state = after_step(state, {"kl": kl, "reward/group_std": spread, "skipped": 0.0}, config)
    return state


def test_nothing_moves_unless_it_is_asked_to():
    config = configured()
    state = after(config, 5.0, 50.0, spread=0.0)
    assert state.factor == 1.0 and not state.stopped and kl_coef(state, 50, config) == 0.1


@pytest.mark.parametrize(("response", "factor"), [("raise", 2.0), ("lower", 0.5)])
def test_lambda_answers_a_kl_beyond_its_target_and_comes_back(response, factor):
    config = configured(kl_target=0.1, kl_response=response, kl_factor=2.0)
    state = after(config, 0.05)
    assert state.factor == 1.0
    state = after(config, 0.5, state=state)  # smoothed: .8 * .05 + .2 * .5 = .14
    assert state.kl == pytest.approx(0.14) and state.factor == factor
    assert kl_coef(state, 0, config) == pytest.approx(0.1 * factor)
    state = after(config, 0.0, 0.0, state=state)  # .112, .0896: below again after the second
    assert state.factor == 2.0 * factor / 2.0 if response == "raise" else state.factor == 0.5
    assert after(config, *[0.0] * 9, state=state).factor == 1.0


def test_one_spike_is_smoothed_and_lambda_stays_in_reach():
    config = configured(kl_target=1.0, kl_factor=10.0, kl_stop=3.0)
    assert after(config, 0.0, 4.0).factor == 1.0  # .8
    assert after(config, *[2.0] * 9).factor == 32.0
    config.control.kl_response = "lower"
    assert after(config, *[2.0] * 9).factor == 1 / 32.0


def test_a_kl_that_stays_high_ends_the_run():
    config = configured(kl_stop=1.0)
    assert not after(config, 0.1, 4.0).stopped  # .88
    state = after(config, 0.1, 4.0, 4.0)
    assert "reached 1.5040, beyond control.kl_stop=1" in state.stopped


def test_lambda_falls_while_groups_agree_and_decays_over_the_run():
    config = configured(vanishing_spread=0.05, kl_factor=2.0)
    assert after(config, 0.0, spread=0.01).factor == 0.5
    assert after(config, 0.0, spread=0.06).factor == 1.0
    config = configured(kl_coef_decay_to=0.2)
    assert [round(kl_coef(ControlState(), step, config), 6) for step in (0, 50, 100)] == [0.1, 0.06, 0.02]


def test_a_metric_that_was_not_measured_changes_nothing():
    config = configured(kl_target=0.1, kl_factor=2.0)
    state = after(config, 0.5)
    for missing in ({}, {"kl": None}, {"kl": float("nan")}):
        assert after_step(state, missing, config).kl == state.kl


def test_patience_counts_evaluations_without_a_new_best():
    config = configured(patience=2)
    state = ControlState()
    for step, reward in ((10, 0.4), (20, 0.5), (30, 0.5), (40, None), (50, 0.45)):
        assert not state.stopped
        state = after_evaluation(state, step, reward, config)
    assert state.best_step == 20 and state.best_reward == 0.5
    assert "2 held-out evaluations in a row did not beat the reward 0.5000 of step 20" in state.stopped
    assert after_evaluation(state, 50, 0.9, config) == state, "an evaluation read again after a resume counts once"


def test_updates_that_are_not_finite_end_the_run_only_in_a_row():
    config = configured(max_broken_updates=2)
    broken = {"skipped": 1.0}
    state = after_step(after_step(ControlState(), broken, config), {"skipped": 0.0}, config)
    check_broken(state, config, "here")
    state = after_step(state, broken, config)
    check_broken(state, config, "here")
    # One update of several that is skipped is no step lost.
    check_broken(after_step(state, {"skipped": 0.5}, config), config, "here")
    with pytest.raises(Diverged, match=r"2 steps in a row .* The batches are in here; lower optim.learning_rate"):
        check_broken(after_step(state, broken, config), config, "here")


def test_a_sampler_that_left_the_trainer_ends_the_run_only_in_a_row():
    config = configured(gap_stop=0.05, gap_steps=2)
    told = lambda state, *gaps: [state := after_step(state, {"logprob_gap": gap}, config) for gap in gaps][-1]
    state = told(ControlState(), 0.06, 0.05, 0.0501)  # the bound itself is within it
    assert state.apart == 1 and state.gap == 0.0501
    check_gap(state, config)
    assert told(state, 0.0, None, float("nan")) == state, "a step that measured nothing neither counts nor clears"
    state = told(state, 0.3)
    with pytest.raises(Diverged, match=r"for 2 steps in a row .* 0.3 apart per token .* control.gap_stop=0.05"):
        check_gap(state, config)
    check_gap(told(state, 1e-6), config)
    config.control.gap_stop = 0.0
    check_gap(state, config)


def test_the_canary_is_on_unless_it_is_turned_off_and_knows_what_is_on_policy():
    config = TrainConfig(steps=100)
    state = ControlState()
    for _ in range(3):
        check_gap(state, config)
        state = after_step(state, {"logprob_gap": 0.2}, config)
    with pytest.raises(Diverged, match="for 3 steps"):
        check_gap(state, config)
    config.method = "replay"  # whose log-probs are an older policy's, as they should be
    assert after_step(ControlState(), {"logprob_gap": 0.2}, config).apart == 0


def test_the_state_survives_json():
    state = after_evaluation(after(configured(kl_target=0.1), 0.5, 0.7), 5, 0.25, configured())
    assert ControlState.from_dict(json.loads(json.dumps(state.to_dict()))) == state
    assert control.ControlState.from_dict({}) == ControlState()
