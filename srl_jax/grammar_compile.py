"""From bytes to tokens: the table of what each token does in each state of a byte automaton.

Host side, numpy only. Each token's bytes are run through the automaton from *all* states at once; tokens with the
same outcome everywhere are one class, so the table is [states, classes] instead of [states, vocabulary]. Then two
distances are solved for each state: the tokens still needed to finish, and to leave the think text. With them the
sampler never enters a state it cannot finish from (`grammar.allowed_tokens`).

Registers (see `grammar_dfa`) make the distances a small game: in a half-written metavariable name only some bound
name is known to have that prefix, not which. The distance counts the worst of them, so it is an upper bound that is
always kept: from every state some allowed token leads to a state of smaller distance.
"""

import contextlib
import hashlib
import os
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from srl_jax.grammar_dfa import (
    DEAD,
    GRAMMAR_VERSION,
    TAG_SYMBOL,
    ByteAutomaton,
    GrammarConfig,
    build_trace_automaton,
)
from srl_jax.grammar_strings import Effect, compose
from srl_jax.tokenizer import Tokenizer
from srl_jax.trace import MAX_JSON_BYTES

UNREACHABLE = 32767  # distance of states that cannot finish; larger than any budget
MAX_OPENED_BRACKETS = 64
MAX_COMMAS = 15  # 16 items
MAX_TOKEN_BYTES = 127
BLOCK = 16  # columns of a stored stretch of next states
_EFFECTS = 1 << 15  # more than there are: two numbers of effects become one
_ROWS_AT_ONCE = 2048  # outcomes computed together: few enough to stay in the cache


@dataclass(frozen=True)
class TokenTables:
    """What `grammar.TokenAutomaton` holds, as numpy. S states (0 dead), C classes (0 forbidden), E effects.

    Tokens of one class and one length in bytes are one kind (K kinds): kind_of_token int16 [V];
    class_of_kind int16 [K], bytes_of_kind uint8 [K];
    blocks int16 [U, BLOCK], block_row int16 [S, C / BLOCK]: the next states [S, C], cut into stretches of columns of
    which each different one is stored once: most states let nothing but a few tokens through;
    effect uint8 [R, C] for the R different rows of effects, effect_row int16 [S];
    effects int32 [E, 6]: the fields of `grammar_dfa.Effect`;
    distance_to_end, distance_to_think_end int16 [S]; in_think, string, list: of `Place`, per state;
    string_cap int32 [S]: most bytes of the string a state is inside;
    string_need int16 [S]: bytes its string may still get on the shortest way out of it.
    json_cap: bytes of JSON from which only the shortest way out is left.
    """

    kind_of_token: np.ndarray
    class_of_kind: np.ndarray
    bytes_of_kind: np.ndarray
    blocks: np.ndarray
    block_row: np.ndarray
    effect_row: np.ndarray
    effect: np.ndarray
    effects: np.ndarray
    distance_to_end: np.ndarray
    distance_to_think_end: np.ndarray
    in_think: np.ndarray
    string: np.ndarray
    list: np.ndarray
    string_cap: np.ndarray
    string_need: np.ndarray
    scalars: np.ndarray  # start state, end state, json_cap

    @property
    def next_state(self) -> np.ndarray:
        """The next states, whole: int16 [S, C]."""
        return self.blocks[self.block_row].reshape(len(self.block_row), -1)

    def save(self, path: Path) -> None:
        """Writes an .npz atomically."""
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez_compressed(file, **self.__dict__)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: Path) -> "TokenTables | None":
        """The tables of a cache file; None when it is missing or damaged (they are then compiled again)."""
        try:
            with path.open("rb") as file, np.load(file) as stored:
                return cls(**{name: stored[name] for name in cls.__dataclass_fields__})
        except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile):
            return None


def trace_tables(tokenizer: Tokenizer, config: GrammarConfig, cache_dir: Path) -> TokenTables:
    """The tables of the trace grammar for `tokenizer`, from `cache_dir` when they are there."""
    parts = (GRAMMAR_VERSION, tokenizer.fingerprint, astuple(config))
    path = cache_dir / f"grammar-{hashlib.sha256(repr(parts).encode()).hexdigest()[:32]}.npz"
    tables = TokenTables.load(path)
    if tables is None:
        automaton = build_trace_automaton(config, atomic_tags=bool(tokenizer.tag_ids))
        tables = compile_tokens(automaton, token_symbols(tokenizer), tokenizer.eos_id)
        with contextlib.suppress(OSError):  # a cache that cannot be written only costs the next start a second
            tables.save(path)
    return tables


