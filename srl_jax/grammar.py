"""The trace grammar on the device: which tokens may come next, inside the jitted decode loop.

`compile_grammar` turns the grammar (`grammar_dfa`) and a vocabulary (`grammar_compile`) into a `TokenAutomaton`,
a pytree of small tables. `GrammarState` is where each row stands. Everything else here is pure array code: any
leading shape, no host call, works under jit, vmap and scan.

A token is allowed only if the trace can still be finished afterwards: within the tokens left, within the think
text's own limit, and within every limit of the parser. So a completion sampled under the masks always parses, as
long as its budget is at least `shortest_trace(automaton)`; a mask is then never empty. After the end only the end
token is allowed, so that finished rows stay finite.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from srl_jax import assets
from srl_jax.grammar_compile import (
    MAX_COMMAS,
    MAX_OPENED_BRACKETS,
    UNREACHABLE,
    TokenTables,
    compile_tokens,
    trace_tables,
)
from srl_jax.grammar_dfa import (
    DEAD,
    NOWHERE,
    SYMBOLS,
    TAG_SYMBOL,
    ByteAutomaton,
    GrammarConfig,
)
from srl_jax.grammar_strings import NO_EFFECT, Effect
from srl_jax.tokenizer import Tokenizer
from srl_jax.trace import STOP, TAGS

_NO_LIMIT = 1 << 20


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "kind_of_token",
        "class_of_kind",
        "bytes_of_kind",
        "count_of_kind",
        "token_of_kind",
        "blocks",
        "block_row",
        "effect_row",
        "effect",
        "needs",
        "binds",
        "unbinds",
        "opens",
        "commas",
        "also",
        "distance_to_end",
        "distance_to_think_end",
        "in_think",
        "string",
        "list",
        "string_cap",
        "string_need",
    ],
    meta_fields=["start_state", "end_state", "json_cap"],
)
@dataclass(frozen=True, eq=False)
class TokenAutomaton:
    """Tables of a token automaton: V tokens of K kinds in C classes, S states. See `grammar_compile.TokenTables`.

    count_of_kind: tokens of each kind; token_of_kind: one of them.
    """

    kind_of_token: Int[Array, "V"]
    class_of_kind: Int[Array, "K"]
    bytes_of_kind: Int[Array, "K"]
    count_of_kind: Int[Array, "K"]
    token_of_kind: Int[Array, "K"]
    blocks: Int[Array, "U w"]
    block_row: Int[Array, "S C/w"]
    effect_row: Int[Array, "S"]
    effect: Int[Array, "R C"]
    needs: Int[Array, "E"]
    binds: Int[Array, "E"]
    unbinds: Int[Array, "E"]
    opens: Int[Array, "E"]
    commas: Int[Array, "E"]
    also: Int[Array, "E"]
    distance_to_end: Int[Array, "S"]
    distance_to_think_end: Int[Array, "S"]
    in_think: Bool[Array, "S"]
    string: Int[Array, "S"]
    list: Int[Array, "S"]
    string_cap: Int[Array, "S"]
    string_need: Int[Array, "S"]
    start_state: int
    end_state: int
    json_cap: int

    def following(self, state: Int[Array, "..."]) -> Int[Array, "... C"]:
        """The next state for each class, 0 where it is forbidden."""
        return self.blocks[self.block_row[state]].reshape(*state.shape, -1)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "state",
        "remaining",
        "think_remaining",
        "bound",
        "string_bytes",
        "json_bytes",
        "brackets",
        "commas",
    ],
    meta_fields=[],
)
@dataclass(frozen=True, eq=False)
class GrammarState:
    """Where rows stand, before their next token. All fields int32 of one shape.

    state: automaton state. remaining: tokens left in the budget. think_remaining: tokens of think text left.
    bound: bit mask of the metavariables the pattern binds. string_bytes: at least the bytes of the JSON string
    being written. json_bytes: bytes since the think text. brackets: opened in the pattern. commas: in the list.
    """

    state: Int[Array, "..."]
    remaining: Int[Array, "..."]
    think_remaining: Int[Array, "..."]
    bound: Int[Array, "..."]
    string_bytes: Int[Array, "..."]
    json_bytes: Int[Array, "..."]
    brackets: Int[Array, "..."]
    commas: Int[Array, "..."]


def compile_grammar(
    tokenizer: Tokenizer,
    config: GrammarConfig | None = None,
    *,
    vocab_size: int | None = None,
    cache_dir: str | Path | None = None,
) -> TokenAutomaton:
    """The automaton of canonical traces over `tokenizer`'s ids.

    `vocab_size` is the width of the model's logits when it is padded beyond the tokenizer's; the padding is never
    allowed. Tables are kept in `cache_dir`, by default `assets.cache_dir() / "grammar"`.
    """
    folder = Path(cache_dir) if cache_dir else assets.cache_dir() / "grammar"
    return _to_device(trace_tables(tokenizer, config or GrammarConfig(), folder), vocab_size)


def free_automaton(tokenizer: Tokenizer, *, vocab_size: int | None = None) -> TokenAutomaton:
    """Unconstrained sampling behind the same interface: every token is allowed, until the end.

    The end is the `</state_update>` tag, the same as text (across token boundaries too), or the end token.
    """
    stop = STOP.encode()
    start, end = 1, 1 + len(stop)
    next_state = np.full((end + 1, SYMBOLS), end, np.int32)
    next_state[DEAD] = DEAD
    for length in range(len(stop)):
        for byte in range(256):
            spelled = stop[:length] + bytes([byte])
            while not stop.startswith(spelled):
                spelled = spelled[1:]
            next_state[start + length, byte] = start + len(spelled)
        next_state[start + length, TAG_SYMBOL:] = start
        next_state[start + length, TAG_SYMBOL + TAGS.index(STOP)] = end
    places = [NOWHERE] * len(next_state)
    machine = ByteAutomaton(next_state, np.zeros_like(next_state), [NO_EFFECT], places, start, end)
    # A special token is no part of the tag's text, like the symbol of another tag.
    symbols = [tuple(raw) if raw else (TAG_SYMBOL,) for raw in tokenizer.token_bytes]
    for index, token in enumerate(tokenizer.tag_ids):
        symbols[token] = (TAG_SYMBOL + index,)
    symbols[tokenizer.eos_id] = (TAG_SYMBOL + TAGS.index(STOP),)
    tables = compile_tokens(machine, symbols, tokenizer.eos_id, json_limit=_NO_LIMIT)
    # Any state may be the last one.
    nearest = np.where(np.arange(len(tables.distance_to_end)) == DEAD, UNREACHABLE, 0).astype(np.int16)
    return _to_device(replace(tables, distance_to_end=nearest), vocab_size)


def _to_device(tables: TokenTables, vocab_size: int | None) -> TokenAutomaton:
    padding = 0 if vocab_size is None else vocab_size - len(tables.kind_of_token)
    if padding < 0:
        raise ValueError(f"vocab_size is {vocab_size}, but the tokenizer has {len(tables.kind_of_token)} ids")
    tables = replace(tables, kind_of_token=np.pad(tables.kind_of_token, (0, padding)))  # kind 0 is forbidden
    arrays = {name: jnp.asarray(value) for name, value in tables.__dict__.items() if name not in ("effects", "scalars")}
    effects = {name: jnp.asarray(tables.effects[:, column]) for column, name in enumerate(Effect._fields)}
    start, end, json_cap = map(int, tables.scalars)
    kinds = len(tables.class_of_kind)
    token_of_kind = np.zeros(kinds, np.int32)
    token_of_kind[tables.kind_of_token] = np.arange(len(tables.kind_of_token))
    return TokenAutomaton(
        **arrays,
        **effects,
        count_of_kind=jnp.asarray(np.bincount(tables.kind_of_token, minlength=kinds).astype(np.int32)),
        token_of_kind=jnp.asarray(token_of_kind),
        start_state=start,
        end_state=end,
        json_cap=json_cap,
    )


def initial_state(
    automaton: TokenAutomaton, batch_size: int, max_new_tokens: int, max_think_tokens: int
) -> GrammarState:
    """The state of `batch_size` rows before their first token, which is the opening `<think>`.

    `max_new_tokens` counts every token of the completion, `max_think_tokens` those between the think tags (with
    textual tags, the unfinished closing tag counts too). See `check_budget`.
    """
    rows = jnp.zeros((batch_size,), jnp.int32)
    return GrammarState(
        state=rows + automaton.start_state,
        remaining=rows + max_new_tokens,
        think_remaining=rows + max_think_tokens,
        bound=rows,
        string_bytes=rows,
        json_bytes=rows,
        brackets=rows,
        commas=rows,
    )


def shortest_trace(automaton: TokenAutomaton) -> int:
    """Tokens of the shortest trace: the least `max_new_tokens`."""
    return int(automaton.distance_to_end[automaton.start_state])


def shortest_think(automaton: TokenAutomaton) -> int:
    """Tokens of think text in a shortest trace: the least `max_think_tokens`."""
    next_state = np.asarray(automaton.following(jnp.arange(len(automaton.block_row))))
    distance = np.asarray(automaton.distance_to_end)
    state = automaton.start_state
    while not automaton.in_think[state]:
        state = int(next_state[state, distance[next_state[state]].argmin()])
    return int(automaton.distance_to_think_end[state])


def check_budget(automaton: TokenAutomaton, max_new_tokens: int, max_think_tokens: int) -> None:
    """Host-side check of what `initial_state` will be given.

    Raises:
      ValueError: when no trace fits, so that the very first mask would be empty.
    """
    least, least_think = shortest_trace(automaton), shortest_think(automaton)
    if max_new_tokens < least:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; the shortest trace takes {least} tokens")
    if max_think_tokens < least_think:
        raise ValueError(f"max_think_tokens is {max_think_tokens}; at least {least_think} are needed")
    if max_new_tokens >= UNREACHABLE:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; at most {UNREACHABLE - 1}")


def token_room(automaton: TokenAutomaton, state: GrammarState) -> Int[Array, "... C"]:
    """Per class the most bytes its token may have in this state, -1 where the class is forbidden."""
    here = state.state[..., None]
    following = automaton.following(state.state).astype(jnp.int32)
    effect = automaton.effect[automaton.effect_row[state.state]].astype(jnp.int32)
    # When the JSON is nearly full, what is left of the budget is just enough to finish.
    full = (state.json_bytes > automaton.json_cap) & ~automaton.in_think[state.state]
    distance_here = automaton.distance_to_end[state.state].astype(jnp.int32)
    budget = jnp.where(full, jnp.minimum(state.remaining, distance_here), state.remaining)
    budget = jnp.where(state.state == automaton.end_state, 1, budget)[..., None]
    distance = automaton.distance_to_end[following].astype(jnp.int32)
    needs = automaton.needs[effect]
    stays_in_think = automaton.in_think[here] & automaton.in_think[following]
    think_left = state.think_remaining[..., None] - stays_in_think
    allowed = (
        (following != DEAD)
        & (distance < budget)
        & (automaton.distance_to_think_end[following] <= think_left)
        & ((needs == 0) | (needs & state.bound[..., None] != 0))
        & (automaton.also[effect] & ~state.bound[..., None] == 0)
        & (state.brackets[..., None] + automaton.opens[effect] <= MAX_OPENED_BRACKETS)
        & ((automaton.commas[effect] == 0) | (state.commas[..., None] + automaton.commas[effect] <= MAX_COMMAS))
    )
    # A closing quote is the one byte of the token that the string left behind does not get.
    leaves = (automaton.string[here] != automaton.string[following]) | (automaton.commas[effect] > 0)
    in_old = automaton.string[here] > 0
    old_room = automaton.string_cap[here] - state.string_bytes[..., None] + leaves
    old_room = old_room - jnp.where(leaves, 0, automaton.string_need[following])
    new_room = automaton.string_cap[following] - automaton.string_need[following]
    enters = (automaton.string[following] > 0) & leaves
    room = jnp.where(in_old, old_room, _NO_LIMIT)
    room = jnp.minimum(room, jnp.where(enters, new_room, _NO_LIMIT))
    return jnp.where(allowed, room, -1)


def allowed_kinds(automaton: TokenAutomaton, state: GrammarState) -> Bool[Array, "... K"]:
    """Kinds of tokens (same class, same length) that may come next: all that `allowed_tokens` depends on."""
    room = jnp.take(token_room(automaton, state), automaton.class_of_kind.astype(jnp.int32), axis=-1)
    return room >= jnp.expand_dims(automaton.bytes_of_kind.astype(jnp.int32), range(room.ndim - 1))


def allowed_tokens(automaton: TokenAutomaton, state: GrammarState) -> Bool[Array, "... V"]:
    """Tokens that may come next. Never all False before the end, if the budget sufficed at the start."""
    kinds = _materialised(allowed_kinds(automaton, state))
    return jnp.take(kinds, automaton.kind_of_token.astype(jnp.int32), axis=-1, mode="clip")


def only_token(automaton: TokenAutomaton, state: GrammarState) -> Int[Array, "..."]:
    """The one token that may come next, -1 where there are several."""
    kinds = allowed_kinds(automaton, state)
    count = jnp.where(kinds, automaton.count_of_kind, 0).sum(axis=-1)
    return jnp.where(count == 1, jnp.where(kinds, automaton.token_of_kind, 0).max(axis=-1), -1)


def _materialised(mask: Bool[Array, "... K"]) -> Bool[Array, "... K"]:
    """The same mask, computed once.

    XLA would fuse all of `allowed_kinds` into the gather over the vocabulary and compute it anew for each token
    (20 ms instead of 0.7 for 16 rows on 2 cores), and XLA:CPU drops `optimization_barrier`. It never fuses
    through a matrix product, so one with the 8 x 8 identity stands between; 0 and 1 survive in any precision.
    """
    k = mask.shape[-1]
    padded = jnp.pad(mask.astype(jnp.float32), [(0, 0)] * (mask.ndim - 1) + [(0, -k % 8)])
    blocks = padded.reshape(*mask.shape[:-1], -1, 8) @ jnp.eye(8)
    return blocks.reshape(*mask.shape[:-1], -1)[..., :k] > 0.5


def advance(automaton: TokenAutomaton, state: GrammarState, token: Int[Array, "..."]) -> GrammarState:
    """The state after `token`. A token that is not allowed by the grammar leads to the dead state for good."""
    kind = automaton.kind_of_token[token].astype(jnp.int32)
    token_class = automaton.class_of_kind[kind].astype(jnp.int32)
    width = automaton.blocks.shape[1]
    block = automaton.block_row[state.state, token_class // width].astype(jnp.int32)
    following = automaton.blocks[block, token_class % width].astype(jnp.int32)
    effect = automaton.effect[automaton.effect_row[state.state], token_class].astype(jnp.int32)
    size = automaton.bytes_of_kind[kind].astype(jnp.int32)
    in_think = automaton.in_think[state.state]
    stays_in_string = (automaton.string[state.state] == automaton.string[following]) & (automaton.commas[effect] == 0)
    same_list = automaton.list[state.state] == automaton.list[following]
    return GrammarState(
        state=following,
        remaining=jnp.maximum(state.remaining - 1, 0),
        think_remaining=state.think_remaining - (in_think & automaton.in_think[following]),
        bound=(state.bound & ~automaton.unbinds[effect]) | automaton.binds[effect],
        string_bytes=jnp.where(stays_in_string, state.string_bytes, 0) + size,
        json_bytes=jnp.where(automaton.in_think[following], 0, state.json_bytes + size),
        brackets=state.brackets + automaton.opens[effect],
        commas=jnp.where(same_list, state.commas, 0) + automaton.commas[effect],
    )


def is_done(automaton: TokenAutomaton, state: GrammarState) -> Bool[Array, "..."]:
    """Whether nothing more is to be sampled: the trace is complete, or the budget is spent.

    The two differ for the free automaton only; `state.state == automaton.end_state` tells a complete one.
    """
    return (state.state == automaton.end_state) | (state.remaining <= 0)


def replay(
    automaton: TokenAutomaton, tokens: Int[Array, "B T"], max_new_tokens: int, max_think_tokens: int
) -> GrammarState:
    """The state *before* each of the given tokens, fields [B, T]: the masks the sampler used, once more."""

    def step(state, token):
        return advance(automaton, state, token), state

    start = initial_state(automaton, tokens.shape[0], max_new_tokens, max_think_tokens)
    _, states = jax.lax.scan(step, start, tokens.T)
    return jax.tree.map(lambda field: jnp.swapaxes(field, 0, 1), states)
