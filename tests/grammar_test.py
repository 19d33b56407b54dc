"""The trace grammar: what it accepts parses, what it must accept it accepts, and no budget is a dead end."""

import dataclasses
import json
import re
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from srl_jax import assets, grammar
from srl_jax.bench.masking import widened
from srl_jax.grammar_compile import BLOCK, TokenTables, trace_tables
from srl_jax.grammar_dfa import GrammarConfig, build_trace_automaton
from srl_jax.grammar_strings import NO_EFFECT, Effect, compose
from srl_jax.tokenizer import load_tokenizer
from srl_jax.trace import (
    STOP,
    TAGS,
    Action,
    Rejection,
    StateUpdate,
    Trace,
    TraceError,
    parse_trace,
    render_trace,
)
from tests.tiny_tokenizer import tiny_tokenizer

CONFIG = GrammarConfig()
NONE = StateUpdate.empty()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("grammar")


@pytest.fixture(scope="module")
def smollm2():
    return load_tokenizer(assets.fetch("smollm2-135m-instruct"))


class Compiled:
    """A tokenizer with its automaton, and the jitted ways to ask it."""

    def __init__(self, tokenizer, cache):
        self.tokenizer = tokenizer
        self.automaton = grammar.compile_grammar(tokenizer, cache_dir=cache)
        self.least = grammar.shortest_trace(self.automaton)
        self.least_think = grammar.shortest_think(self.automaton)

    def replay(self, rows, budget=16_000, think=4000):
        """Host copies of the states before each token and of the masks there; rows are padded with the end token."""
        return replay(self.automaton, rows, self.tokenizer.eos_id, budget, think)

    def accepts(self, texts) -> np.ndarray:
        """Per text whether every one of its tokens is allowed and the last one completes it."""
        rows = [self.tokenizer.encode(text) for text in texts]
        states, allowed = self.replay(rows)
        done = states.state == self.automaton.end_state
        return np.array([allowed[i, range(len(t)), t].all() and done[i, len(t)] for i, t in enumerate(rows)])

    def sample(self, key, bias, budget, think=4000, prefix=()):
        """Texts of rows sampled with Gumbel noise around `bias` [B, V]; asserts that no mask was empty."""
        bias = jnp.asarray(bias, jnp.float32)
        steps = -(-budget // 256) * 256  # rows that are done stay so; few different lengths are compiled
        prefix = jnp.asarray(prefix, jnp.int32)
        tokens, end, empty = _sampled(self.automaton, key, bias, prefix, budget, think, steps)
        assert not empty.any()
        assert (np.asarray(end.state) == self.automaton.end_state).all()
        tokens = np.concatenate([np.tile(prefix, (len(bias), 1)), tokens], axis=1)
        return [self.tokenizer.decode_trace(row) for row in tokens], tokens


def replay(automaton, rows, filler, budget=16_000, think=4000):
    # Few different shapes, because each one is compiled.
    longest = max(256, 1 << max(map(len, rows)).bit_length())
    tokens = np.full((len(rows), longest), filler, np.int32)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    states, allowed = _replayed(automaton, tokens, budget, think)
    return jax.tree.map(np.asarray, states), np.asarray(allowed)


@partial(jax.jit, static_argnums=(2, 3))
def _replayed(automaton, tokens, budget, think):
    states = grammar.replay(automaton, tokens, budget, think)
    return states, grammar.allowed_tokens(automaton, states)


@partial(jax.jit, static_argnums=6)
def _sampled(automaton, key, bias, prefix, budget, think, steps):
    def step(state, key):
        allowed = grammar.allowed_tokens(automaton, state)
        noise = jax.random.gumbel(key, allowed.shape)
        token = jnp.argmax(jnp.where(allowed, bias + noise, -jnp.inf), axis=-1)
        return grammar.advance(automaton, state, token), (token, ~allowed.any(axis=-1))

    start = grammar.initial_state(automaton, len(bias), budget, think)
    for token in prefix:
        start = grammar.advance(automaton, start, jnp.full(len(bias), token))
    end, (tokens, empty) = jax.lax.scan(step, start, jax.random.split(key, steps))
    return tokens.T, end, empty.T


@pytest.fixture(scope="module")
def bytewise(cache):
    """One token per byte: any text has exactly one spelling."""
    return Compiled(tiny_tokenizer(0), cache)


@pytest.fixture(scope="module")
def tiny(cache):
    return Compiled(tiny_tokenizer(), cache)


@pytest.fixture(scope="module")
def textual(cache):
    return Compiled(tiny_tokenizer(atomic_tags=False), cache)


def text_of(**changes) -> str:
    action = {
        "language": "python",
        "pattern": "f($X)",
        "replacement": "g($X)",
        "files": ("a.py",),
        "constraints": {},
    }
    state = {"state": NONE, "think": "t"}
    for name, value in changes.items():
        (state if name in state else action)[name] = value
    return render_trace(Trace(state["think"], Action(**action), state["state"]))


ORACLES = [
    text_of(),
    text_of(think="Rename – keep 日本語 🙂.\n\n\tif a < b and <b>bold</b>", replacement=""),
    text_of(pattern="old_save($X)", replacement="new_get_user($X).value", files=("src/app.py",)),
    text_of(language="javascript", pattern="$OBJ.f($$$ARGS)", replacement='$OBJ.g("x\\n", $$$ARGS)\n'),
    text_of(
        language="tsx",
        pattern="<th>$A</th>",
        replacement="<td>$A$A</td>",
        files=("src/**/*.{tsx,jsx}", "a/..b"),
    ),
    text_of(pattern="$A == None", replacement="$A is None", constraints={"A": {"kind": "identifier"}}),
    text_of(pattern="$X + $B + $A", replacement="", constraints={"A": {"regex": "^[^n]"}, "X": {"kind": "string"}}),
    text_of(language="java", pattern="$$WHAT; $_; $UNKNOWN", replacement="$5 ${x} $x $$ 100$"),
    text_of(language="typescript", state=StateUpdate(("a",) * 16, ("b c",), (), (" ", '\t"\\/', "é"))),
    text_of(pattern="<T", replacement="</", files=("...", "a b", "*")),
    text_of(think="i<this.length <thinker </think <stat"),
]


@pytest.mark.parametrize("kind", ["bytewise", "tiny", "textual"])
def test_oracle_traces_are_accepted(request, kind):
    compiled = request.getfixturevalue(kind)
    for text in ORACLES:
        assert render_trace(parse_trace(text)) == text
    accepted = compiled.accepts(ORACLES)
    assert accepted.all(), [text for text, ok in zip(ORACLES, accepted, strict=True) if not ok]


REFUSED = [
    text_of(pattern="$X"),  # bare metavariable
    text_of(pattern=" $$$ARGS\n"),
    text_of(pattern="$$$"),
    text_of(pattern="\u3000"),  # blank
    text_of(replacement="g($Y)"),  # not bound
    text_of(replacement="g($$$X)"),  # bound by one $ only
    text_of(replacement="$X1"),
    text_of(replacement="$_X"),
    text_of(pattern="f($Xa, a$X)", replacement="$X"),  # neither binds in a pattern
    text_of(constraints={"Y": {"regex": "a"}}),
    text_of(pattern="f($$$X)", replacement="", constraints={"X": {"regex": "a"}}),
    text_of(constraints={"X": {"regex": ""}}),
    text_of(language="cobol"),
    text_of(files=()),
    text_of(files=("a",) * 17),
    text_of(files=("/etc/passwd",)),
    text_of(files=("a/../b",)),
    text_of(files=("{..,a}/b",)),
    text_of(files=("a\\b",)),
    text_of(files=("",)),
    text_of(pattern="(" * 65),
    text_of(pattern="x" * 2001),
    text_of(state=StateUpdate(("a",) * 17, (), (), ())),
    text_of(state=StateUpdate(("a" * 301,), (), (), ())),
    text_of(state=StateUpdate(("",), (), (), ())),
    text_of(state=StateUpdate(("</think>",), (), (), ())),
    text_of(pattern="f(<action>)"),
    text_of(think="<think>"),
    text_of(think="x").replace("x</", " </"),
    text_of(think="x").replace("x</", "x\u2003</"),
    text_of().replace("\n", ""),
    text_of().replace('"pattern"', '"Pattern"'),
    text_of().replace(":", ": "),
    text_of().replace("f($X)", "f(\\u0041)"),
    text_of(pattern="a\x01"),
    text_of().replace("f($X)", "f(\n)"),
    text_of() + " ",
]


@pytest.mark.parametrize("kind", ["bytewise", "tiny", "textual"])
def test_other_traces_are_refused(request, kind):
    compiled = request.getfixturevalue(kind)
    accepted = compiled.accepts(REFUSED)
    assert not accepted.any(), [text for text, ok in zip(REFUSED, accepted, strict=True) if ok]


# --------------------------------------------------------------------- the language equals the parser's, narrowed


PIECES = [
    "$",
    "$$",
    "$$$",
    "$X",
    "$Y",
    "$$X",
    "$$$ARGS",
    "$$$X",
    "$_A",
    "$OBJ",
    "$O",
    "$OB",
    "X",
    "_",
    "a",
    "1",
    "é",
]
PIECES += [
    " ",
    "\n",
    "\u3000",
    "\u00a0",
    "(",
    "]",
    "{",
    '"',
    "\\",
    "/",
    ".",
    "..",
    ",",
    "<",
    "</",
    "<think",
    ">",
    "=",
    "🙂",
]
soup = st.lists(st.sampled_from(PIECES), max_size=6).map("".join)


def narrowed(trace: Trace) -> bool:
    """The documented narrowings of `grammar_dfa`, written independently of it: whether the grammar leaves it out."""
    action = trace.action
    bound = set()
    # In a pattern a name ends before a non-ASCII character as it does before a letter.
    for sigil, name in re.findall(r"(?<![\w$])(\${1,3})([A-Z_][A-Z0-9_]*)(?![\w\x80-\U0010ffff])", action.pattern):
        before = action.pattern
        names = {"$": CONFIG.single_names, "$$$": CONFIG.multi_names}.get(sigil, ())
        if name in names and any(
            not before[: m.start()] or before[m.start() - 1] < "\x80" or before[m.start() - 1].isspace()
            for m in re.finditer(re.escape(sigil + name) + r"(?![\w\x80-\U0010ffff])", before)
            if not re.search(r"[\w$]$", before[: m.start()])
        ):
            bound.add((sigil, name))
    used = set(re.findall(r"(\$+)([A-Z_][A-Z0-9_]*)", action.replacement))
    used |= {("$", name) for name in action.constraints}
    text = render_trace(trace)
    return (
        not used <= bound
        or sum(map(action.pattern.count, "([{")) > 64
        or any(re.search(r'[\x00-\x1f"<]', glob) or glob[0].isspace() for glob in action.files)
        or any(
            ord(c) < 0x20 and c not in "\n\r\t\b\f" for c in action.pattern + action.replacement + "".join(action.files)
        )
        or bool(re.search(r"<state_u|<//+(think|action)>", re.sub("|".join(TAGS), "", text)))
    )


# Punctuation by a class the grammar cannot know: non-ASCII marks that are no word characters.
@given(
    think=soup,
    pattern=soup,
    replacement=soup,
    files=st.lists(soup, min_size=1, max_size=3),
    constraints=st.dictionaries(st.sampled_from(["X", "Y", "OBJ", "O", "ARGS"]), soup, max_size=3),
    items=st.lists(soup, max_size=3),
)
@settings(max_examples=400, suppress_health_check=[HealthCheck.too_slow])
def test_language_equals_the_parsers(bytewise, think, pattern, replacement, files, constraints, items):
    rules = {name: {"regex": value} for name, value in constraints.items()}
    state = StateUpdate(tuple(items), (), tuple(items[:1]), ())
    action = Action("python", pattern, replacement, tuple(files), rules)
    text = render_trace(Trace(think, action, state))
    try:
        trace = parse_trace(text)
    except TraceError:
        expected = False
    else:
        assert render_trace(trace) == text
        expected = not narrowed(trace)
    assert bytewise.accepts([text])[0] == expected, text


@given(st.data())
@settings(max_examples=150)
def test_damaged_traces_are_judged_like_the_parser(bytewise, data):
    """Random edits of canonical traces: what the grammar accepts parses and renders back to the same text."""
    text = data.draw(st.sampled_from(ORACLES))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(text)))
        until = data.draw(st.integers(at, min(len(text), at + 4)))
        text = text[:at] + data.draw(st.one_of(soup, st.sampled_from(TAGS), st.just(""))) + text[until:]
    if bytewise.accepts([text])[0]:
        assert render_trace(parse_trace(text)) == text


