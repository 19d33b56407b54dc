"""Group Relative Policy Optimization as functions of arrays: no model, no configuration object, no state.

Rewards of a group of completions become advantages, advantages and log-probs become a scalar loss. All
functions are pure, jit friendly and compute in fp32. `P` prompts, `G` completions of each, `B` rows
(completions), `T` tokens.

Sources: GRPO (arXiv 2402.03300), DAPO (2503.14476: token aggregation, clip-higher, dynamic sampling), Dr.GRPO
(2503.20783: no std, constant denominator), GSPO (2507.18071: sequence-level ratio), and for the gradients of
KL estimators 2506.09477, 2510.01555, 2512.21852. SRL (2510.25992) takes the reward elsewhere; here it is a
number.

Two rules hold everywhere. Positions outside a mask may hold anything, NaN included: they are replaced
before any arithmetic, because `0 * nan` is not zero and neither is its gradient. And a denominator counts
the *global* batch: it is computed once by `loss_denominator` and handed to every micro-batch, whose
losses are then *added*. Averaging micro-batches that each divide by their own tokens is a different
(wrong) objective.
"""

from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num

Scale = Literal["none", "std"]
Estimator = Literal["k1", "k2", "k3"]
Aggregation = Literal["token", "sequence", "constant"]
RatioLevel = Literal["token", "sequence"]
MalformedAdvantage = Literal["zero", "penalize"]

Mask = Bool[Array, "..."] | Num[Array, "..."]

# exp of a larger log ratio is not information about the policy but a sign that the two log-probs do not
# belong together; e^20 = 4.9e8 is far outside any clip range and still finite after squaring in fp32.
MAX_LOG_RATIO = 20.0

# Two rewards this close (relative to the group's largest magnitude) differ by rounding on the way to fp32
# only.
TIE_TOLERANCE = 8 * float(jnp.finfo(jnp.float32).eps)


def group_advantages(
    rewards: Float[Array, "P G"],
    kl: Float[Array, "P G"] | None = None,
    *,
    kl_coef: float | Float[Array, ""] = 0.0,
    scale: Scale = "none",
    valid: Mask | None = None,
    malformed: Mask | None = None,
    malformed_advantage: MalformedAdvantage = "zero",
) -> Float[Array, "P G"]:
    """A_i = (R_i - mean R)/s - kl_coef * (K_i - mean K), means over the group.

    `s` is 1 ("none") or the group's *population* standard deviation of R without an epsilon ("std"; the
    worked example of GRPO's form, R = (.9, .5, .1, -.2) -> 1.386952, fixes both). It never includes K:
    dividing by std(R - kl_coef K) would blow the KL's noise up to unit size in a group of equal rewards.
    A tied group (spread within fp32 rounding) has a reward part of exactly zero in both forms.

    `kl` is K, one number a completion (`mean_over_tokens` of an estimate under the sampling policy).
    `valid` marks members that were scored: the others take no part in the means and get 0.
    `malformed` members keep their reward in the group's mean; their own advantage is 0 ("zero") or what the
    formula says ("penalize").

    No gradient flows: advantages are constants of the surrogate.
    """
    _check("scale", scale, Scale)
    _check("malformed_advantage", malformed_advantage, MalformedAdvantage)
    rewards, valid = _scored(rewards, valid)
    deviation = _centred(rewards, valid)
    if scale == "std":
        deviation = deviation / _nonzero(_population_std(rewards, valid))
    advantages = jnp.where(_tied(rewards, valid), 0.0, deviation)
    if kl is not None:
        advantages = advantages - kl_coef * _centred(_masked(kl, valid), valid)
    return _own_advantage(advantages, valid, malformed, malformed_advantage)


