"""What the grammar costs: building its tables for three vocabularies, their size, and the mask of one step."""

import dataclasses
import tempfile
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from srl_jax import assets, grammar
from srl_jax.tokenizer import Tokenizer, load_tokenizer

VOCABULARIES = (49_158, 128_256, 151_936)  # SmolLM2 with its tags; the sizes of Llama 3 and Qwen2.5
_STEPS = 200
_LONGEST = 32  # bytes of a made-up token


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What a grammar is compiled from: the part of a `Tokenizer` that `compile_grammar` reads."""

    token_bytes: list[bytes | None]
    tag_ids: tuple[int, ...]
    eos_id: int
    fingerprint: str

    @property
    def vocab_size(self) -> int:
        return len(self.token_bytes)


def widened(tokenizer: Tokenizer, size: int, seed: int = 0) -> Vocabulary:
    """The tokenizer's vocabulary and as many further tokens as reach `size`: two of its tokens joined, none twice.

    Joins span the boundaries of JSON and of words as a larger vocabulary's own tokens do, and there are more odd ones
    among them, so tables of a real vocabulary of that size are rather smaller.
    """
    made = list(tokenizer.token_bytes)
    known = set(made)
    parts = [raw for raw in made if raw and len(raw) <= _LONGEST // 2]
    rng = np.random.default_rng(seed)
    while len(made) < size:
        first, second = rng.integers(0, len(parts), 2)
        joined = parts[first] + parts[second]
        if joined not in known:
            known.add(joined)
            made.append(joined)
    return Vocabulary(made, tokenizer.tag_ids, tokenizer.eos_id, f"{tokenizer.fingerprint} widened to {size}")


@partial(jax.jit, static_argnames=("count", "masked"))
def steps(automaton, scores, count: int, masked: bool):
    """So many steps of greedy sampling from the same scores, with the mask or without."""

    def step(_, carry):
        state, total = carry
        allowed = grammar.allowed_tokens(automaton, state) if masked else jnp.ones(scores.shape, bool)
        chosen = jnp.argmax(jnp.where(allowed, scores + total[:, None] * 1e-9, -jnp.inf), axis=-1).astype(jnp.int32)
        if not masked:
            return state, total + chosen
        only = grammar.only_token(automaton, state)  # as the sampler asks at every step, whatever the answer
        return grammar.advance(automaton, state, jnp.where(only >= 0, only, chosen)), total + chosen

    start = grammar.initial_state(automaton, scores.shape[0], 16_000, 8_000)
    return jax.lax.fori_loop(0, count, step, (start, jnp.zeros(scores.shape[0])))


def measure(rows: int) -> list[dict[str, float]]:
    """One record for each of `VOCABULARIES`; the mask's milliseconds are of one step of so many rows.

    They are taken in a loop that does nothing but mask, choose, ask for a forced token and advance, less the same loop
    without any of it.
    """
    tokenizer = load_tokenizer(assets.fetch("smollm2-135m-instruct"))
    records = []
    for size in VOCABULARIES:
        vocabulary = widened(tokenizer, size)
        with tempfile.TemporaryDirectory() as empty:  # a cache that holds nothing yet
            started = time.perf_counter()
            automaton = jax.block_until_ready(grammar.compile_grammar(vocabulary, cache_dir=empty))
            seconds = time.perf_counter() - started
        scores = jax.random.normal(jax.random.key(0), (rows, size))
        per_step = {}
        for masked in (True, False):
            jax.block_until_ready(steps(automaton, scores, _STEPS, masked))
            times = []
            for _ in range(5):
                began = time.perf_counter()
                jax.block_until_ready(steps(automaton, scores, _STEPS, masked))
                times.append(time.perf_counter() - began)
            per_step[masked] = min(times) / _STEPS * 1e3
        records.append(
            {
                "tokens": size,
                "build s": seconds,
                "states": automaton.block_row.shape[0],
                "classes": automaton.block_row.shape[1] * automaton.blocks.shape[1],
                "device bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(automaton)),
                "mask ms": per_step[True] - per_step[False],
            }
        )
    return records
