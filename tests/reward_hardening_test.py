"""Attempts to be paid without doing the work, against the real embedding model.

Two kinds of attacker: the *lazy* one has not solved the task and dresses up a guess; the *padder* starts from an honest
partial answer and adds to it. Both must end below the honest partial answer, and lower the more they do.
One limit is measured rather than hidden: in the think block alone (weight 0.2) a bag of the right words can be nearer
to the teacher's sentence than a vague honest thought, because the embedding hardly reads word order.
"""

import dataclasses
import itertools
import json
import re
import time
from dataclasses import dataclass

import pytest
from ast_grep_py import SgRoot

from srl_jax.embedding import cosine, load_embedder
from srl_jax.rewards import RewardConfig, match_set_f1, score_trace
from srl_jax.trace import TAGS, Action, Rejection, StateUpdate, Trace, render_trace

MALFORMED = RewardConfig().malformed


@dataclass(frozen=True)
class Case:
    """A task with its teacher, an honest partial answer, and the source that the pattern is for."""

    prompt: str
    teacher: Trace
    honest: Trace
    keywords: str  # of the teacher's think
    source: str
    broader: tuple[str, ...]  # patterns, each matching more than the one before


LOGGER = Case(
    prompt=(
        "Replace every print call with one argument by a call of the module logger at info level. Calls with several "
        "arguments must stay as they are. src/app.py: import sys def main(path): print(path) print(1, 2)"
    ),
    teacher=Trace(
        "Calls to print go straight to stdout. Route them through the module logger at info level; match one argument "
        "only, so that calls with several are left alone.",
        Action("python", "print($MSG)", "logger.info($MSG)", ("src/app.py",)),
        StateUpdate(
            ("replace print by logger.info",),
            ("leave calls with several arguments alone", "keep the public interface"),
            ("check that logging is configured",),
            ("run the tests of app",),
        ),
    ),
    honest=Trace(
        "print writes to stdout, so send these calls to the module logger instead; match a single argument so that "
        "calls with several arguments stay.",
        Action("python", "print($MSG)", "logging.info($MSG)", ("src/app.py",)),
        StateUpdate(("replace print by logger.info",), ("keep the public interface",), (), ("run the tests of app",)),
    ),
    keywords="print logger info module stdout calls match argument several alone route level",
    source="import sys\ndef main(path):\n    print(path)\n    print(1, 2)\n    f(path)\n    g()\n    x = f(path, 1)\n",
    broader=("print($MSG)", "print($$$ARGS)", "$F($$$ARGS)"),
)
IDENTITY = Case(
    prompt=(
        "Comparisons with None must use identity: turn `== None` into `is None` in the models package. Comparisons "
        "with other values stay. models/user.py: if user == None: return if user == 3: pass"
    ),
    teacher=Trace(
        "Equality with None can be overridden by a class, identity cannot. Rewrite comparisons whose right side is the "
        "literal None to the is operator, nothing else.",
        Action("python", "$X == None", "$X is None", ("models/**/*.py",)),
        StateUpdate(
            ("use identity for None",), ("other comparisons stay",), (), ("look for != None", "run the model tests")
        ),
    ),
    honest=Trace(
        "A class may override equality, but identity cannot be changed. Comparisons with a literal None become the is "
        "operator; everything else stays.",
        Action("python", "$X == None", "$X is None", ("models/user.py",)),
        StateUpdate(("use identity for None",), (), (), ("run the model tests",)),
    ),
    keywords="None identity equality comparisons is operator class override right side literal rewrite",
    source="if user == None:\n    return\nif user == 3:\n    pass\nif a.b == None or b == c:\n    n = 1\nk = a + b\n",
    broader=("$X == None", "$X == $Y"),
)
CASES = [LOGGER, IDENTITY]
COMMON = Trace(
    "Replace the old call with the new one.",
    Action("python", "old_call($A)", "new_call($A)", ("src/*.py",)),
    StateUpdate(("apply the rewrite",), (), (), ("run the tests",)),
)