# -------------------------------------------------------------------------------------- sampling under the masks


def check_samples(texts):
    for text in texts:
        assert render_trace(parse_trace(text)) == text


def biases(tokenizer, rows: int, seed: int) -> np.ndarray:
    """Row-wise preferences that push samples into corners: quotes avoided, brackets, `$`, `<`, white space loved."""
    rng = np.random.default_rng(seed)
    bias = rng.normal(size=(rows, tokenizer.vocab_size)) * rng.choice([0.3, 2.0, 5.0], size=(rows, 1))
    raw = [text or b"" for text in tokenizer.token_bytes]
    corners = [b'"', b"(", b"$", b"<", b"\\", b" ", b",", b"\xe3", b"A", b"X", b"."]
    for row in bias:
        for corner in rng.choice(len(corners), size=3, replace=False):
            row[[corners[corner] in text for text in raw]] += rng.choice([-6.0, 4.0])
    return bias.astype(np.float32)


@pytest.mark.parametrize("kind", ["bytewise", "tiny", "textual"])
@pytest.mark.parametrize("slack", [0, 1, 2, 3, 5, 8, 20, 60, 250])
def test_random_logits_always_parse(request, kind, slack):
    compiled = request.getfixturevalue(kind)
    for think in {compiled.least_think, compiled.least_think + slack // 3}:
        bias = biases(compiled.tokenizer, 48, seed=slack)
        texts, tokens = compiled.sample(jax.random.key(slack), bias, compiled.least + slack, think)
        check_samples(texts)
        if compiled.tokenizer.tag_ids:
            opening, closing = compiled.tokenizer.tag_ids[:2]
            lengths = (tokens == closing).argmax(axis=1) - (tokens == opening).argmax(axis=1) - 1
            assert (lengths >= 1).all() and (lengths <= think).all()


@pytest.mark.parametrize("slack", [0, 3, 64])
def test_random_logits_on_smollm2_always_parse(smollm2, cache, slack):
    compiled = Compiled(smollm2, cache)
    bias = biases(smollm2, 8, seed=slack)
    texts, _ = compiled.sample(jax.random.key(slack), bias, compiled.least + slack, 1 + slack // 3)
    check_samples(texts)


def test_strings_and_json_stay_within_their_limits(bytewise):
    """Rows that avoid closing anything, with budgets far beyond every limit of the parser."""
    tokenizer = bytewise.tokenizer
    raw = [text or b"" for text in tokenizer.token_bytes]
    bias = np.zeros((4, tokenizer.vocab_size))
    bias[:, [text == b'"' for text in raw]] = -50
    bias[1, [text in (b"(", b"[") for text in raw]] = 20
    bias[2, [text == b"\\" for text in raw]] = 20
    bias[3, [text in (b"\xf0", b"\xe4") for text in raw]] = 20
    texts, _ = bytewise.sample(jax.random.key(0), bias, 12_000, 100)
    check_samples(texts)
    traces = [parse_trace(text) for text in texts]
    # The limits are reached, not merely kept.
    assert min(len(trace.action.pattern.encode()) for trace in traces) > 1900 / 2  # escapes count twice
    assert min(len(trace.action.replacement.encode()) for trace in traces) > 3900 / 2
    assert sum(map(traces[1].action.pattern.count, "([{")) == 64
    assert max(len(text) for text in texts) > 10_000

    prefix = tokenizer.encode(ORACLES[0].split('"decisions":[')[0] + '"decisions":["')
    bias[1, [text == b'"' for text in raw]] = 40
    bias[1, [text == b"," for text in raw]] = 30
    texts, _ = bytewise.sample(jax.random.key(1), bias, 6000, 100, prefix)
    check_samples(texts)
    states = [parse_trace(text).state for text in texts]
    assert len(states[1].decisions) == len(states[1].next_focus) == 16
    assert all(len(item.encode()) >= 140 for state in states[2:] for item in state.decisions)
    assert all(len(item.encode()) >= 290 for item in states[0].decisions)


def test_budgets_below_the_shortest_trace_allow_nothing(tiny):
    _, allowed = tiny.replay([[tiny.tokenizer.tag_ids[0]]], tiny.least - 1, 10)
    assert not allowed.any()
    with pytest.raises(ValueError, match=f"the shortest trace takes {tiny.least} tokens"):
        grammar.check_budget(tiny.automaton, tiny.least - 1, 10)
    with pytest.raises(ValueError, match="max_think_tokens is 0; at least 1"):
        grammar.check_budget(tiny.automaton, 200, 0)
    grammar.check_budget(tiny.automaton, tiny.least, 1)


def test_shortest_trace_is_short_and_exact(bytewise):
    """By hand: the fixed text, one character each of think, pattern and file, `java` as the shortest language."""
    shortest = text_of(language="tsx", pattern="x", replacement="", files=("a",))
    assert bytewise.least == len(bytewise.tokenizer.encode(shortest))
    bias = np.zeros((4, bytewise.tokenizer.vocab_size))
    texts, _ = bytewise.sample(jax.random.key(1), bias, bytewise.least)
    assert all(len(text) == len(shortest) for text in texts)


def test_only_valid_utf8(bytewise):
    """Rows drawn to non-ASCII bytes: what they spell is strict UTF-8, surrogates and overlong forms included."""
    raw = [text or b"" for text in bytewise.tokenizer.token_bytes]
    bias = np.where([text >= b"\x80" for text in raw], 3.0, 0.0)[None].repeat(64, 0)
    bias[:, [text in (b"\xed", b"\xe0", b"\xf0", b"\xf4", b"\xc2") for text in raw]] += 3
    _, tokens = bytewise.sample(jax.random.key(2), bias, bytewise.least + 200, 100)
    for row in tokens:
        b"".join(raw[token] for token in row).decode("utf-8", errors="strict")


# ---------------------------------------------------------------------------------- tokens against single bytes


def test_tokens_do_what_their_bytes_do(tiny, bytewise):
    """A random walk over tokens, replayed byte by byte: same end, same registers after every token."""
    bias = biases(tiny.tokenizer, 32, seed=5)
    texts, tokens = tiny.sample(jax.random.key(5), bias, tiny.least + 120, 30)
    by_token, _ = tiny.replay(list(tokens), tiny.least + 120, 30)
    by_byte, _ = bytewise.replay([bytewise.tokenizer.encode(text) for text in texts])
    assert bytewise.accepts(texts).all()
    for row in range(len(texts)):
        position = 0
        for step, token in enumerate(tokens[row]):
            if by_token.state[row, step] == tiny.automaton.end_state:
                assert by_byte.state[row, position] == bytewise.automaton.end_state
                break
            for field in ("bound", "brackets", "json_bytes"):
                assert getattr(by_token, field)[row, step] == getattr(by_byte, field)[row, position], field
            # A token that closes one string and opens the next is counted whole: an upper bound.
            for field in ("string_bytes", "commas"):
                assert getattr(by_token, field)[row, step] >= getattr(by_byte, field)[row, position]
            position += len(tiny.tokenizer.token_bytes[token] or b"x")


def test_any_tokenization_is_accepted(tiny):
    """Not only the encoder's spelling: any split of an accepted text into tokens is allowed at every step."""
    rng = np.random.default_rng(0)
    by_bytes = {raw: token for token, raw in enumerate(tiny.tokenizer.token_bytes) if raw}
    tags = dict(zip(TAGS, tiny.tokenizer.tag_ids, strict=True))
    rows = []
    for text in ORACLES * 3:
        tokens = []
        for part in re.split("(" + "|".join(TAGS) + ")", text):
            rest = b"" if part in tags else part.encode()
            tokens += [tags[part]] if part in tags else []
            while rest:
                options = [length for length in range(1, 13) if rest[:length] in by_bytes]
                length = int(rng.choice(options))
                tokens.append(by_bytes[rest[:length]])
                rest = rest[length:]
        rows.append(tokens)
    _, allowed = tiny.replay(rows)
    for row, tokens in enumerate(rows):
        assert allowed[row, range(len(tokens)), tokens].all(), tiny.tokenizer.decode(tokens)


def test_tokens_that_hold_no_text_are_never_allowed(tiny):
    _, allowed = tiny.replay([tiny.tokenizer.encode(ORACLES[3])])
    until_end = allowed[0, : len(tiny.tokenizer.encode(ORACLES[3]))]
    hidden = [token for token, raw in enumerate(tiny.tokenizer.token_bytes) if raw is None]
    controls = sorted(set(hidden) - set(tiny.tokenizer.tag_ids))
    assert len(controls) == 3 and not until_end[:, controls].any()
    assert until_end[0].nonzero()[0].tolist() == [tiny.tokenizer.tag_ids[0]]  # <think> is forced


@pytest.mark.parametrize("kind", ["tiny", "bytewise"])
def test_the_only_token_is_the_one_the_mask_leaves(request, kind):
    vocabulary = request.getfixturevalue(kind)
    automaton = vocabulary.automaton
    budget = grammar.shortest_trace(automaton) + 6
    state, rng, forced = grammar.initial_state(automaton, 16, budget, 8), np.random.default_rng(0), 0
    step = jax.jit(lambda state: (grammar.allowed_tokens(automaton, state), grammar.only_token(automaton, state)))
    for _ in range(budget):
        allowed, only = map(np.asarray, step(state))
        expected = np.where(allowed.sum(axis=1) == 1, allowed.argmax(axis=1), -1)
        np.testing.assert_array_equal(only, expected)
        forced += (only >= 0).sum()
        chosen = np.array([rng.choice(np.flatnonzero(row)) for row in allowed])
        state = grammar.advance(automaton, state, jnp.asarray(chosen, jnp.int32))
    assert 0.1 < forced / (16 * budget) < 0.95


def test_after_the_end_only_the_end_token(tiny):
    tokens = tiny.tokenizer.encode(ORACLES[0])
    states, allowed = tiny.replay([tokens], len(tokens), 50)
    done = np.asarray(grammar.is_done(tiny.automaton, states))[0]
    assert done[len(tokens) :].all() and not done[: len(tokens)].any()
    after = allowed[0, len(tokens) :]
    assert (after.sum(axis=1) == 1).all() and after[:, tiny.tokenizer.eos_id].all()


def test_forbidden_tokens_lead_nowhere(tiny):
    states, allowed = tiny.replay([[5, tiny.tokenizer.tag_ids[0]]], 300, 10)
    assert not allowed[0, 1:].any()
    assert not (states.state[0] == tiny.automaton.end_state).any()


def test_leading_shapes_and_transformations_agree(tiny):
    tokens = np.asarray([tiny.tokenizer.encode(text)[:40] for text in ORACLES[2:4]])
    states = jax.jit(grammar.replay, static_argnums=(2, 3))(tiny.automaton, tokens, 300, 50)
    assert states.state.shape == (2, 40)
    allowed = jax.jit(grammar.allowed_tokens)(tiny.automaton, states)
    assert allowed.shape == (2, 40, tiny.tokenizer.vocab_size)
    by_row = jax.jit(jax.vmap(jax.vmap(grammar.allowed_tokens, (None, 0)), (None, 0)))(tiny.automaton, states)
    np.testing.assert_array_equal(allowed, by_row)
    step = jax.tree.map(lambda field: field[:, 7], states)
    np.testing.assert_array_equal(jax.jit(grammar.allowed_tokens)(tiny.automaton, step), allowed[:, 7])
    after = jax.jit(grammar.advance)(tiny.automaton, step, tokens[:, 7])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[:, 8]), after, states)


