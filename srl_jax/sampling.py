"""Sampling completions under the trace grammar: one shared prefill, then a jitted decode loop.

The distribution sampled is the model's, renormalised over the tokens the grammar allows, at the sampling
temperature; the log-probs returned are those of that same distribution, so training uses exactly what was sampled.
No host call is made per token.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from srl_jax import grammar
from srl_jax.model.decoder import Decoder, encode_prompts, init_cache, logits

_BLOCK = 128  # tokens per block of the two-level inverse CDF


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How completions are drawn. Hashable: a static argument of the jitted sampler.

    Attributes:
      max_new_tokens: T, completion budget in tokens, both tags of the last block included.
      max_think_tokens: budget of the think block.
      temperature: divides the logits; 0 is greedy.
    """

    max_new_tokens: int
    max_think_tokens: int = 512
    temperature: float = 1.0


class Completions(NamedTuple):
    """What was sampled. `mask` is 1 on tokens of the completion, its closing tag included; padding follows.

    `finished` tells completions that reached their end from those that the budget cut off, which only happens without
    the grammar.
    """

    tokens: Int[Array, "P G T"]
    mask: Bool[Array, "P G T"]
    logprobs: Float[Array, "P G T"]
    finished: Bool[Array, "P G"]


def row_keys(key: Array, rows: int) -> Array:
    """One key per row, so that a row's tokens depend on its own key only, whatever its neighbours."""
    return jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(rows))


def draw(probs: Float[Array, "B V"], u: Float[Array, "B 2"]) -> Int[Array, "B"]:
    """Inverse-CDF sample of each row of unnormalised `probs`, from two uniforms in [0, 1) a row.

    Two levels (a block, then a token in it) keep the running sums short: cheaper than Gumbel noise over V, and more
    exact than one float32 sum over it. A token of probability 0 is never drawn.
    """
    batch, vocab = probs.shape
    blocks = -(-vocab // _BLOCK)
    table = jnp.pad(probs, ((0, 0), (0, blocks * _BLOCK - vocab))).reshape(batch, blocks, _BLOCK)

    def pick(weights, fraction):
        sums = jnp.cumsum(weights, axis=-1)
        total = sums[:, -1]
        # u < 1, but u * total may round up to total, which no running sum exceeds.
        target = jnp.minimum(fraction * total, jnp.nextafter(total, jnp.zeros_like(total)))
        return jnp.argmax(sums > target[:, None], axis=-1)

    block = pick(table.sum(-1), u[:, 0])
    within = pick(jnp.take_along_axis(table, block[:, None, None], axis=1)[:, 0], u[:, 1])
    return block * _BLOCK + within


@partial(jax.jit, static_argnames=("decoder", "group_size", "settings", "pad_id"))
def sample(
    decoder: Decoder,
    variables: dict,
    automaton: grammar.TokenAutomaton,
    prompt_tokens: Int[Array, "P Lp"],
    prompt_lengths: Int[Array, "P"],
    key: Array,
    *,
    group_size: int,
    settings: SamplingConfig,
    pad_id: int,
) -> Completions:
    """Draws `group_size` completions for each prompt.

    Args:
      variables: `{"params": ...}`, and `{"lora": ...}` when the adapters are not merged into the params.
      automaton: the grammar; `grammar.free_automaton` samples without constraint.
      prompt_tokens, prompt_lengths: right-padded prompts of at least two tokens.
      key: one JAX PRNG key; with the same key a row gets the same tokens whatever else is in the batch.
      pad_id: written after a completion's end.
    """
    p, _ = prompt_tokens.shape
    b, t_max = p * group_size, settings.max_new_tokens
    params = variables["params"]
    keys = row_keys(key, b)
    prefix = encode_prompts(decoder, variables, prompt_tokens, prompt_lengths)
    cache = init_cache(decoder.config, b, t_max, params["embedding"].dtype)
    last = jnp.take_along_axis(prompt_tokens, prompt_lengths[:, None] - 1, axis=1)[:, 0]
    greedy = settings.temperature == 0.0

    def body(carry):
        step, token, state, done, cache, out = carry
        positions = jnp.repeat(prompt_lengths - 1, group_size) + step
        (hidden, _), updated = decoder.apply(
            {**variables, "cache": cache}, token[:, None], positions[:, None], prefix, step, mutable=["cache"]
        )
        scores = logits(decoder.config, params, hidden[:, 0])
        allowed = grammar.allowed_tokens(automaton, state)
        scores = jnp.where(allowed, scores if greedy else scores / settings.temperature, -jnp.inf)
        top = scores.max(axis=-1, keepdims=True)
        weights = jnp.exp(scores - top)
        if greedy:
            chosen = jnp.argmax(scores, axis=-1)
        else:
            uniforms = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, step), (2,)))(keys)
            chosen = draw(weights, uniforms)
        chosen = chosen.astype(jnp.int32)
        score = jnp.take_along_axis(scores, chosen[:, None], axis=-1)[:, 0]
        logprob = score - top[:, 0] - jnp.log(weights.sum(axis=-1))
        chosen = jnp.where(done, pad_id, chosen)
        out = {
            "tokens": out["tokens"].at[:, step].set(chosen),
            "mask": out["mask"].at[:, step].set(~done),
            "logprobs": out["logprobs"].at[:, step].set(jnp.where(done, 0.0, logprob)),
        }
        following = grammar.advance(automaton, state, chosen)
        # A finished row keeps its state; what it would do with padding must not matter.
        state = jax.tree.map(lambda old, new: jnp.where(done, old, new), state, following)
        return step + 1, chosen, state, done | grammar.is_done(automaton, state), updated["cache"], out

    def running(carry):
        step, _, _, done, _, _ = carry
        return (step < t_max) & ~jnp.all(done)

    state = grammar.initial_state(automaton, b, settings.max_new_tokens, settings.max_think_tokens)
    out = {
        "tokens": jnp.full((b, t_max), pad_id, jnp.int32),
        "mask": jnp.zeros((b, t_max), bool),
        "logprobs": jnp.zeros((b, t_max), jnp.float32),
    }
    start = (jnp.int32(0), jnp.repeat(last, group_size), state, jnp.zeros((b,), bool), cache, out)
    _, _, state, _, _, out = jax.lax.while_loop(running, body, start)
    grouped = {name: array.reshape(p, group_size, t_max) for name, array in out.items()}
    finished = state.state == automaton.end_state
    return Completions(**grouped, finished=finished.reshape(p, group_size))
