"""Who gets the credit: components of the reward on the blocks they judge, and steps of an episode for what follows.

Pure functions of arrays beside `srl_jax.grpo`, which turns their result into a loss. `P` prompts, `G` completions of
each, `C` reward components, `T` tokens, `E` episodes or ways through them, `S` steps of an episode.
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from srl_jax.grpo import MalformedAdvantage, Mask, group_advantages, group_std

ComponentScale = Literal["none", "std", "components"]


def component_advantages(
    components: Float[Array, "C P G"],
    weights: Float[Array, "C"],
    *,
    scale: ComponentScale = "none",
    valid: Mask | None = None,
    malformed: Mask | None = None,
    malformed_advantage: MalformedAdvantage = "zero",
) -> Float[Array, "C P G"]:
    """w_c (R_c - mean R_c) / s_c for each component; their sum over C is a completion's advantage, KL aside.

    `s_c` is 1 ("none": the sum is then `group_advantages` of R = sum w_c R_c), the group's std of that R ("std", again
    with the same sum), or each component's own std ("components": decoupled, so that a component whose rewards differ
    little is heard as well as one whose rewards differ much; GDPO, arXiv 2601.05242). A tied component gives zeros.
    Masks as in `group_advantages`; a malformed member's components are what the caller gives for them.
    """
    if scale not in get_args(ComponentScale):
        raise ValueError(f"scale={scale!r} is not one of {', '.join(map(repr, get_args(ComponentScale)))}")
    weights = jnp.asarray(weights, jnp.float32)[:, None, None]

    def one(rewards: Float[Array, "P G"]) -> Float[Array, "P G"]:
        own = "std" if scale == "components" else "none"
        return group_advantages(
            rewards, scale=own, valid=valid, malformed=malformed, malformed_advantage=malformed_advantage
        )

    advantages = weights * jax.vmap(one)(components)
    if scale == "std":
        spread = group_std(jnp.sum(weights * components, axis=0), valid)
        advantages = advantages / jnp.where(spread == 0, 1.0, spread)[None]
    return advantages


def spread_over_blocks(
    advantages: Float[Array, "C P G"], whole: Float[Array, "P G"], blocks: Int[Array, "P G T"]
) -> Float[Array, "P G T"]:
    """Each component's advantage on the tokens of its own block, plus `whole` (such as the KL's) on all of them.

    `blocks` holds each token's component in [0, C); a token outside gets `whole` alone.
    """
    count = advantages.shape[0]
    own = jnp.take_along_axis(jnp.moveaxis(advantages, 0, -1), jnp.clip(blocks, 0, count - 1), axis=-1)
    return jnp.where((blocks >= 0) & (blocks < count), own, 0.0) + whole[..., None]


def episode_returns(
    rewards: Float[Array, "E S"], valid: Mask | None = None, *, discount: float = 1.0, horizon: int | None = None
) -> Float[Array, "E S"]:
    """Each step's return: sum over k < horizon of discount^k times the reward k steps later, within its episode.

    `horizon` 1 is the step's own reward, n an n-step return (without a value at its end: the sum is cut there), None
    the whole rest of the episode. `valid` marks the steps an episode has; those after it count nothing and get 0, and
    so does a step that was not scored, whose place in time is kept.
    """
    if horizon is not None and horizon < 1:
        raise ValueError(f"horizon is {horizon}; must be at least 1, or None for whole episodes")
    if not 0.0 <= discount <= 1.0:
        raise ValueError(f"discount is {discount}; must lie in [0, 1]")
    valid = jnp.ones(rewards.shape, bool) if valid is None else jnp.asarray(valid).astype(bool)
    rewards = jnp.where(valid, jnp.asarray(rewards, jnp.float32), 0.0)
    steps = rewards.shape[1]
    ahead = jnp.arange(steps)[:, None] - jnp.arange(steps)[None, :]  # later step minus earlier one
    within = (ahead >= 0) & (ahead < (steps if horizon is None else horizon))
    weights = jnp.where(within, jnp.float32(discount) ** jnp.maximum(ahead, 0), 0.0)
    # highest precision: a TF32 product would round rewards to three digits
    returns = jnp.matmul(rewards, weights, precision=jax.lax.Precision.HIGHEST)
    return jnp.where(valid, returns, 0.0)


def known_returns(
    scored: Mask, present: Mask, *, discount: float = 1.0, horizon: int | None = None
) -> Bool[Array, "E S"]:
    """The steps whose return is a sum of rewards that all are known: [E, S].

    `present` marks the steps an episode has, `scored` those of them that have a reward. One without leaves the return
    of every step that reaches it unknown: a sum over the others would blame or praise for what nobody knows.
    """
    present = jnp.asarray(present).astype(bool)
    missing = present & ~jnp.asarray(scored).astype(bool)
    reach = {"discount": 1.0 if discount > 0 else 0.0, "horizon": horizon}
    return present & (episode_returns(missing.astype(jnp.float32), present, **reach) == 0)
