"""The value head: a linear guess of a prompt's mean reward, for the baseline "value".

It reads the *frozen base's* last hidden state of the prompt, so its inputs do not move while the adapters train, and
costs one prompt pass a step. It is trained on R by gradient steps on the squared error, after it was used: a guess
that had seen its own rewards would bias the gradient.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from srl_jax.model.decoder import Decoder, completion_hidden


def fresh_value(width: int) -> dict:
    """Weights that guess 0 for every prompt."""
    return {"weight": jnp.zeros((width,), jnp.float32), "bias": jnp.float32(0.0)}


@partial(jax.jit, static_argnames=("decoder",))
def prompt_features(
    decoder: Decoder, params: dict, prompt_tokens: Int[Array, "P Lp"], prompt_lengths: Int[Array, "P"]
) -> Float[Array, "P D"]:
    """The base's final hidden state at each prompt's last token, scaled to unit length."""
    nothing = jnp.zeros((prompt_tokens.shape[0], 1, 1), jnp.int32)
    hidden = completion_hidden(decoder, {"params": params}, prompt_tokens, prompt_lengths, nothing)[:, 0, 0]
    hidden = hidden.astype(jnp.float32)
    return hidden / jnp.maximum(jnp.linalg.norm(hidden, axis=-1, keepdims=True), 1e-6)


def guess(value: dict, features: Float[Array, "P D"]) -> Float[Array, "P"]:
    """The head's guess of each prompt's mean reward."""
    return features @ value["weight"] + value["bias"]


@jax.jit
def learn(
    value: dict, features: Float[Array, "P D"], rewards: Float[Array, "P G"], valid: Bool[Array, "P G"], rate: float
) -> dict:
    """One step towards the prompts' mean rewards; `rate` below 1 is stable, since features have unit length."""
    count = valid.sum(axis=1)
    mean = jnp.where(valid, rewards, 0.0).sum(axis=1) / jnp.maximum(count, 1)
    error = jnp.where(count > 0, mean - guess(value, features), 0.0)
    prompts = jnp.maximum((count > 0).sum(), 1)
    return {
        "weight": value["weight"] + rate * error @ features / prompts,
        "bias": value["bias"] + rate * error.sum() / prompts,
    }