def baseline_advantages(
    rewards: Float[Array, "P G"],
    kl: Float[Array, "P G"] | None = None,
    *,
    kl_coef: float | Float[Array, ""] = 0.0,
    values: Float[Array, "P G"] | None = None,
    valid: Mask | None = None,
    malformed: Mask | None = None,
    malformed_advantage: MalformedAdvantage = "zero",
) -> Float[Array, "P G"]:
    """A_i = R_i - V_i - kl_coef * K_i: a value head's baseline, or the research notes' literal form without one.

    `values` predicts R alone, so K is not centred here. Masks as in `group_advantages`.
    """
    _check("malformed_advantage", malformed_advantage, MalformedAdvantage)
    rewards, valid = _scored(rewards, valid)
    advantages = rewards
    if values is not None:
        advantages = advantages - _masked(values, valid)
    if kl is not None:
        advantages = advantages - kl_coef * _masked(kl, valid)
    return _own_advantage(advantages, valid, malformed, malformed_advantage)


def informative_groups(
    rewards: Float[Array, "P G"], min_std: float = 0.02, valid: Mask | None = None
) -> Bool[Array, "P"]:
    """Which groups dynamic sampling keeps: population std of the rewards (before any KL term) above `min_std`."""
    rewards, valid = _scored(rewards, valid)
    return (_population_std(rewards, valid) > min_std)[:, 0]


def group_std(rewards: Float[Array, "P G"], valid: Mask | None = None) -> Float[Array, "P 1"]:
    """The groups' population standard deviation over their valid members, exactly 0 for a tied group."""
    rewards, valid = _scored(rewards, valid)
    return jnp.where(_tied(rewards, valid), 0.0, _population_std(rewards, valid))


def kl_estimate(
    logprobs: Float[Array, "..."], ref_logprobs: Float[Array, "..."], estimator: Estimator
) -> Float[Array, "..."]:
    """Per-token estimate of KL(policy || reference) on tokens sampled from the policy, d = logprobs - ref_logprobs.

    k1 = d (unbiased), k2 = d^2/2 (biased, low variance), k3 = exp(-d) - 1 + d (unbiased, never negative).
    For d = .5: .5, .125, .106531. These are *values*. Differentiating k1 gives zero in expectation and k3
    the gradient of the forward KL; a KL term inside the loss is `kl_loss`.
    """
    _check("estimator", estimator, Estimator)
    d = _f32(logprobs) - _f32(ref_logprobs)
    if estimator == "k1":
        return d
    if estimator == "k2":
        return 0.5 * jnp.square(d)
    # expm1 keeps the digits that exp(-d) - 1 loses near d = 0, where a freshly started policy lives.
    return jnp.expm1(jnp.clip(-d, -MAX_LOG_RATIO, MAX_LOG_RATIO)) + d


def kl_loss(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    ref_logprobs: Float[Array, "B T"],
    completion_mask: Mask,
    *,
    estimator: Estimator,
    aggregation: Aggregation,
    max_length: int | None = None,
    denominator: Float[Array, ""] | None = None,
) -> Float[Array, ""]:
    """A KL(policy || reference) term for the loss whose expected gradient is the KL's own.

    On tokens drawn from the old policy, with r = exp(logprobs - old_logprobs): E[r f] differentiates to
    E_policy[grad log pi * (f + ...)], so k1 and k3 are weighted by the *differentiated* ratio (on policy
    the weight is 1 and only its gradient matters; it supplies the score-function term that makes both
    equal to E[d * grad log pi]). k2's plain gradient is already d * grad log pi and needs the ratio as a
    constant only. The ratio is a token's, not its prefix's, as in the surrogate.
    """
    _check("estimator", estimator, Estimator)
    mask = _as_bool(completion_mask)
    logprobs, old_logprobs, ref_logprobs = (_masked(x, mask) for x in (logprobs, old_logprobs, ref_logprobs))
    ratio = _ratio(logprobs, jax.lax.stop_gradient(old_logprobs))
    if estimator == "k2":
        ratio = jax.lax.stop_gradient(ratio)
    divergence = ratio * kl_estimate(logprobs, jax.lax.stop_gradient(ref_logprobs), estimator)
    return aggregate(divergence, mask, aggregation=aggregation, max_length=max_length, denominator=denominator)


