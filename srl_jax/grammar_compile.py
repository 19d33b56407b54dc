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


@dataclass(frozen=True)
class TokenTables:
    """What `grammar.TokenAutomaton` holds, as numpy. S states (0 dead), C classes (0 forbidden), E effects.

    Tokens of one class and one length in bytes are one kind (K kinds): kind_of_token int16 [V];
    class_of_kind int16 [K], bytes_of_kind uint8 [K]; next_state int16 [S, C];
    effect uint8 [R, C] for the R different rows of effects, effect_row int16 [S];
    effects int32 [E, 5]: the fields of `grammar_dfa.Effect`;
    distance_to_end, distance_to_think_end int16 [S]; in_think, string, list: of `Place`, per state;
    string_cap int32 [S]: most bytes of the string a state is inside;
    string_need int16 [S]: bytes its string may still get on the shortest way out of it.
    json_cap: bytes of JSON from which only the shortest way out is left.
    """

    kind_of_token: np.ndarray
    class_of_kind: np.ndarray
    bytes_of_kind: np.ndarray
    next_state: np.ndarray
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
    places = [automaton.places[state] for state in states]
    end = int(renumber[automaton.end])

    token_bytes = np.array([0 if s is None or s[0] >= TAG_SYMBOL else len(s) for s in symbols], np.int64)
    least_bytes = np.full(next_state.shape[1], MAX_TOKEN_BYTES, np.int64)
    np.minimum.at(least_bytes, classes, token_bytes)
    in_think = np.array([place.think for place in places])
    solver = _Solver(next_state, effect, effects, np.array([place.expects for place in places]))
    think_end = solver.think_distance(in_think)
    distance = solver.distance(end, in_think, think_end)
    start = int(renumber[automaton.start])
    if distance[start] >= UNREACHABLE:
        raise ValueError("this vocabulary cannot spell a trace: it lacks single-byte tokens for JSON punctuation")
    string = np.array([place.string for place in places])
    need = solver.string_need(distance, string, least_bytes)

    sizes = np.stack([classes, np.minimum(token_bytes, 255)], axis=1)
    # A forbidden token of no bytes goes first, so that kind 0 is the forbidden one in every vocabulary.
    kinds, kind_of_token = np.unique(np.concatenate([[[0, 0]], sizes]), axis=0, return_inverse=True)
    rows, effect_row = np.unique(effect, axis=0, return_inverse=True)
    outside = distance[(distance < UNREACHABLE) & ~in_think].max()
    json_cap = json_limit - int(token_bytes.max()) * (int(outside) + 2)
    if json_cap < json_limit // 8:
        raise ValueError(f"tokens of {token_bytes.max()} bytes leave no room under the limit of the JSON blocks")
    return TokenTables(
        kind_of_token=kind_of_token.ravel()[1:].astype(np.int16),
        class_of_kind=kinds[:, 0].astype(np.int16),
        bytes_of_kind=kinds[:, 1].astype(np.uint8),
        next_state=next_state.astype(np.int16),
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
    column) is computed once however many tokens share it.
    """
    columns, column_of = np.unique(
        np.concatenate([automaton.next_state, automaton.effect]), axis=1, return_inverse=True
    )
    column_of = column_of.ravel().tolist()
    size = len(automaton.next_state)
    step_state, step_effect = columns[:size].T.copy(), columns[size:].T.copy()
    effects = list(automaton.effects)
    effect_ids = {effect: index for index, effect in enumerate(effects)}
    composed: dict[tuple[int, int], int] = {}

    def composition(first: int, second: int) -> int:
        """Number of the composed effect, -1 when there is none."""
        if (first, second) not in composed:
            effect = compose(effects[first], effects[second])
            if effect is not None and effect not in effect_ids:
                effect_ids[effect] = len(effects)
                effects.append(effect)
            composed[first, second] = -1 if effect is None else effect_ids[effect]
        return composed[first, second]

    def advance(state: np.ndarray, effect: np.ndarray, column: int) -> tuple[np.ndarray, np.ndarray]:
        following, edge = step_state[column][state], step_effect[column][state]
        total = np.where(edge == 0, effect, edge)
        for index in np.flatnonzero((edge != 0) & (effect != 0)):
            total[index] = composition(int(effect[index]), int(edge[index]))
        gone = (following == DEAD) | (total < 0)
        return np.where(gone, DEAD, following), np.where(gone, 0, total)

    vectors: list[tuple[np.ndarray, np.ndarray]] = []
    vector_ids: dict[bytes, int] = {}

    def intern(state: np.ndarray, effect: np.ndarray) -> int:
        key = state.astype(np.int16).tobytes() + effect.astype(np.int16).tobytes()
        if key not in vector_ids:
            vector_ids[key] = len(vectors)
            vectors.append((state, effect))
        return vector_ids[key]

    nothing = intern(np.zeros(size, np.int64), np.zeros(size, np.int64))  # class 0: forbidden everywhere
    identity = intern(np.arange(size), np.zeros(size, np.int64))
    memo: dict[tuple[int, int], int] = {}
    classes = np.zeros(len(symbols), np.int64)
    spelled = sorted((token_symbols, token) for token, token_symbols in enumerate(symbols) if token_symbols)
    path, previous = [identity], ()
    for text, token in spelled:
        shared = 0
        for left, right in zip(text, previous, strict=False):
            if left != right:
                break
            shared += 1
        del path[shared + 1 :]
        for symbol in text[shared:]:
            step = (path[-1], column_of[symbol])
            if step not in memo:
                memo[step] = nothing if step[0] == nothing else intern(*advance(*vectors[step[0]], step[1]))
            path.append(memo[step])
        previous = text
        classes[token] = path[-1]
    used, classes = np.unique(np.concatenate([[nothing], classes]), return_inverse=True)
    chosen = [vectors[index] for index in used]
    return (
        classes.ravel()[1:],
        np.stack([state for state, _ in chosen], axis=1),
        np.stack([effect for _, effect in chosen], axis=1),
        effects,
    )


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
    """Distances over the token graph, using only tokens that the registers can never forbid."""

    def __init__(self, next_state: np.ndarray, effect: np.ndarray, effects: list[Effect], expects: np.ndarray):
        self.next_state = next_state
        needs = np.array([what.needs for what in effects])
        grows = np.array([what.opens > 0 or what.commas > 0 for what in effects])
        self.needs = needs[effect]
        self.safe = (next_state != DEAD) & ~grows[effect]
        self.certain = self.safe & (self.needs == 0)
        # Where one of several names is known to be bound, every single one must leave a way.
        self.games = [
            (state, [1 << bit for bit in range(31) if mask >> bit & 1]) for state, mask in enumerate(expects) if mask
        ]

    def worst(self, values: np.ndarray, allowed: np.ndarray) -> np.ndarray:
        """Per state the least of `values` [S, C] over tokens in `allowed`, for the least helpful bound name."""
        result = np.where(self.certain & allowed, values, UNREACHABLE).min(axis=1)
        for state, names in self.games:
            usable = self.safe[state] & allowed[state]
            needs = self.needs[state]
            outcomes = [
                np.where(usable & ((needs == 0) | (needs & name != 0)), values[state], UNREACHABLE).min()
                for name in names
            ]
            result[state] = max(outcomes)
        return result

    def _solve(self, cost: np.ndarray, final: np.ndarray, allowed: np.ndarray) -> np.ndarray:
        """Least total cost to a state of `final`; `cost` [S, C] is 0 or 1."""
        distance = np.where(final, 0, UNREACHABLE)
        while True:
            through = np.minimum(distance[self.next_state] + cost, UNREACHABLE)
            better = np.where(final, 0, np.minimum(distance, self.worst(through, allowed)))
            if np.array_equal(better, distance):
                return distance
            distance = better

    def think_distance(self, in_think: np.ndarray) -> np.ndarray:
        """Tokens of think text still needed before it can be closed; 0 outside it."""
        stays = in_think[self.next_state].astype(np.int64)
        # One pass from outside: a token that leaves costs nothing, one that stays counts.
        final = ~in_think
        return self._solve(stays, final, np.ones_like(self.safe))

    def distance(self, end: int, in_think: np.ndarray, think_end: np.ndarray) -> np.ndarray:
        """Tokens to the end state. Inside think text only by tokens that also bring its end nearer, so that one
        token can satisfy both limits."""
        following = self.next_state
        allowed = ~in_think[:, None] | ~in_think[following] | (think_end[following] < think_end[:, None])
        final = np.zeros(len(following), bool)
        final[end] = True
        return self._solve(np.ones_like(following), final, allowed)

    def string_need(self, distance: np.ndarray, string: np.ndarray, least_bytes: np.ndarray) -> np.ndarray:
        """Bytes a string still gets on the shortest way out of it; 0 outside strings."""
        need = np.zeros(len(string), np.int64)
        for value in np.unique(distance[(distance > 0) & (distance < UNREACHABLE)]):
            layer = (distance == value) & (string > 0)
            if not layer.any():
                continue
            following = self.next_state
            stays = string[following] == string[:, None]
            bytes_used = np.where(stays, least_bytes + need[following], least_bytes - 1)
            need = np.where(layer, self.worst(bytes_used, distance[following] < distance[:, None]), need)
        return need
