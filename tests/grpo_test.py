"""Advantages, KL and surrogate against numbers worked by hand and expectations enumerated exactly."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from srl_jax import grpo

WORKED = jnp.array([[0.9, 0.5, 0.1, -0.2]])
CLIP = {"clip_epsilon_low": 0.2, "clip_epsilon_high": 0.28}
AGGREGATIONS = ("token", "sequence", "constant")

# XLA flushes subnormals to zero, and a number hypothesis cannot represent is one it must not draw.
floats = partial(st.floats, width=32, allow_subnormal=False)
reward_groups = hnp.arrays(np.float32, st.sampled_from([(1, 2), (3, 4), (2, 5)]), elements=floats(-0.25, 1.0))


def surrogate(logprobs, old, advantages, mask, aggregation="token", **kwargs):
    return grpo.clipped_surrogate(
        logprobs, old, advantages, mask, **CLIP, aggregation=aggregation, max_length=8, **kwargs
    )


def random_batch(seed=0, rows=8, tokens=6):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, tokens + 1, rows)
    old = -rng.exponential(1.0, (rows, tokens)).astype(np.float32)
    logprobs = old + rng.normal(0, 0.3, old.shape).astype(np.float32)
    mask = np.arange(tokens)[None, :] < lengths[:, None]
    return logprobs, old, rng.normal(size=rows).astype(np.float32), mask


class TestGroupAdvantages:
    def test_mean_only(self):
        np.testing.assert_allclose(grpo.group_advantages(WORKED), [[0.575, 0.175, -0.225, -0.525]], rtol=0, atol=1e-6)

    def test_std_is_the_population_s(self):
        expected = [[1.386952, 0.422116, -0.542720, -1.266348]]
        np.testing.assert_allclose(grpo.group_advantages(WORKED, scale="std"), expected, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("scale", ["none", "std"])
    def test_tied_rewards_leave_the_kl_unamplified(self, scale):
        kl = jnp.array([[0.5, 0.45, 0.55, 0.5]])
        advantages = grpo.group_advantages(jnp.full((1, 4), 0.7), kl, kl_coef=0.05, scale=scale)
        np.testing.assert_allclose(advantages, [[0.0, 0.0025, -0.0025, 0.0]], rtol=0, atol=1e-7)

    def test_kl_is_not_divided_by_the_std(self):
        kl = jnp.array([[1.0, 0.0, 0.0, -1.0]])
        scaled = grpo.group_advantages(WORKED, scale="std")
        both = grpo.group_advantages(WORKED, kl, kl_coef=0.1, scale="std")
        np.testing.assert_allclose(both - scaled, -0.1 * kl, rtol=0, atol=1e-6)

    @given(rewards=reward_groups, constant=floats(-10, 10))
    def test_a_constant_changes_nothing(self, rewards, constant):
        shifted = grpo.group_advantages(rewards + np.float32(constant))
        np.testing.assert_allclose(shifted, grpo.group_advantages(rewards), rtol=0, atol=5e-6)

    @given(rewards=reward_groups, constant=floats(-1, 1))
    def test_a_constant_changes_nothing_when_scaled(self, rewards, constant):
        rewards = rewards[rewards.std(axis=1) > 0.02]
        if rewards.size:
            shifted = grpo.group_advantages(rewards + np.float32(constant), scale="std")
            np.testing.assert_allclose(shifted, grpo.group_advantages(rewards, scale="std"), rtol=0, atol=1e-4)

    @pytest.mark.parametrize("scale", ["none", "std"])
    @given(value=floats(-0.25, 1.0), members=st.sampled_from([1, 3, 7]))
    def test_a_tied_group_is_exactly_zero(self, scale, value, members):
        tied = jnp.full((2, members), value)
        assert not np.any(grpo.group_advantages(tied, tied, kl_coef=1.0, scale=scale))

    def test_a_tie_broken_by_rounding_is_a_tie(self):
        rewards = np.array([[0.7, np.nextafter(np.float32(0.7), np.float32(1)), 0.7]], np.float32)
        assert not np.any(grpo.group_advantages(rewards, scale="std"))

    @pytest.mark.parametrize("scale", ["none", "std"])
    def test_an_unscored_member_is_as_if_absent(self, scale):
        rewards = jnp.array([[0.9, jnp.nan, 0.5, 0.1, -0.2]])
        kl = jnp.array([[0.1, jnp.nan, 0.3, 0.2, 0.0]])
        valid = jnp.array([[1, 0, 1, 1, 1]])
        got = grpo.group_advantages(rewards, kl, kl_coef=0.1, scale=scale, valid=valid)
        alone = grpo.group_advantages(WORKED, jnp.array([[0.1, 0.3, 0.2, 0.0]]), kl_coef=0.1, scale=scale)
        assert got[0, 1] == 0.0
        np.testing.assert_allclose(got[:, np.array([0, 2, 3, 4])], alone, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("scale", ["none", "std"])
    @pytest.mark.parametrize("scored", [0, 1])
    def test_nobody_to_compare_with(self, scale, scored):
        valid = jnp.arange(4)[None, :] < scored
        kl = jnp.array([[0.1, 0.2, 0.3, 0.4]])
        advantages = grpo.group_advantages(WORKED, kl, kl_coef=1.0, scale=scale, valid=valid)
        assert not np.any(advantages)

    def test_malformed_counts_in_the_mean_and_is_zeroed_or_penalised(self):
        malformed = jnp.array([[False, False, False, True]])
        zeroed = grpo.group_advantages(WORKED, malformed=malformed)
        np.testing.assert_allclose(zeroed, [[0.575, 0.175, -0.225, 0.0]], rtol=0, atol=1e-6)
        kept = grpo.group_advantages(WORKED, malformed=malformed, malformed_advantage="penalize")
        np.testing.assert_allclose(kept, grpo.group_advantages(WORKED))

    def test_no_gradient_flows_through_rewards_or_kl(self):
        total = lambda r, k: jnp.sum(jnp.square(grpo.group_advantages(r, k, kl_coef=0.1, scale="std")))
        for gradient in jax.grad(total, argnums=(0, 1))(WORKED, WORKED):
            assert not np.any(gradient)

    def test_unknown_scale(self):
        with pytest.raises(ValueError, match="scale='var' is not one of 'none', 'std'"):
            grpo.group_advantages(WORKED, scale="var")


def test_baseline_advantages_are_the_notes_literal_form():
    kl = jnp.array([[0.2, 0.0, 0.4, 0.0]])
    literal = grpo.baseline_advantages(WORKED, kl, kl_coef=0.5)
    np.testing.assert_allclose(literal, [[0.8, 0.5, -0.1, -0.2]], rtol=0, atol=1e-6)
    valued = grpo.baseline_advantages(WORKED, values=jnp.full((1, 4), 0.3), valid=jnp.array([[1, 1, 1, 0]]))
    np.testing.assert_allclose(valued, [[0.6, 0.2, -0.2, 0.0]], rtol=0, atol=1e-6)


def test_informative_groups():
    rewards = jnp.array([[0.5, 0.53, 0.5, 0.53], [0.5, 0.55, 0.5, 0.55], [0.7] * 4, [0.0, 0.0, 0.0, 1.0]])
    assert grpo.informative_groups(rewards).tolist() == [False, True, False, True]  # stds .015 .025 0 .433
    valid = jnp.array([[1] * 4, [1, 0, 1, 0], [1] * 4, [0] * 4])
    assert grpo.informative_groups(rewards, valid=valid).tolist() == [False] * 4


class TestKl:
    @pytest.mark.parametrize("estimator, expected", [("k1", 0.5), ("k2", 0.125), ("k3", 0.106531)])
    def test_worked(self, estimator, expected):
        got = grpo.kl_estimate(jnp.array([-1.0]), jnp.array([-1.5]), estimator)
        np.testing.assert_allclose(got, [expected], rtol=0, atol=1e-6)

    def test_k3_keeps_its_digits_near_zero(self):
        # d^2/2 - d^3/6 + ...; a plain exp(-d) - 1 + d in fp32 rounds 5e-9 to 0 or 6e-8.
        d = 1e-4
        got = grpo.kl_estimate(jnp.float32(d), jnp.float32(0.0), "k3")
        assert abs(float(got) - d * d / 2) < 1e-11

    def test_far_apart_is_finite(self):
        logprobs, ref = jnp.array([-1e4, 0.0]), jnp.array([0.0, -1e4])
        for estimator in ("k1", "k2", "k3"):
            assert np.all(np.isfinite(grpo.kl_estimate(logprobs, ref, estimator)))

    def test_unknown_estimator(self):
        with pytest.raises(ValueError, match="estimator='k4' is not one of 'k1', 'k2', 'k3'"):
            grpo.kl_estimate(WORKED, WORKED, "k4")


# One step over a vocabulary of five: every expectation is a sum of five terms.
THETA = jnp.array([0.3, -1.0, 0.8, 0.1, -0.4])
OLD = jax.nn.log_softmax(jnp.array([0.1, -0.5, 0.5, 0.4, -0.6]))
REF = jax.nn.log_softmax(jnp.array([-0.2, 0.6, 0.0, 0.9, -1.1]))


def reverse_kl(theta):
    p = jax.nn.log_softmax(theta)
    return jnp.sum(jnp.exp(p) * (p - REF))


def expected_gradient(token_loss, sampler):
    """d/dtheta of token_loss(logprobs [5]) averaged over tokens that `sampler` (constant log-probs) drew."""
    weights = jax.lax.stop_gradient(jnp.exp(sampler))
    return jax.grad(lambda theta: jnp.sum(weights * token_loss(jax.nn.log_softmax(theta))))(THETA)


class TestKlGradient:
    @pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
    @pytest.mark.parametrize("on_policy", [True, False])
    def test_kl_loss_has_the_reverse_kl_s_gradient(self, estimator, on_policy):
        sampler = jax.nn.log_softmax(THETA) if on_policy else OLD

        def token_loss(logprobs):
            one = lambda lp, old, ref: grpo.kl_loss(
                lp[None, None],
                old[None, None],
                ref[None, None],
                jnp.ones((1, 1)),
                estimator=estimator,
                aggregation="token",
            )
            return jax.vmap(one)(logprobs, sampler, REF)

        np.testing.assert_allclose(
            expected_gradient(token_loss, sampler), jax.grad(reverse_kl)(THETA), rtol=0, atol=1e-6
        )

    def test_differentiated_plainly_k1_vanishes_and_k3_is_the_forward_kl(self):
        # Why kl_loss exists (2506.09477, 2510.01555, 2512.21852).
        on_policy = jax.nn.log_softmax(THETA)
        k1 = expected_gradient(lambda lp: grpo.kl_estimate(lp, REF, "k1"), on_policy)
        np.testing.assert_allclose(k1, np.zeros(5), rtol=0, atol=1e-6)
        k3 = expected_gradient(lambda lp: grpo.kl_estimate(lp, REF, "k3"), on_policy)
        forward = jax.grad(lambda t: jnp.sum(jnp.exp(REF) * (REF - jax.nn.log_softmax(t))))(THETA)
        np.testing.assert_allclose(k3, forward, rtol=0, atol=1e-6)
        assert np.linalg.norm(forward - jax.grad(reverse_kl)(THETA)) > 0.1


class TestSurrogate:
    @pytest.mark.parametrize("aggregation, expected", [("sequence", 0.0), ("token", 1 / 3), ("constant", 0.125)])
    def test_worked_aggregations(self, aggregation, expected):
        mask = jnp.array([[1, 1, 0, 0], [1, 1, 1, 1]])
        loss = surrogate(jnp.zeros((2, 4)), jnp.zeros((2, 4)), jnp.array([1.0, -1.0]), mask, aggregation)
        np.testing.assert_allclose(loss, expected, rtol=0, atol=1e-6)

    # (ratio, advantage) -> min(r A, clip(r, .8, 1.28) A) and d/dlogprob of it, on paper.
    @pytest.mark.parametrize(
        "ratio, advantage, value, slope",
        [
            (1.0, 2.0, 2.0, 2.0),
            (1.2, 1.0, 1.2, 1.2),
            (1.5, 1.0, 1.28, 0.0),  # clipped above
            (1.5, -1.0, -1.5, -1.5),  # a bad token grown likely is never excused
            (0.5, 1.0, 0.5, 0.5),  # a good token grown unlikely neither
            (0.5, -1.0, -0.8, 0.0),  # clipped below
            (0.9, -1.0, -0.9, -0.9),
        ],
    )
    def test_every_branch(self, ratio, advantage, value, slope):
        loss, gradient = jax.value_and_grad(surrogate)(
            jnp.log(jnp.array([[ratio]])), jnp.zeros((1, 1)), jnp.array([advantage]), jnp.ones((1, 1))
        )
        np.testing.assert_allclose([-loss, -gradient[0, 0]], [value, slope], rtol=1e-6)

    def test_sequence_level_ratio(self):
        # Lengths 2 and 1: ratios exp((.2 + .4)/2) = 1.349859 (clipped to 1.28) and exp(-.1) = .904837.
        logprobs = jnp.array([[0.2, 0.4], [-0.1, 9.0]])
        mask = jnp.array([[1, 1], [1, 0]])
        loss = surrogate(logprobs, jnp.zeros((2, 2)), jnp.array([1.0, 1.0]), mask, "sequence", level="sequence")
        np.testing.assert_allclose(loss, -(1.28 + 0.904837) / 2, rtol=1e-6)

    def test_sequence_level_gradient_is_shared_by_the_row(self):
        loss = partial(surrogate, aggregation="sequence", level="sequence")
        mask = jnp.array([[1, 1, 1, 0]])
        gradient = jax.grad(loss)(jnp.full((1, 4), 0.05), jnp.zeros((1, 4)), jnp.array([1.0]), mask)
        share = -np.exp(0.05) / 3
        np.testing.assert_allclose(gradient, [[share, share, share, 0.0]], rtol=1e-5)

    def test_advantages_per_token(self):
        logprobs, old, advantages, mask = random_batch()
        per_row = surrogate(logprobs, old, advantages, mask)
        per_token = surrogate(logprobs, old, np.repeat(advantages[:, None], mask.shape[1], axis=1), mask)
        np.testing.assert_allclose(per_token, per_row, rtol=1e-6)

    @pytest.mark.parametrize("aggregation", AGGREGATIONS)
    @pytest.mark.parametrize("level", ["token", "sequence"])
    def test_padding_never_matters(self, aggregation, level):
        """Neither padded columns, nor rows without a trained token, nor NaN and infinities inside either."""
        logprobs, old, advantages, mask = random_batch()
        loss = lambda lp, o, a, m: surrogate(lp, o, a, m, aggregation, level=level)
        value, gradient = jax.value_and_grad(loss)(logprobs, old, advantages, mask)

        def pad(x, fill):
            x = np.where(mask, x, fill)
            return np.pad(x, ((0, 3), (0, 5)), constant_values=fill)

        padded, padded_gradient = jax.value_and_grad(loss)(
            pad(logprobs, np.nan),
            pad(old, -np.inf),
            np.pad(advantages, (0, 3), constant_values=np.nan),
            pad(mask, False).astype(bool),
        )
        np.testing.assert_allclose(padded, value, rtol=1e-6)
        np.testing.assert_allclose(padded_gradient[: len(mask), : mask.shape[1]], gradient, rtol=1e-6)
        assert not np.any(padded_gradient[len(mask) :]) and not np.any(padded_gradient[:, mask.shape[1] :])

    @pytest.mark.parametrize("aggregation", AGGREGATIONS)
    @pytest.mark.parametrize("level", ["token", "sequence"])
    def test_nothing_left_to_train(self, aggregation, level):
        logprobs, old, advantages, mask = random_batch()
        value, gradient = jax.value_and_grad(surrogate)(
            logprobs, old, advantages, np.zeros_like(mask), aggregation, level=level
        )
        assert value == 0.0 and not np.any(gradient)

    def test_a_tied_group_has_zero_gradient(self):
        logprobs, old, _, mask = random_batch(rows=4)
        advantages = grpo.group_advantages(jnp.full((1, 4), 0.7), scale="std").reshape(-1)
        assert not np.any(jax.grad(surrogate)(logprobs, old, advantages, mask))

    def test_absurd_ratios_stay_finite(self):
        logprobs, old = jnp.array([[0.0, -1e4]]), jnp.array([[-1e4, 0.0]])
        for advantage in (1.0, -1.0):
            value, gradient = jax.value_and_grad(surrogate)(logprobs, old, jnp.array([advantage]), jnp.ones((1, 2)))
            assert np.isfinite(value) and np.all(np.isfinite(gradient))

    @pytest.mark.parametrize("aggregation", AGGREGATIONS)
    def test_accumulation_8x1_is_1x8_with_a_global_denominator(self, aggregation):
        logprobs, old, advantages, mask = random_batch()
        loss = lambda lp, o, a, m, d: surrogate(lp, o, a, m, aggregation, denominator=d)
        whole = jax.value_and_grad(loss)(logprobs, old, advantages, mask, None)
        total = grpo.loss_denominator(mask, aggregation=aggregation, max_length=8)
        parts = [
            jax.value_and_grad(loss)(*(x[i : i + 1] for x in (logprobs, old, advantages, mask)), total)
            for i in range(8)
        ]
        np.testing.assert_allclose(sum(value for value, _ in parts), whole[0], rtol=0, atol=1e-6)
        np.testing.assert_allclose(np.concatenate([gradient for _, gradient in parts]), whole[1], rtol=0, atol=1e-6)

    def test_a_micro_batch_s_own_denominator_would_be_wrong(self):
        """The bug the argument prevents is visible on this data, so the test above can fail."""
        logprobs, old, advantages, mask = random_batch()
        own = np.mean([surrogate(*(x[i : i + 1] for x in (logprobs, old, advantages, mask))) for i in range(8)])
        assert abs(own - surrogate(logprobs, old, advantages, mask)) > 1e-2

    @pytest.mark.parametrize("aggregation", AGGREGATIONS)
    def test_eight_devices_are_one(self, aggregation):
        mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
        batch = random_batch()
        step = jax.jit(jax.value_and_grad(lambda *x: surrogate(*x, aggregation)))
        here, there = step(*batch), step(*(jax.device_put(x, rows) for x in batch))
        np.testing.assert_allclose(there[0], here[0], rtol=0, atol=1e-6)
        np.testing.assert_allclose(there[1], here[1], rtol=0, atol=1e-6)

    def test_constant_needs_a_length(self):
        logprobs, old, advantages, mask = random_batch()
        with pytest.raises(ValueError, match="max_length"):
            grpo.clipped_surrogate(logprobs, old, advantages, mask, **CLIP, aggregation="constant")

    def test_unknown_choices(self):
        with pytest.raises(ValueError, match="aggregation='mean'"):
            surrogate(*random_batch(), "mean")
        with pytest.raises(ValueError, match="level='word'"):
            surrogate(*random_batch(), level="word")


def test_clip_fractions():
    ratio = jnp.array([[1.5, 1.5, 0.5, 0.5, 1.0, 7.0]])
    advantages = jnp.array([[1.0, -1.0, 1.0, -1.0, 1.0, 1.0]])
    mask = jnp.array([[1, 1, 1, 1, 1, 0]])
    got = grpo.clip_fractions(jnp.log(ratio), jnp.zeros((1, 6)), advantages, mask, **CLIP)
    np.testing.assert_allclose([got.low, got.high, got.ratio_mean], [0.2, 0.2, 1.0], rtol=1e-6)
    halves = grpo.clip_fractions(
        jnp.log(ratio), jnp.zeros((1, 6)), advantages, mask, **CLIP, denominator=jnp.float32(10)
    )
    np.testing.assert_allclose(halves.high, 0.1, rtol=1e-6)


def test_mean_over_tokens():
    values = jnp.array([[1.0, 3.0, jnp.nan], [jnp.nan, jnp.nan, jnp.nan]])
    got = grpo.mean_over_tokens(values, jnp.array([[1, 1, 0], [0, 0, 0]]))
    np.testing.assert_allclose(got, [2.0, 0.0])


def test_truncated_importance_weights():
    old = jnp.log(jnp.array([[0.5, 0.5, 0.1]]))
    sampler = jnp.log(jnp.array([[0.5, 0.1, 0.4]]))
    np.testing.assert_allclose(grpo.truncated_importance_weights(old, sampler), [[1.0, 2.0, 0.25]], rtol=1e-6)
    batch = random_batch()
    weights = grpo.truncated_importance_weights(batch[0], batch[1])
    twice = surrogate(*batch, token_weights=2.0 * weights)
    np.testing.assert_allclose(twice, 2.0 * surrogate(*batch, token_weights=weights), rtol=1e-6)


class TestEffectiveSampleSize:
    def test_worked(self):
        # w = (1, 1, 2): 16 / (3 * 6)
        got = grpo.effective_sample_size(jnp.log(jnp.array([1.0, 1.0, 2.0])))
        np.testing.assert_allclose(got, 16 / 18, rtol=1e-6)

    @given(log_weights=hnp.arrays(np.float32, st.sampled_from([1, 2, 7]), elements=floats(-500, 500)))
    def test_between_one_sample_and_all(self, log_weights):
        got = float(grpo.effective_sample_size(log_weights))
        assert 1 / len(log_weights) - 1e-6 <= got <= 1 + 1e-6

    def test_masked_and_empty(self):
        log_weights = jnp.array([0.0, jnp.nan, 0.0])
        assert grpo.effective_sample_size(log_weights, jnp.array([1, 0, 1])) == 1.0
        assert grpo.effective_sample_size(log_weights, jnp.zeros(3)) == 0.0


# Two steps over five tokens: row 0 of the table starts, row 1 + a follows token a.
LENGTH, VOCABULARY, GROUP, KL_COEF = 2, 5, 4, 0.3
TABLE = 0.7 * jax.random.normal(jax.random.key(1), (1 + VOCABULARY, VOCABULARY))
REF_TABLE = 0.7 * jax.random.normal(jax.random.key(2), (1 + VOCABULARY, VOCABULARY))
REWARD = jax.random.uniform(jax.random.key(3), (VOCABULARY, VOCABULARY))
SEQUENCES = jnp.stack(jnp.meshgrid(jnp.arange(5), jnp.arange(5), indexing="ij"), axis=-1).reshape(-1, 2)


def sequence_logprobs(table, sequences):
    table = jax.nn.log_softmax(table)
    first, second = sequences[:, 0], sequences[:, 1]
    return jnp.stack([table[0, first], table[1 + first, second]], axis=1)


def exact_objective(table):
    logprobs = sequence_logprobs(table, SEQUENCES)
    kl = jnp.mean(logprobs - sequence_logprobs(REF_TABLE, SEQUENCES), axis=1)
    probability = jnp.exp(jnp.sum(logprobs, axis=1))
    return jnp.sum(probability * (REWARD[SEQUENCES[:, 0], SEQUENCES[:, 1]] - KL_COEF * kl))


def sampled_gradient(key, groups=500):
    first_key, second_key = jax.random.split(key)
    rows = groups * GROUP
    first = jax.random.categorical(first_key, jnp.broadcast_to(TABLE[0], (rows, VOCABULARY)))
    second = jax.random.categorical(second_key, TABLE[1 + first])
    sequences = jnp.stack([first, second], axis=1)
    old = sequence_logprobs(TABLE, sequences)
    mask = jnp.ones_like(old)
    kl = grpo.mean_over_tokens(grpo.kl_estimate(old, sequence_logprobs(REF_TABLE, sequences), "k1"), mask)
    advantages = grpo.group_advantages(
        REWARD[first, second].reshape(groups, GROUP), kl.reshape(groups, GROUP), kl_coef=KL_COEF
    )

    def loss(table):
        # One completion counts as its sum of tokens: `constant` with the completion as the unit of length.
        return grpo.clipped_surrogate(
            sequence_logprobs(table, sequences),
            old,
            advantages.reshape(-1),
            mask,
            **CLIP,
            aggregation="constant",
            max_length=1,
        )

    return -jax.grad(loss)(TABLE)


def test_monte_carlo_gradient_is_the_enumerated_one():
    """Over 128 batches of 500 groups; the group's mean includes the member itself: a factor of 1 - 1/G."""
    batches = jax.jit(jax.vmap(sampled_gradient))(jax.random.split(jax.random.key(0), 128))
    mean, error = batches.mean(axis=0), batches.std(axis=0, ddof=1) / np.sqrt(len(batches))
    exact = (1 - 1 / GROUP) * jax.grad(exact_objective)(TABLE)
    assert np.all(np.abs(mean - exact) < 4.5 * error)
    # The errors are small enough for that to mean something: a missing KL term or factor would be far outside.
    assert np.linalg.norm(error) < 0.02 * np.linalg.norm(exact)