def clipped_surrogate(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B"] | Float[Array, "B T"],
    completion_mask: Mask,
    *,
    clip_epsilon_low: float,
    clip_epsilon_high: float,
    aggregation: Aggregation,
    max_length: int | None = None,
    denominator: Float[Array, ""] | None = None,
    level: RatioLevel = "token",
    negative_ratio_cap: float | None = None,
    token_weights: Float[Array, "B T"] | None = None,
) -> Float[Array, ""]:
    """The PPO-clip loss to minimise: -aggregate(min(r A, clip(r, 1 - eps_low, 1 + eps_high) A)).

    `advantages` is one number a completion, or one a token where blocks of a trace are credited apart.
    `level` "token" uses each token's ratio, "sequence" GSPO's exp(mean over the completion of the log
    ratios), one a row (GSPO wants aggregation "sequence"). `negative_ratio_cap` c (dual clip, arXiv 1912.09729)
    bounds what the minimum leaves unbounded: with A < 0 the gain is at least c A, so that a stale token that the
    policy has come to like is not pushed down by its whole ratio. `token_weights` multiply the per-token loss as
    constants (`truncated_importance_weights`). `aggregation`, `max_length`, `denominator`: see `aggregate`. Rows
    whose mask is all zero contribute nothing and count nowhere; if no row is left the loss is 0 with zero gradient.
    """
    mask = _as_bool(completion_mask)
    ratio = _policy_ratio(logprobs, old_logprobs, mask, level)
    advantages = _per_token(advantages, mask)
    clipped = jnp.clip(ratio, 1.0 - clip_epsilon_low, 1.0 + clip_epsilon_high)
    gain = jnp.minimum(ratio * advantages, clipped * advantages)
    if negative_ratio_cap is not None:
        gain = jnp.where(advantages < 0, jnp.maximum(gain, negative_ratio_cap * advantages), gain)
    if token_weights is not None:
        gain = gain * jax.lax.stop_gradient(_masked(token_weights, mask))
    return -aggregate(gain, mask, aggregation=aggregation, max_length=max_length, denominator=denominator)


def imitation_gain(
    logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B"],
    completion_mask: Mask,
    *,
    gamma: float,
    aggregation: Aggregation,
    max_length: int | None = None,
    denominator: Float[Array, ""] | None = None,
) -> Float[Array, ""]:
    """The loss of rows that no policy of ours sampled, such as a teacher's trace: -aggregate(A pi / (pi + gamma)).

    LUFFY's shaping (arXiv 2504.14945, eq. 6): such rows have no log-probs to form a ratio with, and the policy's own
    probability stands in its place, bent so that tokens the policy finds unlikely keep a gradient
    (gamma / (pi + gamma)^2 times that of pi). Neither clipped nor importance weighted.
    """
    mask = _as_bool(completion_mask)
    probability = jnp.exp(_masked(logprobs, mask))
    gain = _per_token(advantages, mask) * probability / (probability + gamma)
    return -aggregate(gain, mask, aggregation=aggregation, max_length=max_length, denominator=denominator)


def aggregate(
    values: Float[Array, "B T"],
    completion_mask: Mask,
    *,
    aggregation: Aggregation,
    max_length: int | None = None,
    denominator: Float[Array, ""] | None = None,
) -> Float[Array, ""]:
    """One number from per-token values: their sum over the mask, divided by `denominator`.

    For "sequence" each row is divided by its own length first. `denominator` is by default `loss_denominator` of this
    very mask.

    An entropy bonus is `-coef * aggregate(entropy, ...)`, an exact divergence `aggregate(kl, ...)`: the same
    normalisation as the surrogate beside it. With a global denominator the results of micro-batches or
    devices add up to the full batch's.
    """
    mask = _as_bool(completion_mask)
    if denominator is None:
        denominator = loss_denominator(mask, aggregation=aggregation, max_length=max_length)
    values = _masked(values, mask)
    if aggregation == "sequence":
        values = values / jnp.maximum(jnp.sum(mask, axis=-1, keepdims=True), 1)
    return jnp.sum(values) / _nonzero(_f32(denominator))


