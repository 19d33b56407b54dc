"""Components on their blocks, and returns of episodes, against numbers worked by hand."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from srl_jax import credit, grpo

# think, action, state of one group of three; weights .2, .5, .3.
PARTS = jnp.array([[[0.2, 0.4, 0.6]], [[1.0, 0.0, 0.5]], [[0.3, 0.3, 0.3]]])
WEIGHTS = jnp.array([0.2, 0.5, 0.3])
TOTAL = jnp.einsum("c,cpg->pg", WEIGHTS, PARTS)


def test_components_are_centred_and_weighted():
    got = credit.component_advantages(PARTS, WEIGHTS)
    np.testing.assert_allclose(got[0], [[-0.04, 0.0, 0.04]], atol=1e-6)
    np.testing.assert_allclose(got[1], [[0.25, -0.25, 0.0]], atol=1e-6)
    np.testing.assert_array_equal(got[2], [[0.0, 0.0, 0.0]])


@pytest.mark.parametrize("scale", ["none", "std"])
def test_the_parts_add_up_to_the_whole(scale):
    got = credit.component_advantages(PARTS, WEIGHTS, scale=scale).sum(0)
    np.testing.assert_allclose(got, grpo.group_advantages(TOTAL, scale=scale), atol=1e-6)


def test_decoupled_components_have_unit_spread_before_their_weight():
    got = credit.component_advantages(PARTS, WEIGHTS, scale="components")
    std = (2 / 3) ** 0.5  # of (-1, 0, 1)
    np.testing.assert_allclose(got[0], np.array([[-1, 0, 1]]) / std * 0.2, atol=1e-5)
    np.testing.assert_allclose(got[1], np.array([[1, -1, 0]]) / std * 0.5, atol=1e-5)
    assert not np.any(got[2]), "a tied component is silent, not amplified rounding"


def test_the_malformed_and_unscored_as_everywhere():
    malformed, valid = jnp.array([[False, True, False]]), jnp.array([[True, True, False]])
    got = credit.component_advantages(PARTS, WEIGHTS, valid=valid, malformed=malformed)
    np.testing.assert_allclose(got[1], [[0.25, 0.0, 0.0]], atol=1e-6)  # the mean of two is .5
    kept = credit.component_advantages(PARTS, WEIGHTS, valid=valid, malformed=malformed, malformed_advantage="penalize")
    np.testing.assert_allclose(kept[1], [[0.25, -0.25, 0.0]], atol=1e-6)
    with pytest.raises(ValueError, match="scale='range' is not one of 'none', 'std', 'components'"):
        credit.component_advantages(PARTS, WEIGHTS, scale="range")


def test_every_token_gets_its_block_s_component_and_the_whole():
    advantages = jnp.array([[[1.0]], [[10.0]], [[100.0]]])
    got = credit.spread_over_blocks(advantages, jnp.array([[0.5]]), jnp.array([[[0, 0, 1, 2, 3, -1]]]))
    np.testing.assert_array_equal(got, [[[1.5, 1.5, 10.5, 100.5, 0.5, 0.5]]])


REWARDS = jnp.array([[1.0, 0.0, 2.0, 4.0], [3.0, 1.0, jnp.nan, jnp.nan]])
STEPS = jnp.array([[1, 1, 1, 1], [1, 1, 0, 0]])


@pytest.mark.parametrize(
    ("discount", "horizon", "wanted"),
    [
        (1.0, None, [[7.0, 6.0, 6.0, 4.0], [4.0, 1.0, 0.0, 0.0]]),
        (0.5, None, [[2.0, 2.0, 4.0, 4.0], [3.5, 1.0, 0.0, 0.0]]),
        (0.5, 2, [[1.0, 1.0, 4.0, 4.0], [3.5, 1.0, 0.0, 0.0]]),
        (0.9, 1, [[1.0, 0.0, 2.0, 4.0], [3.0, 1.0, 0.0, 0.0]]),
        (0.0, None, [[1.0, 0.0, 2.0, 4.0], [3.0, 1.0, 0.0, 0.0]]),
    ],
)
def test_returns_of_episodes(discount, horizon, wanted):
    got = credit.episode_returns(REWARDS, STEPS, discount=discount, horizon=horizon)
    np.testing.assert_allclose(got, wanted, atol=1e-6)


def test_an_unscored_step_keeps_its_place_in_time():
    got = credit.episode_returns(jnp.array([[1.0, jnp.nan, 4.0]]), jnp.array([[1, 0, 1]]), discount=0.5)
    np.testing.assert_allclose(got, [[2.0, 0.0, 4.0]])


def test_returns_refuse_what_is_no_return():
    for wrong in ({"horizon": 0}, {"discount": 1.5}, {"discount": -0.1}):
        with pytest.raises(ValueError, match=r"horizon is 0|discount is"):
            credit.episode_returns(REWARDS, **wrong)


def test_a_return_is_known_when_every_reward_it_sums_is():
    scored, present = jnp.array([[1, 0, 1, 1], [1, 1, 0, 0]]), jnp.array([[1, 1, 1, 1], [1, 1, 0, 0]])
    known = lambda **options: credit.known_returns(scored, present, **options).astype(int).tolist()
    assert known() == [[0, 0, 1, 1], [1, 1, 0, 0]]
    assert known(discount=0.0) == known(horizon=1) == [[1, 0, 1, 1], [1, 1, 0, 0]]
    later = jnp.array([[1, 1, 0, 1], [1, 0, 0, 0]])
    assert credit.known_returns(later, present, horizon=2).astype(int).tolist() == [[1, 0, 0, 1], [0, 0, 0, 0]]


E, S = 3, 4
_REWARDS = arrays(np.float32, (E, S), elements=st.floats(-0.25, 1.0, width=32, allow_subnormal=False))
_LENGTHS = arrays(np.int32, (E,), elements=st.integers(1, S))
_SCORED = arrays(bool, (E, S))
_DISCOUNTS = st.sampled_from([0.0, 0.25, 0.9, 1.0])


def _present(lengths):
    return np.arange(S)[None, :] < lengths[:, None]


@given(_REWARDS, _LENGTHS, _DISCOUNTS, st.integers(1, S + 2))
def test_returns_are_their_sums(rewards, lengths, discount, horizon):
    present = _present(lengths)
    got = credit.episode_returns(rewards, present, discount=discount, horizon=horizon)
    for (e, t), value in np.ndenumerate(np.asarray(got)):
        ahead = range(t, min(t + horizon, lengths[e]))
        assert value == pytest.approx(sum(discount ** (k - t) * float(rewards[e, k]) for k in ahead), abs=1e-5)


@given(_REWARDS, _LENGTHS, _DISCOUNTS)
def test_the_ends_of_the_scale_of_returns(rewards, lengths, discount):
    present = _present(lengths)
    returns = lambda **options: np.asarray(credit.episode_returns(rewards, present, **options))
    own = np.where(present, rewards, 0)
    np.testing.assert_array_equal(returns(discount=0.0), own)
    np.testing.assert_array_equal(returns(discount=discount, horizon=1), own)
    np.testing.assert_array_equal(returns(discount=discount, horizon=S + 1), returns(discount=discount))
    last = (np.arange(E), lengths - 1)  # so an episode of one step has its reward for a return
    np.testing.assert_array_equal(returns(discount=discount)[last], rewards[last])


@given(_REWARDS, _LENGTHS, _SCORED, _DISCOUNTS, st.integers(1, S + 2), st.sampled_from([-5.0, 0.5, 3.0]))
def test_a_known_return_does_not_depend_on_what_nobody_knows(rewards, lengths, scored, discount, horizon, other):
    present, options = _present(lengths), {"discount": discount, "horizon": horizon}
    known = np.asarray(credit.known_returns(scored, present, **options))
    returns = [
        np.asarray(credit.episode_returns(np.where(scored, rewards, unknown), present, **options))
        for unknown in (0.0, other)
    ]
    np.testing.assert_array_equal(returns[0][known], returns[1][known])
    assert not known[~present].any() and known[present & scored & (discount == 0)].all()
    if scored[present].all():
        np.testing.assert_array_equal(known, present)