# ------------------------------------------------------------------------------------------ the free automaton


@pytest.mark.parametrize("atomic", [True, False])
def test_free_automaton_ends_at_the_tag_its_text_or_the_end_token(atomic):
    tokenizer = tiny_tokenizer(atomic_tags=atomic)
    automaton = grammar.free_automaton(tokenizer)
    start = tokenizer.encode_text("x</state_updat>\n")
    endings = [[tokenizer.eos_id], tokenizer.encode(STOP), tokenizer.encode_text("<</state_" + STOP)]
    rows = [[*start, tokenizer.pad_id, *ending] for ending in endings]
    states, allowed = replay(automaton, rows, filler=5)
    for row, ids in enumerate(rows):
        assert (states.state[row] == automaton.end_state).argmax() == len(ids)
    assert allowed.all()


def test_free_automaton_stops_when_the_budget_is_spent(tiny):
    automaton = grammar.free_automaton(tiny.tokenizer)
    states, _ = replay(automaton, [[10] * 5], 10, budget=3)
    assert np.asarray(grammar.is_done(automaton, states))[0, :5].tolist() == [False, False, False, True, True]
    assert (states.state != automaton.end_state).all()


# --------------------------------------------------------------------------------------- tables, cache, sizes


def test_padded_vocabulary_is_never_allowed(tiny, cache):
    size = tiny.tokenizer.vocab_size
    padded = grammar.compile_grammar(tiny.tokenizer, vocab_size=size + 9, cache_dir=cache)
    tokens = [tiny.tokenizer.encode(ORACLES[3])]
    _, allowed = replay(padded, tokens, tiny.tokenizer.eos_id)
    assert allowed.shape[-1] == size + 9 and not allowed[..., size:].any()
    np.testing.assert_array_equal(allowed[..., :size], tiny.replay(tokens)[1])
    with pytest.raises(ValueError, match=f"vocab_size is {size - 1}"):
        grammar.compile_grammar(tiny.tokenizer, vocab_size=size - 1, cache_dir=cache)
    free = grammar.free_automaton(tiny.tokenizer, vocab_size=size + 9)
    assert not replay(free, tokens, tiny.tokenizer.eos_id)[1][..., size:].any()