def loss_denominator(
    completion_mask: Mask, *, aggregation: Aggregation, max_length: int | None = None
) -> Float[Array, ""]:
    """What `aggregate` divides by, for the mask of the *whole* batch (all micro-batches, all devices).

    "token": trained tokens (DAPO). "sequence": completions (GRPO's mean of means). "constant":
    completions * `max_length` (Dr.GRPO; `max_length` is the sampling budget, never the padded width of
    this batch). A row without a trained token is padding, not a completion of length zero, and is not
    counted. 0 for an empty batch; `aggregate` then returns 0.
    """
    _check("aggregation", aggregation, Aggregation)
    mask = _as_bool(completion_mask)
    if aggregation == "token":
        return jnp.sum(mask, dtype=jnp.float32)
    completions = jnp.sum(jnp.any(mask, axis=-1), dtype=jnp.float32)
    if aggregation == "sequence":
        return completions
    if max_length is None:
        raise ValueError('aggregation="constant" divides by max_length; give the sampling budget in tokens')
    return completions * max_length


class ClipFractions(NamedTuple):
    """Shares of trained tokens; add them up over micro-batches when a global `denominator` was given."""

    low: Float[Array, ""]  # ratio under 1 - eps_low with a negative advantage: the gradient is cut
    high: Float[Array, ""]  # ratio over 1 + eps_high with a positive advantage: likewise
    ratio_mean: Float[Array, ""]


def clip_fractions(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B"] | Float[Array, "B T"],
    completion_mask: Mask,
    *,
    clip_epsilon_low: float,
    clip_epsilon_high: float,
    level: RatioLevel = "token",
    denominator: Float[Array, ""] | None = None,
) -> ClipFractions:
    """How much of `clipped_surrogate` is cut off, over trained tokens (`denominator`: their global number)."""
    mask = _as_bool(completion_mask)
    ratio = jax.lax.stop_gradient(_policy_ratio(logprobs, old_logprobs, mask, level))
    advantages = _per_token(advantages, mask)

    def share(values: Array) -> Float[Array, ""]:
        return aggregate(values, mask, aggregation="token", denominator=denominator)

    return ClipFractions(
        low=share((ratio < 1.0 - clip_epsilon_low) & (advantages < 0)),
        high=share((ratio > 1.0 + clip_epsilon_high) & (advantages > 0)),
        ratio_mean=share(ratio),
    )


def mean_over_tokens(values: Float[Array, "B T"], completion_mask: Mask) -> Float[Array, "B"]:
    """Each row's mean over its mask, 0 for an empty row. K of `group_advantages` is this of a `kl_estimate`."""
    mask = _as_bool(completion_mask)
    return jnp.sum(_masked(values, mask), axis=-1) / jnp.maximum(jnp.sum(mask, axis=-1), 1)


def truncated_importance_weights(
    old_logprobs: Float[Array, "B T"], sampler_logprobs: Float[Array, "B T"], cap: float = 2.0
) -> Float[Array, "B T"]:
    """min(pi_old / pi_sampler, cap) per token, without gradient.

    Corrects for a sampler whose arithmetic (or age) differs from the trainer's at the start of the update. Bounded
    above, so that a rare mismatch cannot own the batch.
    """
    return jax.lax.stop_gradient(jnp.minimum(_ratio(_f32(old_logprobs), _f32(sampler_logprobs)), cap))


def effective_sample_size(log_weights: Float[Array, "N"], valid: Mask | None = None) -> Float[Array, ""]:
    """(sum w)^2 / (n sum w^2) in (0, 1]: the share of `n` off-policy samples that is worth having, 0 if n = 0.

    `log_weights` are log(pi / pi_stored), one a sample. Scale free, hence safe for any magnitude.
    """
    valid = jnp.ones(log_weights.shape, bool) if valid is None else _as_bool(valid)
    log_weights = jnp.where(valid, _f32(log_weights), -jnp.inf)
    top = jnp.max(log_weights, initial=-jnp.inf)
    weights = jnp.exp(log_weights - jnp.where(jnp.isfinite(top), top, 0.0))
    count = jnp.sum(valid, dtype=jnp.float32)
    return jnp.square(jnp.sum(weights)) / _nonzero(count * jnp.sum(jnp.square(weights)))