@pytest.fixture(scope="module")
def score():
    embedder = load_embedder()

    def score(case, text, config=RewardConfig()):  # noqa: B008
        def length(think):
            return len(re.findall(r"\w+|[^\w\s]", think))

        return score_trace(
            render_trace(text) if isinstance(text, Trace) else text,
            case.teacher,
            cosine=lambda think: cosine(*embedder.embed([think, case.teacher.think])),
            student_tokens=length,
            teacher_tokens=length(case.teacher.think),
            config=config,
        )

    return score


def lazy(case, **changes):
    """A guess by someone who did not read the task: the right language, an all-purpose rewrite, an empty state."""
    action = Action(case.teacher.action.language, "$F($$$ARGS)", "", ("**/*",))
    return dataclasses.replace(Trace("Do it.", action, StateUpdate.empty()), **changes)


def with_action(trace, **changes):
    return dataclasses.replace(trace, action=dataclasses.replace(trace.action, **changes))


def with_state(trace, **changes):
    return dataclasses.replace(trace, state=dataclasses.replace(trace.state, **changes))


def repeat(text, times):
    return " ".join([text] * times)


def junk(number):
    return [f"#{i:02d} qqq" for i in range(number)]


def zero_width(text, number):
    return text[:-1] + "\u200b" * number + text[-1:]


def look_alike(text, number):
    """The first `number` letters that have one replaced by a Cyrillic look-alike."""
    pairs = str.maketrans("aeopcxi", "аеорсхі")
    places = [i for i, letter in enumerate(text) if letter in "aeopcxi"][:number]
    return "".join(letter.translate(pairs) if i in places else letter for i, letter in enumerate(text))


def every_item(trace, change):
    return dataclasses.replace(
        trace, state=StateUpdate(*[tuple(map(change, items)) for items in dataclasses.astuple(trace.state)])
    )


def pad_lists(case, number):
    lists = {name: [*items, *junk(number)][:16] for name, items in vars(case.honest.state).items()}
    return with_state(case.honest, **{name: tuple(items) for name, items in lists.items()})


# Each takes a case and a strength; strengths grow. All start where the text is past its allowed length.
ATTACKS = {
    "lazy, honest think repeated": (lambda c, n: lazy(c, think=repeat(c.honest.think, n)), [2, 3, 4, 6, 20]),
    "lazy, teacher's think repeated": (lambda c, n: lazy(c, think=repeat(c.teacher.think, n)), [2, 3, 4, 6, 20]),
    "lazy, prompt copied to think": (lambda c, n: lazy(c, think=repeat(c.prompt, n)), [2, 3, 4, 6, 20]),
    "lazy, keyword salad": (lambda c, n: lazy(c, think=repeat(c.keywords, n)), [5, 6, 8, 12, 60]),
    "lazy, megabyte of think": (lambda c, n: lazy(c, think=repeat("x", n)), [100, 1000, 10**6]),
    "padder, think repeated": (
        lambda c, n: dataclasses.replace(c.honest, think=repeat(c.honest.think, n)),
        [2, 3, 4, 20],
    ),
    "padder, prompt appended": (
        lambda c, n: dataclasses.replace(c.honest, think=c.honest.think + " " + repeat(c.prompt, n)),
        [1, 2, 3, 20],
    ),
    "padder, keyword salad appended": (
        lambda c, n: dataclasses.replace(c.honest, think=c.honest.think + " " + repeat(c.keywords, n)),
        [4, 6, 8, 40],
    ),
    "padder, lists padded with junk": (pad_lists, [1, 2, 4, 8, 14]),
    "padder, files padded": (
        lambda c, n: with_action(c.honest, files=(*c.honest.action.files, *junk(n))),
        [1, 2, 4, 8, 15],
    ),
    "padder, lists emptied": (
        lambda c, n: with_state(c.honest, **dict.fromkeys(["decisions", "next_focus"][:n], ())),
        [1, 2],
    ),
    "padder, prompt copied to lists": (
        lambda c, n: with_state(c.honest, decisions=tuple(c.prompt.split(". ")[:n])),
        [1, 2],
    ),
    "padder, zero-width in items": (
        lambda c, n: every_item(c.honest, lambda item: zero_width(item, n)),
        [1, 5, 50],
    ),
    "padder, zero-width in pattern": (
        lambda c, n: with_action(c.honest, pattern=zero_width(c.honest.action.pattern, n)),
        [1, 5, 50, 500],
    ),
    "padder, look-alikes in items": (lambda c, n: every_item(c.honest, lambda item: look_alike(item, n)), [1, 2, 9]),
    "padder, look-alikes in replacement": (
        lambda c, n: with_action(c.honest, replacement=look_alike(c.honest.action.replacement, n)),
        [1, 2],
    ),
    "padder, pattern padded": (
        lambda c, n: with_action(c.honest, pattern=c.honest.action.pattern + "  # " + "print " * n),
        [1, 10, 100, 300],
    ),
    "padder, junk constraints": (
        lambda c, n: with_action(
            c.honest,
            pattern=c.honest.action.pattern + "".join(f", $J{i}" for i in range(n)),
            constraints={f"J{i}": {"regex": ".*"} for i in range(n)},
        ),
        [1, 2, 5, 20],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=["logger", "identity"])
@pytest.mark.parametrize("name", ATTACKS)
def test_attack_stays_under_honest_work_and_falls_as_it_grows(score, case, name):
    attack, strengths = ATTACKS[name]
    honest = score(case, case.honest).total
    rewards = [score(case, attack(case, strength)) for strength in strengths]
    assert all(reward.rejection is None for reward in rewards), rewards
    totals = [reward.total for reward in rewards]
    assert max(totals) < honest
    assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(totals)), totals
    if name.startswith("lazy"):
        assert max(totals) < 0.75 * honest


