"""Our token automaton against llguidance, step by step: the same tokens are allowed all along random walks.

llguidance reads the same language from a text of its own (`trace_lark`): regular expressions with intersection and
complement where ours are hand-made machines with registers, derivatives and a trie where ours are tables. It is not
told of lengths, of the number of brackets and of budgets; the walks stay far from these.
"""

import llguidance
import llguidance.numpy
import numpy as np
import pytest

from srl_jax import assets, grammar
from srl_jax.bench.masking import widened
from srl_jax.grammar_compile import MAX_OPENED_BRACKETS
from srl_jax.grammar_dfa import GrammarConfig
from srl_jax.tokenizer import load_tokenizer
from srl_jax.trace import parse_trace, render_trace
from tests.grammar_test import ORACLES, replay
from tests.tiny_tokenizer import tiny_tokenizer
from tests.trace_lark import trace_lark

# A name that begins another, one under both sigils, and few: the oracle's states are a product over them.
CONFIG = GrammarConfig(single_names=("A", "OBJ", "X"), multi_names=("A", "ARGS"))
EXAMPLES = [text for text in ORACLES if "$B" not in text]
STEPS = 255


class _Wrapped:
    """What `llguidance.TokenizerWrapper` reads of a tokenizer. Tokens that hold no text are special to it."""

    bos_token_id = None

    def __init__(self, tokenizer):
        self.eos_token_id = tokenizer.eos_id
        self.tokens = [f"<|{i}|>".encode() if raw is None else raw for i, raw in enumerate(tokenizer.token_bytes)]
        self.special_token_ids = [i for i, raw in enumerate(tokenizer.token_bytes) if raw is None]

    def __call__(self, text):
        raise AssertionError("the oracle is asked about ids only")


class Oracle:
    """llguidance on one tokenizer."""

    def __init__(self, tokenizer):
        self._tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Wrapped(tokenizer)), slices=[])
        text = trace_lark(CONFIG.single_names, CONFIG.multi_names, tokenizer.tag_ids)
        # The product of that many implications takes more states than its defaults allow.
        limits = llguidance.LLParserLimits(
            initial_lexer_fuel=10**9,
            step_lexer_fuel=10**9,
            max_lexer_states=10**7,
            precompute_large_lexemes=False,
        )
        self._matcher = llguidance.LLMatcher(self._tokenizer, text, limits=limits)
        self._check()
        self._bits = llguidance.numpy.allocate_token_bitmask(1, tokenizer.vocab_size)

    def _check(self):
        assert not self._matcher.is_error(), self._matcher.get_error()[:2000]

    def restart(self):
        assert self._matcher.reset()

    def allowed(self) -> np.ndarray:
        """bool [V]"""
        llguidance.numpy.fill_next_token_bitmask(self._matcher, self._bits, 0)
        self._check()
        bits = np.unpackbits(self._bits[0].view(np.uint8), bitorder="little")
        return bits[: self._tokenizer.vocab_size].astype(bool)

    def take(self, token: int):
        assert self._matcher.consume_token(int(token))

    def finished(self) -> bool:
        return self._matcher.is_accepting()


def kinds_of_tokens(tokenizer) -> list[np.ndarray]:
    """Masks [V] of tokens to prefer by turns: those that end things, that name things, corners, and any at all."""
    raw = [text or b"" for text in tokenizer.token_bytes]
    ends = np.array([b'"' in text or b"]" in text or b"}" in text for text in raw])
    ends[list(tokenizer.tag_ids)] = True
    names = np.array([b"$" in text or text in (b"A", b"B", b"X", b"OB", b"J", b"ARGS") for text in raw])
    corners = np.array([any(c in text for c in b"<\\/.,({ \n") or text >= b"\x80" for text in raw])
    return [ends, ends, names, corners, np.ones(len(raw), bool)]


def walk(oracle, rng, kinds, beginning) -> tuple[list[int], list[np.ndarray]]:
    """Tokens of a walk that begins with `beginning` and goes on at random, and the oracle's mask before each."""
    oracle.restart()
    tokens, masks = [], []
    while len(tokens) < STEPS and not oracle.finished():
        allowed = oracle.allowed()
        masks.append(allowed)
        if len(tokens) < len(beginning):
            token = beginning[len(tokens)]
        else:
            preferred = allowed & kinds[rng.integers(len(kinds))]
            token = rng.choice(np.flatnonzero(preferred if preferred.any() else allowed))
        assert allowed[token], (tokens, token)
        tokens.append(int(token))
        oracle.take(token)
    return tokens, masks


@pytest.fixture(scope="module")
def smollm2():
    return load_tokenizer(assets.fetch("smollm2-135m-instruct"))


@pytest.mark.parametrize(
    ("kind", "walks"),
    [
        ("bytewise", 12),
        ("tiny", 20),
        ("textual", 12),
        ("smollm2", 12),
        ("smollm2 widened to 128256", 4),
        ("smollm2 widened to 151936", 4),
    ],
)
def test_llguidance_allows_the_same_tokens(kind, walks, smollm2, tmp_path):
    if kind.startswith("smollm2"):
        tokenizer, wider = smollm2, kind.removeprefix("smollm2 widened to ")
    else:
        tokenizer, wider = tiny_tokenizer(0 if kind == "bytewise" else 600, atomic_tags=kind != "textual"), ""
    vocab = widened(tokenizer, int(wider)) if wider.isdigit() else tokenizer
    automaton = grammar.compile_grammar(vocab, CONFIG, cache_dir=tmp_path)
    oracle, kinds, rng = Oracle(vocab), kinds_of_tokens(vocab), np.random.default_rng(0)
    text = [raw or b"" for raw in vocab.token_bytes]
    longest, opens = max(map(len, text)), max(sum(map(raw.count, (b"(", b"[", b"{"))) for raw in text)
    cap = np.asarray(automaton.string_cap)
    steps = finished = 0
    for number in range(walks):
        # Every other walk starts from the beginning of a known trace: deep places are seldom reached by chance.
        example = tokenizer.encode(EXAMPLES[number // 2 % len(EXAMPLES)])
        beginning = example[: rng.integers(len(example))] if number % 2 else example[: -len(example) // 2]
        tokens, masks = walk(oracle, rng, kinds, beginning)
        finished += oracle.finished()
        states, allowed = replay(automaton, [tokens], vocab.eos_id)
        row, ours = (0, slice(len(tokens))), allowed[0]
        assert states.brackets[row].max() <= MAX_OPENED_BRACKETS - opens
        assert states.json_bytes[row].max() < automaton.json_cap
        # Up to where the length of a string, of which only ours knows, might count.
        room = cap[states.state[row]]
        near = np.append((room > 0) & (states.string_bytes[row] + longest > room), True).argmax()
        for step, theirs in enumerate(masks[:near]):
            differ = np.flatnonzero(ours[step] != theirs)
            assert not len(differ), (
                f"after {b''.join(text[token] or b'<tag>' for token in tokens[:step])!r} ours "
                f"{'allows' if ours[step, differ[0]] else 'forbids'} "
                f"{[text[token] for token in differ[:10]]} ({len(differ)} in all)"
            )
        steps += near
        if oracle.finished() and vocab is tokenizer:
            written = tokenizer.decode(tokens)
            assert render_trace(parse_trace(written)) == written
    assert steps > 40 * walks and finished >= walks / 4