def _check(name: str, value: str, choices: object) -> None:
    if value not in get_args(choices):
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, get_args(choices)))}")


def _f32(x: Array | float) -> Float[Array, "..."]:
    return jnp.asarray(x, jnp.float32)


def _as_bool(mask: Mask) -> Bool[Array, "..."]:
    return jnp.asarray(mask).astype(bool)


def _masked(x: Array, mask: Bool[Array, "..."]) -> Float[Array, "..."]:
    return jnp.where(mask, _f32(x), 0.0)


def _nonzero(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The divisor itself, or 1 where it is 0 (its numerator is then 0 too)."""
    return jnp.where(x == 0, 1.0, x)


def _ratio(logprobs: Float[Array, "..."], old_logprobs: Float[Array, "..."]) -> Float[Array, "..."]:
    return jnp.exp(jnp.clip(logprobs - old_logprobs, -MAX_LOG_RATIO, MAX_LOG_RATIO))


def _policy_ratio(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    level: RatioLevel,
) -> Float[Array, "B T"]:
    _check("level", level, RatioLevel)
    logprobs, old_logprobs = _masked(logprobs, mask), jax.lax.stop_gradient(_masked(old_logprobs, mask))
    if level == "token":
        return _ratio(logprobs, old_logprobs)
    mean_log_ratio = mean_over_tokens(logprobs - old_logprobs, mask)
    ratio = jnp.exp(jnp.clip(mean_log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    return jnp.broadcast_to(ratio[:, None], mask.shape)


def _per_token(advantages: Array, mask: Bool[Array, "B T"]) -> Float[Array, "B T"]:
    advantages = jax.lax.stop_gradient(_f32(advantages))
    if advantages.ndim == 1:
        advantages = advantages[:, None]
    return _masked(jnp.broadcast_to(advantages, mask.shape), mask)


def _scored(rewards: Float[Array, "P G"], valid: Mask | None) -> tuple[Float[Array, "P G"], Bool[Array, "P G"]]:
    valid = jnp.ones(rewards.shape, bool) if valid is None else _as_bool(valid)
    return _masked(rewards, valid), valid


def _group_mean(x: Float[Array, "P G"], valid: Bool[Array, "P G"]) -> Float[Array, "P 1"]:
    count = jnp.maximum(jnp.sum(valid, axis=-1, keepdims=True), 1)
    return jnp.sum(_masked(x, valid), axis=-1, keepdims=True) / count


def _centred(x: Float[Array, "P G"], valid: Bool[Array, "P G"]) -> Float[Array, "P G"]:
    # Measured from the group's smallest member: the mean of n equal fp32 numbers need not be that number, and equal
    # members (rewards or KLs) must centre to exact zeros.
    smallest = jnp.min(x, axis=-1, keepdims=True, where=valid, initial=jnp.inf)
    above = jnp.where(valid, x - smallest, 0.0)
    return _masked(above - _group_mean(above, valid), valid)


def _population_std(x: Float[Array, "P G"], valid: Bool[Array, "P G"]) -> Float[Array, "P 1"]:
    return jnp.sqrt(_group_mean(jnp.square(_centred(x, valid)), valid))


def _tied(x: Float[Array, "P G"], valid: Bool[Array, "P G"]) -> Bool[Array, "P 1"]:
    largest = jnp.max(x, axis=-1, keepdims=True, where=valid, initial=-jnp.inf)
    smallest = jnp.min(x, axis=-1, keepdims=True, where=valid, initial=jnp.inf)
    return largest - smallest <= TIE_TOLERANCE * jnp.maximum(jnp.abs(largest), jnp.abs(smallest))


def _own_advantage(
    advantages: Float[Array, "P G"],
    valid: Bool[Array, "P G"],
    malformed: Mask | None,
    malformed_advantage: MalformedAdvantage,
) -> Float[Array, "P G"]:
    if malformed is not None and malformed_advantage == "zero":
        valid = valid & ~_as_bool(malformed)
    return jax.lax.stop_gradient(_masked(advantages, valid))
