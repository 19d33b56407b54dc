"""The trace grammar as a byte automaton: which bytes may follow which, and what must be remembered on the way.

The language is that of *canonical* traces (`trace.render_trace`): every accepted text parses, and rendering the
parse gives the text back. Most rules of `trace.parse_trace` are regular and stand in the automaton; the ones that
are not are carried in a few registers beside the state, and an edge says what it does to them (`Effect`):

* which metavariables the pattern binds (a bit each), because a replacement or a constraint may only use those;
* how many brackets the pattern opened, and how many items a list holds;
* (kept by `grammar.py`, which knows the tokens) bytes of the current string and of the JSON.

Narrower than the parser on purpose, each because the exact rule would multiply states and no catalogue needs it:

1. A replacement or a constraint uses metavariables of a fixed set of names (`GrammarConfig`), as `$NAME` or
   `$$$NAME`. A pattern may hold any others.
2. A pattern opens at most 64 brackets (the parser limits their nesting).
3. JSON escapes are `\\" \\\\ \\b \\f \\n \\r \\t`: other control characters cannot be written.
4. Globs hold no escapes and no `<`, and start with something other than white space.
5. `<state_u` never occurs in free text, nor do tags with doubled slashes (`<//action>`).
6. A name beside a character beyond ASCII in a pattern is not usable: whether that is a word character is not asked.
7. Lengths are counted in UTF-8 bytes with escapes as two; the two JSON blocks together stay under 16 KiB.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np

from srl_jax.grammar_strings import (
    ESCAPES,
    NO_EFFECT,
    OTHER,
    SPACE,
    Effect,
    Names,
    Step,
    StringMachine,
    glob_string,
    is_space,
    pattern_string,
    plain_string,
    replacement_string,
    tag_progress,
)
from srl_jax.trace import (
    LANGUAGES,
    MAX_JSON_BYTES,
    MAX_PATTERN_CHARS,
    MAX_REPLACEMENT_CHARS,
    MAX_STATE_ITEM_CHARS,
    STATE_FIELDS,
    STOP,
    TAGS,
)

GRAMMAR_VERSION = 3
TAG_SYMBOL = 256  # symbols 256..261 are the six tags as single tokens
SYMBOLS = TAG_SYMBOL + len(TAGS)
DEAD = 0


@dataclass(frozen=True)
class GrammarConfig:
    """Metavariable names that replacements and constraints may use: `$NAME` and `$$$NAME`. 31 in all at most."""

    single_names: tuple[str, ...] = (*"ABCDEFIKLMNOPSTVXYZ", "MS", "OBJ")
    multi_names: tuple[str, ...] = ("A", "ARGS", "B", "BODY", "REST")

    def __post_init__(self) -> None:
        names = (*self.single_names, *self.multi_names)
        for name in names:
            if not (name.isascii() and name.isalnum() and name.isupper() and name[0].isalpha()):
                raise ValueError(f"grammar metavariable {name!r}: use A-Z and 0-9, a letter first")
        if len(names) > 31:
            raise ValueError(f"{len(names)} grammar metavariables: at most 31")


@dataclass(frozen=True)
class Place:
    """Where in a trace a state stands, as far as the sampler must know.

    string: number of the JSON string it is inside, 0 outside; `cap` is that string's most bytes.
    list: number of the JSON list it is inside, 0 outside.
    expects: mask of names of which at least one is known to be bound here (0: nothing known).
    think: whether it is inside the think text.
    """

    string: int = 0
    cap: int = 0
    list: int = 0
    expects: int = 0
    think: bool = False


NOWHERE = Place()


@dataclass
class ByteAutomaton:
    """State 0 is dead. `next_state[s, symbol]`, `effect[s, symbol]` (index into `effects`, 0 none)."""

    next_state: np.ndarray
    effect: np.ndarray
    effects: list[Effect]
    places: list[Place]
    start: int
    end: int


_SPACES = {chr(code).encode() for code in range(0x80, 0x3001) if chr(code).isspace()}
_SPACE_PREFIXES = {text[:length] for text in _SPACES for length in range(1, len(text))}


def _utf8_step(prefix: bytes, byte: int) -> bytes | str | None:
    """One byte of a non-ASCII character: a longer prefix, the class of the finished character, or None.

    Prefixes are shortened to one representative with the same continuations, so that there are few of them.
    """
    longer = prefix + bytes([byte])
    if longer in _SPACES:
        return SPACE
    if longer in _SPACE_PREFIXES:
        return longer
    head = longer[0]
    size = 2 if 0xC2 <= head <= 0xDF else 3 if 0xE0 <= head <= 0xEF else 4 if 0xF0 <= head <= 0xF4 else 0
    if not size:
        return None
    if prefix:
        low = {0xE0: 0xA0, 0xF0: 0x90}.get(head, 0x80) if len(prefix) == 1 else 0x80
        high = {0xED: 0x9F, 0xF4: 0x8F}.get(head, 0xBF) if len(prefix) == 1 else 0xBF
        if not low <= byte <= high:
            return None
    left = size - len(longer)
    if left == 0:
        return OTHER
    if len(longer) == 1 and head in (0xE0, 0xED, 0xF0, 0xF4):
        return longer
    return {1: b"\xc3", 2: b"\xe4", 3: b"\xf1"}[left]


@cache
def _utf8_edges() -> tuple[tuple[bytes, int, bytes | str], ...]:
    """All (prefix, byte, result) of `_utf8_step`, each prefix before it is used."""
    edges, seen, pending = [], {b""}, [b""]
    while pending:
        prefix = pending.pop(0)
        for byte in range(0x80, 0x100):
            result = _utf8_step(prefix, byte)
            if result is not None:
                edges.append((prefix, byte, result))
            if isinstance(result, bytes) and result not in seen:
                seen.add(result)
                pending.append(result)
    return tuple(edges)


@dataclass
class _Builder:
    atomic_tags: bool
    edges: list[dict[int, tuple[int, Effect]]] = field(default_factory=lambda: [{}])
    places: list[Place] = field(default_factory=lambda: [NOWHERE])

    def state(self, place: Place = NOWHERE) -> int:
        self.edges.append({})
        self.places.append(place)
        return len(self.edges) - 1

    def edge(self, source: int, symbol: int | str, target: int, effect: Effect = NO_EFFECT) -> None:
        self.edges[source][ord(symbol) if isinstance(symbol, str) else symbol] = (target, effect)

    def text(self, text: str, then: int, place: Place = NOWHERE) -> int:
        """A fixed text; returns its first state."""
        for byte in reversed(text.encode()):
            source = self.state(place)
            self.edge(source, byte, then)
            then = source
        return then

    def tag(self, tag: str, then: int) -> int:
        if not self.atomic_tags:
            return self.text(tag, then)
        source = self.state()
        self.edge(source, TAG_SYMBOL + TAGS.index(tag), then)
        return source

    def choice(self, texts: tuple[str, ...], then: int) -> int:
        """One of `texts`, then a closing quote."""
        nodes = {text[:length]: self.state() for text in texts for length in range(len(text) + 1)}
        for prefix, node in nodes.items():
            if prefix:
                self.edge(nodes[prefix[:-1]], prefix[-1], node)
            if prefix in texts:
                self.edge(node, '"', then)
        return nodes[""]

    def machine(self, start: Hashable, step: Step, place_of: Callable[[Hashable], Place]) -> dict[Hashable, int]:
        """All states of a machine over characters, with their edges; returns the state numbers."""
        ids = {start: self.state(place_of(start))}
        pending = [start]

        def number(state):
            if state not in ids:
                ids[state] = self.state(place_of(state))
                pending.append(state)
            return ids[state]

        while pending:
            state = pending.pop()
            for code in range(0x80):
                if found := step(state, chr(code)):
                    self.edge(ids[state], code, number(found[0]), found[1])
            self._utf8(ids[state], place_of(state), {kind: step(state, kind) for kind in (SPACE, OTHER)}, number)
        return ids

    def _utf8(self, source: int, place: Place, found: dict, number: Callable[[Hashable], int]) -> None:
        """Edges for the characters beyond ASCII out of one state."""
        targets = {kind: number(after[0]) for kind, after in found.items() if after}
        what = {after[1] for after in found.values() if after}
        # The effect must happen at the first byte, when the class is not known yet. Where the classes differ it is
        # left out: forgetting that a name is bound only narrows the language.
        effect = what.pop() if len(what) == 1 else NO_EFFECT
        if any(other.needs or effect.needs for other in what):
            raise AssertionError("a character beyond ASCII needs a bound name depending on its class")
        inside = replace(place, expects=0)
        nodes: dict[bytes, int] = {b"": source}
        for prefix, byte, result in _utf8_edges():
            if isinstance(result, bytes):
                if result not in nodes:
                    nodes[result] = self.state(inside)
                self.edge(nodes[prefix], byte, nodes[result], NO_EFFECT if prefix else effect)
            elif result in targets:
                self.edge(nodes[prefix], byte, targets[result])

    def string(self, machine: StringMachine, then: int, place: Place) -> int:
        """A JSON string from after its opening quote to `then` after its closing one."""

        def place_of(state):
            inner = state[1] if isinstance(state, tuple) and state[:1] == ("escape",) else state
            return replace(place, expects=machine.expects(inner))

        def step(state, character):
            if isinstance(state, tuple) and state[:1] == ("escape",):
                return machine.step(state[1], ESCAPES[character]) if character in ESCAPES else None
            if character == "\\":
                if machine.escape is None:
                    return None
                after, effect = machine.escape(state)
                return ("escape", after), effect
            if character == '"' or (len(character) == 1 and ord(character) < 0x20):
                return None
            return machine.step(state, character)

        ids = self.machine(machine.start, step, place_of)
        for state, number in ids.items():
            if isinstance(state, tuple) and state[:1] == ("escape",):
                continue
            effect = machine.close(state)
            if effect is not None:
                self.edge(number, '"', then, effect)
        return ids[machine.start]

    def list(self, machine: StringMachine, then: int, place: Place, may_be_empty: bool) -> int:
        """A JSON list of strings, from its opening bracket on."""
        between = Place(list=place.list)
        start, opened, after_comma, after_item = (self.state(), *(self.state(between) for _ in range(3)))
        item = self.string(machine, after_item, place)
        self.edge(start, "[", opened)
        self.edge(opened, '"', item)
        self.edge(after_comma, '"', item)
        self.edge(after_item, ",", after_comma, Effect(commas=1))
        self.edge(after_item, "]", then)
        if may_be_empty:
            self.edge(opened, "]", then)
        return start

    def finish(self, start: int, end: int) -> ByteAutomaton:
        effects = [NO_EFFECT]
        index = {NO_EFFECT: 0}
        next_state = np.zeros((len(self.edges), SYMBOLS), np.int32)
        effect = np.zeros((len(self.edges), SYMBOLS), np.int32)
        for source, edges in enumerate(self.edges):
            for symbol, (target, what) in edges.items():
                if what not in index:
                    index[what] = len(effects)
                    effects.append(what)
                next_state[source, symbol] = target
                effect[source, symbol] = index[what]
        return minimise(ByteAutomaton(next_state, effect, effects, self.places, start, end))


def build_trace_automaton(config: GrammarConfig, *, atomic_tags: bool) -> ByteAutomaton:
    """The automaton of canonical traces, from `<think>` to `</state_update>`."""
    b = _Builder(atomic_tags)
    singles = Names(config.single_names, 0)
    multis = Names(config.multi_names, len(config.single_names))
    names = {1: singles, 3: multis}
    end = b.state()

    # Built from the back, because each part needs to know what follows it.
    rest = b.text("}", b.tag(STOP, end))
    for number, name in reversed(list(enumerate(STATE_FIELDS, start=2))):
        place = Place(string=4 + number, cap=MAX_STATE_ITEM_CHARS, list=number)
        rest = b.list(plain_string(), rest, place, may_be_empty=True)
        rest = b.text(("{" if name == STATE_FIELDS[0] else ",") + f'"{name}":', rest)
    action_end = b.tag("</action>", b.text("\n", b.tag("<state_update>", rest)))

    after_files = b.state()
    b.edge(after_files, "}", action_end)
    if singles.mask:
        b.edge(
            after_files,
            ",",
            b.text('"constraints":{"', _constraints(b, singles, action_end)),
            Effect(singles.mask),
        )
    files_place = Place(string=3, cap=MAX_JSON_BYTES, list=1)
    files = b.list(glob_string(), after_files, files_place, may_be_empty=False)
    place = Place(string=2, cap=MAX_REPLACEMENT_CHARS)
    replacement = b.string(replacement_string(names), b.text(',"files":', files), place)
    place = Place(string=1, cap=MAX_PATTERN_CHARS)
    pattern = b.string(pattern_string(names), b.text(',"replacement":"', replacement), place)
    language = b.choice(LANGUAGES, b.text(',"pattern":"', pattern))
    action = b.tag("<action>", b.text('{"language":"', language))
    start = b.tag("<think>", _think(b, b.text("\n", action)))
    return b.finish(start, end)


def _constraints(b: _Builder, names: Names, then: int) -> int:
    """`X":{"regex":"..."}}`, from inside the quotes of the first name; each name once, in sorted order.

    A used name and all before it are unbound, which forbids repeating or misordering them.
    """
    after_rule = b.state()
    value = b.string(plain_string(), b.text("}", after_rule), Place(string=4, cap=MAX_JSON_BYTES))
    rule = b.text(':{"', b.choice(("regex", "kind"), b.text(':"', value)))
    nodes = {prefix: b.state(Place(expects=mask)) for prefix, mask in names.reach.items()}
    for prefix, node in nodes.items():
        if prefix:
            b.edge(nodes[prefix[:-1]], prefix[-1], node, Effect(needs=names.reach[prefix]))
        if prefix in names.bit:
            bit = names.bit[prefix]
            b.edge(node, '"', rule, Effect(needs=bit, unbinds=2 * bit - 1))
    b.edge(after_rule, "}", b.text("}", then))
    b.edge(after_rule, ",", b.text('"', nodes[""]), Effect(needs=names.mask))
    return nodes[""]


def _think(b: _Builder, then: int) -> int:
    """Think text and the closing tag: no tag text, no white space at either end.

    States: "start", "space" (after white space), a tag's progress. With textual tags, a `<` right after text
    may begin the closing tag: its progress is marked with a leading "+".
    """
    closing = TAGS[1]

    def step(state, character):
        if is_space(character):
            return None if state == "start" else ("space", NO_EFFECT)
        if not b.atomic_tags:
            if character == "<" and state not in ("start", "space"):
                return "+<", NO_EFFECT
            if state.startswith("+"):
                longer = state[1:] + character
                if len(longer) < len(closing) and closing.startswith(longer):
                    return "+" + longer, NO_EFFECT
                if longer == closing:
                    return None  # the edge out of the think text, made below
                # Back among the ordinary tags; after "</" they are spelled like after "<".
                state = "<" + state[1:].lstrip("</")
        progress = tag_progress("" if state in ("start", "space") else state, character)
        return None if progress is None else (progress, NO_EFFECT)

    ids = b.machine("start", step, lambda state: Place(think=True))
    for state, number in ids.items():
        if b.atomic_tags and state not in ("start", "space"):
            b.edge(number, TAG_SYMBOL + 1, then)
        elif not b.atomic_tags and state == "+" + closing[:-1]:
            b.edge(number, ">", then)
    return ids["start"]


def minimise(automaton: ByteAutomaton) -> ByteAutomaton:
    """Merges states that nothing can tell apart, and drops those that cannot be reached or cannot finish."""
    # Only the distinct columns matter (a hundred of 262).
    symbols, column = np.unique(
        np.concatenate([automaton.next_state, automaton.effect]),
        axis=1,
        return_index=True,
        return_inverse=True,
    )[1:]
    column = column.ravel()
    next_state, effect = automaton.next_state[:, symbols], automaton.effect[:, symbols]
    alive = np.zeros(len(next_state), bool)
    alive[automaton.end] = True
    while not np.array_equal(grown := alive | (alive[next_state] & (next_state != DEAD)).any(axis=1), alive):
        alive = grown
    reached = np.zeros(len(next_state), bool)
    reached[automaton.start] = True
    while not np.array_equal(grown := _successors(reached, next_state), reached):
        reached = grown
    keep = alive & reached
    dropped = ~keep[next_state]
    next_state[dropped], effect[dropped] = DEAD, 0
    next_state[~keep], effect[~keep] = DEAD, 0

    # Moore's refinement; the fixed texts make long chains, so rounds must be cheap.
    kinds = {place: index for index, place in enumerate(dict.fromkeys(automaton.places))}
    labels = np.array([kinds[place] for place in automaton.places])
    first = np.stack([labels, np.arange(len(keep)) == automaton.end, keep], axis=1)
    block = np.unique(np.concatenate([first, effect], axis=1), axis=0, return_inverse=True)[1].ravel()
    weights = np.random.default_rng(0).integers(1, 2**63, size=len(symbols) + 1, dtype=np.uint64)
    while True:
        hashed = block[next_state].astype(np.uint64) @ weights[1:] + block.astype(np.uint64) * weights[0]
        finer = np.unique(hashed, return_inverse=True)[1].ravel()
        if finer.max() == block.max():
            break
        block = finer
    merged = np.concatenate([block[next_state], effect, first], axis=1)
    representatives = np.unique(block, return_index=True)[1]
    if not np.array_equal(merged[representatives][block], merged):
        raise AssertionError("hash collision while minimising the trace automaton")
    # Renumber so that the dead block is 0 and the others follow their first state.
    order = list(dict.fromkeys([block[DEAD], *block[np.flatnonzero(keep)]]))
    rank = {old: new for new, old in enumerate(order)}
    representative = [int(np.flatnonzero(block == old)[0]) for old in order]
    renumber = np.array([rank.get(old, DEAD) for old in block])
    return ByteAutomaton(
        next_state=renumber[next_state[representative]][:, column].astype(np.int32),
        effect=effect[representative][:, column],
        effects=automaton.effects,
        places=[automaton.places[state] for state in representative],
        start=int(renumber[automaton.start]),
        end=int(renumber[automaton.end]),
    )


def _successors(reached: np.ndarray, next_state: np.ndarray) -> np.ndarray:
    grown = reached.copy()
    grown[next_state[reached].ravel()] = True
    return grown