@pytest.mark.parametrize("case", CASES, ids=["logger", "identity"])
def test_honest_partial_answers_are_worth_having(score, case):
    assert 0.6 < score(case, case.honest).total < 0.99
    assert score(case, case.teacher).total == 1.0


@pytest.mark.parametrize("case", CASES, ids=["logger", "identity"])
def test_a_bag_of_the_right_words_is_worth_less_than_a_paraphrase(score, case):
    salads = [dataclasses.replace(case.honest, think=repeat(case.keywords, times)) for times in (1, 2, 3, 4, 8)]
    assert max(score(case, salad).total for salad in salads) < score(case, case.honest).total


def test_what_a_bag_of_the_right_words_gains_over_a_vague_thought_is_bounded(score):
    """The measured limit: with all else honest, a few hundredths, and nothing once it grows past the allowance."""
    vague = "The task asks for logging instead of print. I match print with one argument and use the logger."
    honest = score(LOGGER, dataclasses.replace(LOGGER.honest, think=vague)).total
    gains = [
        score(LOGGER, dataclasses.replace(LOGGER.honest, think=repeat(LOGGER.keywords, times))).total - honest
        for times in (1, 2, 4, 8, 10)
    ]
    assert 0 < max(gains) < 0.04
    assert gains[-1] < 0


@pytest.mark.parametrize("case", CASES, ids=["logger", "identity"])
def test_the_most_common_trace_is_worth_less_than_honest_work(score, case):
    assert score(case, COMMON).total < 0.7 * score(case, case.honest).total
    for other in CASES:
        if other is not case:  # another task's perfect answer, learnt by heart
            assert score(case, other.teacher).total < 0.7 * score(case, case.honest).total


def edited(case, change):
    """The honest answer with its action's JSON object changed."""
    value = json.loads(render_trace(case.honest).split("<action>")[1].split("</action>")[0])
    changed = json.dumps(change(value) or value)
    return re.sub(r"<action>.*</action>", lambda _: f"<action>{changed}</action>", render_trace(case.honest))