@pytest.mark.parametrize("in_loss", [False, True], ids=["kl-in-reward", "kl-in-loss"])
def test_four_arm_bandit_reaches_its_fixed_point(in_loss):
    """r = (1, 0, 0, 0), uniform reference, lambda .5: pi ~ exp(r / lambda), p1 = e^2 / (e^2 + 3) = .711235.

    Every group of two arms is enumerated and weighted by its probability, so the descent is exact.
    """
    groups = jnp.stack(jnp.meshgrid(jnp.arange(4), jnp.arange(4), indexing="ij"), axis=-1).reshape(-1, 2)
    rewards = jnp.array([1.0, 0.0, 0.0, 0.0])[groups]
    reference = jnp.full((16, 2), jnp.log(0.25))
    ones = jnp.ones((16, 2, 1))

    def loss(theta):
        logprobs = jax.nn.log_softmax(theta)[groups]
        old = jax.lax.stop_gradient(logprobs)
        kl = grpo.kl_estimate(old, reference, "k1")
        advantages = grpo.group_advantages(rewards, kl, kl_coef=0.0 if in_loss else 0.5)
        expand = lambda x: x[..., None]
        one_group = partial(grpo.clipped_surrogate, **CLIP, aggregation="token")
        losses = jax.vmap(one_group)(expand(logprobs), expand(old), advantages, ones)
        if in_loss:
            one_kl = partial(grpo.kl_loss, estimator="k2", aggregation="token")
            # The reward's gradient carries the group baseline's 1 - 1/G, the loss term none.
            losses += 0.5 * (1 - 1 / 2) * jax.vmap(one_kl)(expand(logprobs), expand(old), expand(reference), ones)
        return jnp.sum(jnp.exp(old.sum(axis=1)) * losses)

    descend = lambda _, theta: theta - 2.0 * jax.grad(loss)(theta)
    theta = jax.jit(lambda: jax.lax.fori_loop(0, 1000, descend, jnp.zeros(4)))()
    np.testing.assert_allclose(jax.nn.softmax(theta)[0], 0.711235, rtol=0, atol=1e-5)