def test_cache_is_used_and_survives_damage(tiny, tmp_path):
    fresh = trace_tables(tiny.tokenizer, CONFIG, tmp_path)
    (file,) = tmp_path.iterdir()
    again = trace_tables(tiny.tokenizer, CONFIG, tmp_path)
    for name, value in fresh.__dict__.items():
        np.testing.assert_array_equal(value, getattr(again, name))
        assert value.dtype == getattr(again, name).dtype
    good = file.read_bytes()
    for bad in (b"", b"nonsense", good[: len(good) // 2], good[:200] + bytes(50) + good[250:]):
        file.write_bytes(bad)
        rebuilt = trace_tables(tiny.tokenizer, CONFIG, tmp_path)
        np.testing.assert_array_equal(rebuilt.next_state, fresh.next_state)
        assert [path.name for path in tmp_path.iterdir()] == [file.name]
    assert TokenTables.load(file) is not None
    # Another vocabulary, another grammar: another file.
    trace_tables(tiny_tokenizer(300), CONFIG, tmp_path)
    trace_tables(tiny.tokenizer, GrammarConfig(single_names=("X",)), tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_tables_are_small(smollm2, cache):
    automaton = Compiled(smollm2, cache).automaton
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(automaton)) < 1_000_000


def test_tables_of_152k_tokens_are_small_and_quickly_built(smollm2, tmp_path):
    vocabulary = widened(smollm2, 151_936)
    began = time.process_time()  # of this process alone, whatever else the machine does
    automaton = grammar.compile_grammar(vocabulary, cache_dir=tmp_path)
    assert time.process_time() - began < 3.0
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(automaton)) < 1_000_000


def test_next_states_by_blocks_are_those_of_the_whole_table(tiny, tmp_path):
    """By row for the masks, by entry for advancing; behind the end only its own loop is left."""
    tables = trace_tables(tiny.tokenizer, CONFIG, tmp_path)
    states, classes = tables.next_state.shape
    whole = np.asarray(tiny.automaton.following(jnp.arange(states)))
    np.testing.assert_array_equal(whole, tables.next_state)
    assert classes % BLOCK == 0 and len(tables.blocks) < states * classes / BLOCK / 4
    token_class = tables.class_of_kind[tables.kind_of_token]
    start = grammar.initial_state(tiny.automaton, states, 1000, 500)
    for token in (5, 77, *tiny.tokenizer.encode(ORACLES[3])[:20:3]):
        state = dataclasses.replace(start, state=jnp.arange(states))
        after = grammar.advance(tiny.automaton, state, jnp.full(states, token))
        np.testing.assert_array_equal(after.state, tables.next_state[:, token_class[token]])
    end = tiny.automaton.end_state
    assert np.flatnonzero(whole[end]).tolist() == [token_class[tiny.tokenizer.eos_id]]


def test_vocabularies_that_cannot_spell_a_trace_are_refused(tmp_path):
    tokenizer = tiny_tokenizer(0)
    tokenizer.token_bytes[tokenizer.encode_text("{")[0]] = None
    with pytest.raises(ValueError, match="cannot spell a trace"):
        trace_tables(tokenizer, CONFIG, tmp_path)


def test_names_are_configuration(tmp_path):
    own = GrammarConfig(single_names=("FOO", "FOOBAR"), multi_names=())
    automaton = grammar.compile_grammar(tiny_tokenizer(0), own, cache_dir=tmp_path)
    compiled = Compiled.__new__(Compiled)
    compiled.tokenizer, compiled.automaton = tiny_tokenizer(0), automaton
    texts = [
        text_of(pattern="f($FOOBAR)", replacement="$FOOBAR"),
        text_of(pattern="f($FOOBAR)", replacement="$FOO"),
        text_of(pattern="f($FOO)", replacement="$FOOBAR"),
        text_of(),
        text_of(pattern="f($$$FOO)", replacement="$$$FOO"),
    ]
    assert compiled.accepts(texts).tolist() == [True, False, False, False, False]
    for bad in (("x",), ("A_B",), ("1A",), tuple(f"A{i}" for i in range(32))):
        with pytest.raises(ValueError, match="metavariable"):
            GrammarConfig(single_names=bad)


def test_compose_by_hand():
    a, b, c = 0b001, 0b010, 0b100
    assert compose(NO_EFFECT, Effect(needs=a)) == Effect(needs=a)
    assert compose(Effect(binds=a), Effect(needs=a | b)) == Effect(binds=a)  # met by the first
    assert compose(Effect(unbinds=a), Effect(needs=a | b)) == Effect(needs=b, unbinds=a)
    assert compose(Effect(unbinds=a), Effect(needs=a)) is None
    assert compose(Effect(needs=a | b), Effect(needs=a)) == Effect(needs=a)
    both = compose(Effect(needs=a), Effect(needs=b))  # two names: one in `needs`, one in `also`
    assert (both.needs | both.also, both.needs & both.also) == (a | b, 0)
    assert compose(Effect(needs=a), Effect(needs=b | c)) == Effect(needs=b | c, also=a)
    assert compose(Effect(needs=b | c, also=a), Effect(needs=b)) == Effect(needs=b, also=a)
    assert compose(Effect(needs=b, also=a), Effect(needs=a)) == Effect(needs=b, also=a)
    assert compose(Effect(binds=a), Effect(needs=b, also=a)) == Effect(needs=b, binds=a)
    assert compose(Effect(unbinds=a), Effect(needs=b, also=a)) is None
    with pytest.raises(ValueError, match="two choices between names"):
        compose(Effect(needs=a | b), Effect(needs=b | c))
    assert compose(Effect(binds=a, opens=1), Effect(unbinds=a, binds=b, opens=2, commas=1)) == Effect(
        binds=b, unbinds=a, opens=3, commas=1
    )


def test_automaton_is_minimal_and_alive():
    automaton = build_trace_automaton(CONFIG, atomic_tags=True)
    rows = {
        (
            automaton.next_state[s].tobytes(),
            automaton.effect[s].tobytes(),
            automaton.places[s],
            s == automaton.end,
        )
        for s in range(len(automaton.next_state))
    }
    assert len(rows) == len(automaton.next_state)
    assert len(automaton.next_state) < 700
    assert (automaton.next_state[0] == 0).all()


def test_rejections_the_grammar_rules_out_are_all_of_them():
    """Only a text outside the grammar can be rejected: here one per reason, to see that the parser would."""
    reasons = set()
    for text in [*REFUSED, "", "x" + text_of(), text_of().replace("}", "", 1), json.dumps(text_of())]:
        try:
            parse_trace(text)
        except TraceError as error:
            reasons.add(error.rejection)
    assert {
        Rejection.SCHEMA_VIOLATION,
        Rejection.REPEATED_TAG,
        Rejection.EMPTY_THINK,
        Rejection.BAD_JSON,
    } <= reasons