MALFORMED_ATTACKS = {
    "junk keys": (lambda c, n: edited(c, lambda a: {**a, **{f"junk{i}": 1 for i in range(n)}}), Rejection.UNKNOWN_KEY),
    "repeated keys": (lambda c, n: render_trace(c.honest).replace("{", "{" + '"pattern":"x",' * n, 1),
                      Rejection.DUPLICATE_KEY),
    "empty strings": (lambda c, n: render_trace(with_state(c.honest, decisions=("",) * min(n, 16))),
                      Rejection.SCHEMA_VIOLATION),
    "too many items": (lambda c, n: render_trace(with_state(c.honest, decisions=("x",) * (16 + n))),
                       Rejection.SCHEMA_VIOLATION),
    "no files": (lambda c, n: edited(c, lambda a: a.update(files=[])), Rejection.SCHEMA_VIOLATION),
    "match everything": (lambda c, n: edited(c, lambda a: a.update(pattern="$A", replacement="")),
                         Rejection.SCHEMA_VIOLATION),
    "empty think": (lambda c, n: render_trace(dataclasses.replace(c.honest, think=" " * n)), Rejection.EMPTY_THINK),
    "nested tags": (lambda c, n: "<think>" * n + render_trace(c.honest), Rejection.REPEATED_TAG),
    "two actions": (lambda c, n: render_trace(c.honest).replace("\n<state", "<action>{}</action>" * n + "\n<state"),
                    Rejection.REPEATED_TAG),
    "megabyte pattern": (lambda c, n: edited(c, lambda a: a.update(pattern="x" * 100_000 * n)), Rejection.TOO_LARGE),
    "megabyte item": (lambda c, n: render_trace(with_state(c.honest, decisions=("x" * 100_000 * n,))),
                      Rejection.TOO_LARGE),
    "deep JSON": (lambda c, n: edited(c, lambda a: a.update(files="#")).replace('"#"', "[" * 100 * n),
                  Rejection.TOO_DEEP),
    "never stops": (lambda c, n: "<think>" + "and " * 1000 * n, Rejection.TRUNCATED),
    "chatter before": (lambda c, n: "Sure! " * n + render_trace(c.honest), Rejection.STRAY_TEXT),
}  # fmt: skip


@pytest.mark.parametrize("strength", [1, 3, 30])
@pytest.mark.parametrize("name", MALFORMED_ATTACKS)
def test_these_are_not_traces_at_all(score, name, strength):
    attack, rejection = MALFORMED_ATTACKS[name]
    start = time.perf_counter()
    reward = score(LOGGER, attack(LOGGER, strength))
    assert time.perf_counter() - start < 1.0
    assert (reward.total, reward.action, reward.rejection) == (MALFORMED, None, rejection)


@pytest.mark.parametrize("tag", TAGS)
def test_a_second_trace_after_the_end_is_never_seen(score, tag):
    honest = render_trace(LOGGER.honest)
    assert score(LOGGER, honest + tag + render_trace(LOGGER.teacher)) == score(LOGGER, honest)


@pytest.mark.parametrize("case", CASES, ids=["logger", "identity"])
def test_over_broad_patterns_lose_text_likeness_and_match_f1(score, case):
    root = SgRoot(case.source, "python").root()

    def places(pattern):
        return {(node.range().start.index, node.range().end.index) for node in root.find_all(pattern=pattern)}

    teacher = places(case.teacher.action.pattern)
    assert teacher
    f1 = [match_set_f1(places(pattern), teacher) for pattern in case.broader]
    assert f1[0] == 1.0
    assert all(broad < narrow for narrow, broad in itertools.pairwise(f1))
    totals = [score(case, with_action(case.honest, pattern=pattern, replacement="")).total for pattern in case.broader]
    assert all(broad < narrow for narrow, broad in itertools.pairwise(totals))
    assert totals[0] < score(case, case.honest).total


@pytest.mark.parametrize("case", CASES, ids=["logger", "identity"])
def test_soft_matching_does_not_pay_for_padding_either(score, case):
    soft = RewardConfig(state_match="soft")
    totals = [score(case, pad_lists(case, number), soft).total for number in (0, 1, 4, 14)]
    assert all(later < earlier for earlier, later in itertools.pairwise(totals))