@settings(max_examples=25)
@given(seed=st.integers(0, 2**31), aggregation=st.sampled_from(AGGREGATIONS))
def test_on_policy_the_loss_is_minus_the_mean_advantage(seed, aggregation):
    """ratio 1 everywhere: value -aggregate(A), no clipping, whatever the log-probs."""
    _, old, advantages, mask = random_batch(seed)
    expected = -grpo.aggregate(
        jnp.broadcast_to(advantages[:, None], mask.shape), mask, aggregation=aggregation, max_length=8
    )
    np.testing.assert_allclose(surrogate(old, old, advantages, mask, aggregation), expected, rtol=0, atol=1e-6)
    assert grpo.clip_fractions(old, old, advantages, mask, **CLIP) == (0.0, 0.0, 1.0)


def test_dual_clip_bounds_what_a_negative_advantage_can_cost():
    ratio, mask = jnp.array([[0.5, 1.0, 2.0, 10.0]]), jnp.ones((1, 4))
    loss = lambda logprobs, sign, cap: grpo.clipped_surrogate(
        logprobs, jnp.zeros((1, 4)), jnp.array([sign]), mask, **CLIP, aggregation="token", negative_ratio_cap=cap
    )
    grad = jax.grad(loss)
    # Without a cap the minimum leaves r A: .8, 1, 2, 10. With 3 the last is 3 and has no gradient any more.
    assert float(loss(jnp.log(ratio), -1.0, None)) == pytest.approx((0.8 + 1 + 2 + 10) / 4)
    assert float(loss(jnp.log(ratio), -1.0, 3.0)) == pytest.approx((0.8 + 1 + 2 + 3) / 4)
    np.testing.assert_allclose(grad(jnp.log(ratio), -1.0, 3.0) * 4, [[0.0, 1.0, 2.0, 0.0]], atol=1e-6)
    np.testing.assert_array_equal(grad(jnp.log(ratio), 1.0, 3.0), grad(jnp.log(ratio), 1.0, None))


def test_imitation_gain_is_shaped_by_the_policy_s_own_probability():
    probability, mask = jnp.array([[0.1, 0.9, 0.5]]), jnp.array([[1, 1, 0]])
    loss = lambda logprobs: grpo.imitation_gain(logprobs, jnp.array([2.0]), mask, gamma=0.1, aggregation="token")
    assert float(loss(jnp.log(probability))) == pytest.approx(-(2 * 0.5 + 2 * 0.9) / 2)
    # d/d log p of p/(p + gamma) is p gamma / (p + gamma)^2: .25 where p = gamma, .09 at .9.
    np.testing.assert_allclose(jax.grad(loss)(jnp.log(probability)), [[-0.25, -0.09, 0.0]], atol=1e-6)
    poisoned = jnp.array([[-1.0, -1.0, jnp.nan]])
    assert np.isfinite(jax.grad(loss)(poisoned)).all()


def test_group_std_is_exactly_zero_where_tied():
    got = grpo.group_std(jnp.array([[0.9, 0.5, 0.1, -0.2], [0.7, 0.7, 0.7, 0.7]]))
    np.testing.assert_allclose(got, [[0.414578], [0.0]], atol=1e-6)
    assert got[1, 0] == 0.0