def token_symbols(tokenizer: Tokenizer) -> list[tuple[int, ...] | None]:
    """Per token the automaton's symbols: its bytes, a tag's symbol, or None where a trace can never hold it."""
    symbols = [None if not raw or len(raw) > MAX_TOKEN_BYTES else tuple(raw) for raw in tokenizer.token_bytes]
    for index, token in enumerate(tokenizer.tag_ids):
        symbols[token] = (TAG_SYMBOL + index,)
    return symbols


def compile_tokens(
    automaton: ByteAutomaton,
    symbols: Sequence[tuple[int, ...] | None],
    eos_id: int,
    json_limit: int = MAX_JSON_BYTES,
) -> TokenTables:
    """Tables for tokens that spell `symbols`. After the end only `eos_id` is allowed, and stays there.

    Raises:
      ValueError: when the tokens cannot spell any trace.
    """
    classes, next_state, effect, effects = _classes(automaton, symbols)
    ends = next_state[:, classes[eos_id], None].copy()  # all dead, unless the end token spells something
    ends[automaton.end] = automaton.end
    classes[eos_id] = next_state.shape[1]
    next_state = np.concatenate([next_state, ends], axis=1)
    effect = np.concatenate([effect, np.zeros_like(ends)], axis=1)

    keep = _reachable(next_state, automaton.start)
    keep[automaton.end] = True
    states = np.concatenate([[DEAD], np.flatnonzero(keep)])
    renumber = np.zeros(len(next_state), np.int64)
    renumber[states] = np.arange(len(states))
    next_state, effect = renumber[next_state[states]], effect[states]
    classes, next_state, effect = _merge_columns(classes, next_state, effect)
    # Whole blocks; no token is of the classes added.
    next_state, effect = (np.pad(table, ((0, 0), (0, -table.shape[1] % BLOCK))) for table in (next_state, effect))
    places = [automaton.places[state] for state in states]
    end = int(renumber[automaton.end])

    token_bytes = np.array([0 if s is None or s[0] >= TAG_SYMBOL else len(s) for s in symbols], np.int64)
    least_bytes = np.full(next_state.shape[1], MAX_TOKEN_BYTES, np.int64)
    np.minimum.at(least_bytes, classes, token_bytes)
    in_think = np.array([place.think for place in places])
    solver = _Solver(next_state, effect, effects, np.array([place.expects for place in places]), least_bytes)
    think_end = solver.think_distance(in_think)
    distance = solver.distance(end, in_think, think_end)
    start = int(renumber[automaton.start])
    if distance[start] >= UNREACHABLE:
        raise ValueError("this vocabulary cannot spell a trace: it lacks single-byte tokens for JSON punctuation")
    string = np.array([place.string for place in places])
    need = solver.string_need(distance, string)

    sizes = classes * 256 + np.minimum(token_bytes, 255)
    # A forbidden token of no bytes goes first, so that kind 0 is the forbidden one in every vocabulary.
    kinds, kind_of_token = np.unique(np.concatenate([[0], sizes]), return_inverse=True)
    blocks, block_row = np.unique(next_state.reshape(-1, BLOCK).astype(np.int16), axis=0, return_inverse=True)
    rows, effect_row = np.unique(effect, axis=0, return_inverse=True)
    outside = distance[(distance < UNREACHABLE) & ~in_think].max()
    json_cap = json_limit - int(token_bytes.max()) * (int(outside) + 2)
    if json_cap < json_limit // 8:
        raise ValueError(f"tokens of {token_bytes.max()} bytes leave no room under the limit of the JSON blocks")
    return TokenTables(
        kind_of_token=kind_of_token.ravel()[1:].astype(np.int16),
        class_of_kind=(kinds // 256).astype(np.int16),
        bytes_of_kind=(kinds % 256).astype(np.uint8),
        blocks=blocks,
        block_row=block_row.reshape(len(next_state), -1).astype(np.min_scalar_type(-len(blocks))),
        effect_row=effect_row.ravel().astype(np.int16),
        effect=rows.astype(np.uint8 if len(effects) < 256 else np.int16),
        effects=np.array(effects, np.int64).astype(np.int32),
        distance_to_end=distance.astype(np.int16),
        distance_to_think_end=think_end.astype(np.int16),
        in_think=in_think,
        string=string.astype(np.int8),
        list=np.array([place.list for place in places], np.int8),
        string_cap=np.array([place.cap for place in places], np.int32),
        string_need=need.astype(np.int16),
        scalars=np.array([start, end, json_cap], np.int32),
    )


def _classes(
    automaton: ByteAutomaton, symbols: Sequence[tuple[int, ...] | None]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[Effect]]:
    """Class of each token, and per class the state and effect it leads to from every state.

    The outcome of a prefix is a vector over states; equal vectors are one object, so that each (vector, byte
    column) is computed once however many tokens share it. All tokens go one byte further at a time.
    """
    columns, column_of = np.unique(
        np.concatenate([automaton.next_state, automaton.effect]), axis=1, return_inverse=True
    )
    size, count = len(automaton.next_state), columns.shape[1]
    step_state, step_effect = np.ascontiguousarray(columns.T.astype(np.int16).reshape(count, 2, size).swapaxes(0, 1))
    effects = list(automaton.effects)
    effect_ids = {effect: index for index, effect in enumerate(effects)}
    composed: dict[int, int] = {}

    def composition(pair: int) -> int:
        """Number of the composed effect, -1 when there is none."""
        if pair not in composed:
            first, second = divmod(pair, _EFFECTS)
            effect = compose(effects[first], effects[second])
            if effect is not None and effect not in effect_ids:
                effect_ids[effect] = len(effects)
                effects.append(effect)
            composed[pair] = -1 if effect is None else effect_ids[effect]
        return composed[pair]

    nothing, identity = np.zeros((2, size), np.int16), np.stack([np.arange(size), np.zeros(size)]).astype(np.int16)
    vectors = [nothing, identity]  # number 0 is class 0: forbidden everywhere
    numbers = {vector.tobytes(): index for index, vector in enumerate(vectors)}

    def advance(pairs: list[int]) -> list[int]:
        """Numbers of the vectors that one more byte leads to; a pair is a vector's number and a column."""
        before, column = np.divmod(np.array(pairs), count)
        state, effect = np.stack([vectors[number] for number in before]).swapaxes(0, 1)
        following, edge = step_state[column[:, None], state], step_effect[column[:, None], state]
        total = np.where(edge == 0, effect, edge)
        both = (edge != 0) & (effect != 0)
        found, place = np.unique(effect[both].astype(np.int64) * _EFFECTS + edge[both], return_inverse=True)
        total[both] = np.array([composition(pair) for pair in found.tolist()], np.int16)[place]
        gone = (following == DEAD) | (total < 0)
        following[gone], total[gone] = DEAD, 0
        after = []
        for vector in np.stack([following, total], axis=1):
            number = numbers.setdefault(vector.tobytes(), len(vectors))
            if number == len(vectors):
                vectors.append(vector.copy())
            after.append(number)
        return after

    spelled = np.array([token for token, text in enumerate(symbols) if text])
    lengths = np.array([len(symbols[token]) for token in spelled])
    text = column_of.ravel()[np.fromiter(chain.from_iterable(filter(None, symbols)), np.int64, lengths.sum())]
    starts = np.cumsum(lengths) - lengths
    reached = np.ones(len(spelled), np.int64)  # the identity
    memo: dict[int, int] = {}
    for depth in range(lengths.max(initial=0)):
        (live,) = np.nonzero(lengths > depth)
        pairs, place = np.unique(reached[live] * count + text[starts[live] + depth], return_inverse=True)
        new = [pair for pair in pairs.tolist() if pair not in memo]
        for start in range(0, len(new), _ROWS_AT_ONCE):
            some = new[start : start + _ROWS_AT_ONCE]
            memo.update(zip(some, advance(some), strict=True))
        reached[live] = np.array([memo[pair] for pair in pairs.tolist()])[place]
    classes = np.zeros(len(symbols), np.int64)
    classes[spelled] = reached
    used, classes = np.unique(np.concatenate([[0], classes]), return_inverse=True)
    state, effect = np.stack([vectors[number] for number in used], axis=2).astype(np.int64)
    return classes.ravel()[1:], state, effect, effects


def _reachable(next_state: np.ndarray, start: int) -> np.ndarray:
    """Mask of the states that tokens reach from `start`; DEAD is never in it."""
    reached = np.zeros(len(next_state), bool)
    pending = [start]
    reached[start] = True
    while pending:
        for state in np.unique(next_state[pending.pop()]).tolist():
            if state != DEAD and not reached[state]:
                reached[state] = True
                pending.append(state)
    return reached


def _merge_columns(
    classes: np.ndarray, next_state: np.ndarray, effect: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Joins classes that dropped states alone told apart; class 0 stays the forbidden one."""
    columns = np.ascontiguousarray(np.concatenate([next_state, effect]).T)
    numbers: dict[bytes, int] = {}
    first: list[int] = []
    renumber = np.zeros(len(columns), np.int64)
    for index, column in enumerate(columns):
        key = column.tobytes()
        if key not in numbers:
            numbers[key] = len(first)
            first.append(index)
        renumber[index] = numbers[key]
    return renumber[classes], next_state[:, first], effect[:, first]


class _Solver:
    """Distances over the token graph, using only tokens that the registers can never forbid.

    Tokens that lead from one state to one other and ask for the same names are one edge, with the bytes of the
    shortest: the arrays are [N], in the order of the states they leave.
    """

    def __init__(
        self,
        next_state: np.ndarray,
        effect: np.ndarray,
        effects: list[Effect],
        expects: np.ndarray,
        least_bytes: np.ndarray,
    ):
        needs, need_of_effect = np.unique([what.needs for what in effects], return_inverse=True)
        # Left out: what grows a register, and the few that need two names at once.
        grows = np.array([what.opens > 0 or what.commas > 0 or what.also > 0 for what in effects])
        source, column = np.nonzero((next_state != DEAD) & ~grows[effect])
        states = self.count = len(next_state)
        edges = (source * states + next_state[source, column]) * len(needs) + need_of_effect[effect[source, column]]
        edges, place = np.unique(edges, return_inverse=True)
        self.bytes = np.full(len(edges), MAX_TOKEN_BYTES)
        np.minimum.at(self.bytes, place, least_bytes[column])
        edges, need = np.divmod(edges, len(needs))
        self.source, self.target = np.divmod(edges, states)
        self.needs = needs[need]
        self.left, self.first = np.unique(self.source, return_index=True)
        # Where one of several names is known to be bound, every single one must leave a way.
        self.games = [
            (state, slice(*np.searchsorted(self.source, (state, state + 1))), names)
            for state, names in (
                (s, [1 << bit for bit in range(31) if mask >> bit & 1]) for s, mask in enumerate(expects)
            )
            if names
        ]

    def worst(self, values: np.ndarray, allowed: np.ndarray) -> np.ndarray:
        """Per state the least of `values` [N] over edges in `allowed`, for the least helpful bound name."""
        result = np.full(self.count, UNREACHABLE)
        certain = np.where(allowed & (self.needs == 0), values, UNREACHABLE)
        result[self.left] = np.minimum.reduceat(certain, self.first)
        for state, edges, names in self.games:
            needs = self.needs[edges]
            outcomes = [
                values[edges][allowed[edges] & ((needs == 0) | (needs & name != 0))].min(initial=UNREACHABLE)
                for name in names
            ]
            result[state] = max(outcomes)
        return result

    def _solve(self, cost: np.ndarray, final: np.ndarray, allowed: np.ndarray) -> np.ndarray:
        """Least total cost to a state of `final`; `cost` [N] is 0 or 1."""
        distance = np.where(final, 0, UNREACHABLE)
        while True:
            through = np.minimum(distance[self.target] + cost, UNREACHABLE)
            better = np.where(final, 0, np.minimum(distance, self.worst(through, allowed)))
            if np.array_equal(better, distance):
                return distance
            distance = better

    def think_distance(self, in_think: np.ndarray) -> np.ndarray:
        """Tokens of think text still needed before it can be closed; 0 outside it."""
        stays = in_think[self.target].astype(np.int64)
        # One pass from outside: a token that leaves costs nothing, one that stays counts.
        final = ~in_think
        return self._solve(stays, final, np.ones_like(self.source, bool))

    def distance(self, end: int, in_think: np.ndarray, think_end: np.ndarray) -> np.ndarray:
        """Tokens to the end state. Inside think text only by tokens that also bring its end nearer, so that one
        token can satisfy both limits."""
        here, following = self.source, self.target
        allowed = ~in_think[here] | ~in_think[following] | (think_end[following] < think_end[here])
        final = np.zeros(self.count, bool)
        final[end] = True
        return self._solve(np.ones_like(following), final, allowed)

    def string_need(self, distance: np.ndarray, string: np.ndarray) -> np.ndarray:
        """Bytes a string still gets on the shortest way out of it; 0 outside strings."""
        need = np.zeros(len(string), np.int64)
        nearer = distance[self.target] < distance[self.source]
        stays = string[self.target] == string[self.source]
        for value in np.unique(distance[(distance > 0) & (distance < UNREACHABLE)]):
            layer = (distance == value) & (string > 0)
            if not layer.any():
                continue
            bytes_used = np.where(stays, self.bytes + need[self.target], self.bytes - 1)
            need = np.where(layer, self.worst(bytes_used, nearer), need)
        return need
