import dataclasses
import math
from itertools import permutations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from srl_jax.rewards import (
    Reward,
    RewardConfig,
    action_similarity,
    brevity_cost,
    combine,
    match_set_f1,
    match_set_precision_recall,
    score_trace,
    state_overlap,
    think_similarity,
)
from srl_jax.trace import LANGUAGES, Action, Rejection, StateUpdate, Trace, render_trace

# The worked example: `language` is left out on both sides.
TEACHER = Action(None, "print($A)", "logger.info($A)", ("src/app.py",))
STUDENT = Action(None, "print($A)", "log.info($A)", ("src/app.py",))


def state(decisions=(), constraints=(), open_issues=(), next_focus=()):
    return StateUpdate(tuple(decisions), tuple(constraints), tuple(open_issues), tuple(next_focus))


# Jaccards (constraints, decisions, open_issues, next_focus) = (1, 1/2, 0, 1).
STUDENT_STATE = state(decisions=["use logger"], constraints=["keep API"], open_issues=["tests"], next_focus=["docs"])
TEACHER_STATE = state(decisions=["use logger", "drop print"], constraints=["keep API"], next_focus=["docs"])


def test_worked_action():
    # lev("log.info($A)", "logger.info($A)") = 1 - 3/15 = 0.8; 0.3 * 1 + 0.7 * (1 + 0.8 + 1)/3
    only_replacement = Action(replacement="log.info($A)"), Action(replacement="logger.info($A)")
    assert action_similarity(*only_replacement) == pytest.approx(0.3 + 0.7 * 0.8)
    assert action_similarity(STUDENT, TEACHER) == pytest.approx(0.953333, abs=1e-6)


def test_worked_action_without_files():
    # F1 = 2 * 2/(2 + 3) = 0.8; 0.3 * 0.8 + 0.7 * (1 + 0.8)/3
    assert action_similarity(dataclasses.replace(STUDENT, files=None), TEACHER) == pytest.approx(0.66)


def test_worked_state():
    # (1.5 * 1 + 1.5 * 0.5 + 1 * 0 + 1 * 1)/5
    assert state_overlap(STUDENT_STATE, TEACHER_STATE) == pytest.approx(0.65)


def test_worked_think():
    # 0.8 - 0.2 * (300/(1.5 * 100) - 1)
    assert think_similarity(0.8, 300, 100) == pytest.approx(0.6)
    assert brevity_cost(300, 100) == pytest.approx(0.2)
    assert brevity_cost(150, 100) == 0


def test_worked_total():
    action, overlap = action_similarity(STUDENT, TEACHER), state_overlap(STUDENT_STATE, TEACHER_STATE)
    assert combine(action, overlap, think_similarity(0.8, 300, 100)) == pytest.approx(0.791667, abs=1e-6)


def full(action):
    return dataclasses.replace(action, language="python")


def test_worked_example_as_text():
    teacher = Trace("swap print for the logger", full(TEACHER), TEACHER_STATE)
    student = Trace("replace print calls", full(STUDENT), STUDENT_STATE)
    reward = score_trace(render_trace(student), teacher, cosine=0.8, student_tokens=300, teacher_tokens=100)
    # With language: 0.3 + 0.7 * (1 + 1 + 0.8 + 1)/4 = 0.965
    assert reward.action == pytest.approx(0.965)
    assert (reward.state, reward.think, reward.brevity) == pytest.approx((0.65, 0.6, 0.2))
    assert reward.total == pytest.approx(0.5 * 0.965 + 0.3 * 0.65 + 0.2 * 0.6)
    assert (reward.rejection, reward.field) == (None, None)


def test_malformed_scores_the_penalty_with_parts_absent():
    teacher = Trace("why", full(TEACHER), TEACHER_STATE)

    def never(*_):
        raise AssertionError("nothing is measured on malformed text")

    reward = score_trace("<think>", teacher, cosine=never, student_tokens=never, teacher_tokens=9, executed=never)
    assert reward == Reward(-0.2, None, None, None, None, Rejection.TRUNCATED, "</think>")
    text = render_trace(dataclasses.replace(teacher, action=dataclasses.replace(teacher.action, pattern="$A")))
    reward = score_trace(text, teacher, cosine=never, student_tokens=never, teacher_tokens=9)
    assert (reward.total, reward.rejection, reward.field) == (-0.2, Rejection.SCHEMA_VIOLATION, "pattern")


def test_equal_think_text_is_exactly_alike_whatever_the_embedding_rounds_to():
    teacher = Trace("why", full(TEACHER), TEACHER_STATE)
    reward = score_trace(render_trace(teacher), teacher, cosine=0.9999998, student_tokens=1, teacher_tokens=1)
    assert reward == Reward(1.0, 1.0, 1.0, 1.0, 0.0)


def test_cosine_and_length_may_be_functions_and_hopeless_length_is_not_embedded():
    teacher = Trace("why so", full(TEACHER), TEACHER_STATE)
    asked = []

    def cosine(think):
        asked.append(think)
        return 0.5

    def score(think):
        text = render_trace(dataclasses.replace(teacher, think=think))
        return score_trace(text, teacher, cosine=cosine, student_tokens=lambda t: len(t.split()), teacher_tokens=2)

    assert score("because it").think == pytest.approx(0.5)
    assert score(" ".join(["x"] * 18)).think == 0.0  # 0.2 * (18/3 - 1) = 1
    assert score(" ".join(["x"] * 10**5)).think == 0.0
    assert asked == ["because it"]


def test_lists_of_files_are_matched_for_the_greatest_total():
    def files(ours, theirs):
        return (action_similarity(Action(files=ours), Action(files=theirs)) - 0.3) / 0.7

    assert files(("a.py", "b.py"), ("b.py", "a.py")) == pytest.approx(1.0)
    assert files(("a.py",), ("a.py", "b.py")) == pytest.approx(0.5)
    assert files(("a.py", "a.py"), ("a.py", "zzzzzzz")) == pytest.approx(0.5)
    # Greedy would take (ab, ab) and leave (xy, a?) with less than the cross matching in other cases; here brute force.
    ours, theirs = ("abc", "abd", "xbd"), ("abd", "xyz", "abc")
    best = max(sum(_edit_likeness(a, b) for a, b in zip(ours, order, strict=True)) for order in permutations(theirs))
    assert files(ours, theirs) == pytest.approx(best / 3)


def _edit_likeness(a, b):
    return 1 - _edit_distance(a, b) / max(len(a), len(b)) if a or b else 1.0


def _edit_distance(a, b):
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


@given(st.text("abcé", max_size=8), st.text("abcé", max_size=8))
def test_strings_are_compared_by_edit_distance(a, b):
    expected = 0.3 + 0.7 * _edit_likeness(a, b)
    assert action_similarity(Action(pattern=a), Action(pattern=b)) == pytest.approx(expected)
    assert action_similarity(Action(replacement=a), Action(replacement=b)) == pytest.approx(expected)


def test_language_is_all_or_nothing():
    assert action_similarity(Action("typescript"), Action("javascript")) == pytest.approx(0.3)


def test_constraints():
    def constraints(ours, theirs):
        return (action_similarity(Action(constraints=ours), Action(constraints=theirs)) - 0.3) / 0.7

    ab = {"A": {"regex": "abcd"}, "B": {"kind": "call"}}
    assert constraints(ab, ab) == pytest.approx(1.0)
    assert constraints({"A": {"regex": "abcx"}, "B": {"kind": "call"}}, ab) == pytest.approx((0.75 + 1) / 2)
    assert constraints({"A": {"kind": "abcd"}, "B": {"kind": "call"}}, ab) == pytest.approx(0.5)
    assert constraints({"A": {"regex": "abcd"}}, ab) == pytest.approx(0.5)
    assert constraints({"A": {"regex": "abcd"}, "C": {"kind": "call"}}, ab) == pytest.approx(1 / 3)
    assert constraints({"C": {"kind": "call"}}, ab) == pytest.approx(0)


def test_empty_and_absent_constraints_are_both_not_present():
    for empty in ({}, None):
        assert action_similarity(dataclasses.replace(STUDENT, constraints=empty), STUDENT) == 1.0
    # One side only: F1 = 2 * 3/7, the union has four fields.
    constrained = dataclasses.replace(TEACHER, constraints={"A": {"kind": "call"}})
    assert action_similarity(TEACHER, constrained) == pytest.approx(0.3 * 6 / 7 + 0.7 * 3 / 4)


def test_actions_without_fields():
    assert action_similarity(Action(), Action()) == 1.0
    assert action_similarity(Action(), TEACHER) == 0.0
    assert action_similarity(Action(files=()), Action(files=())) == 1.0
    assert action_similarity(Action(files=()), Action(files=("a",))) == pytest.approx(0.3)
    assert action_similarity(Action(language="java"), Action(pattern="x")) == 0.0


def test_state_lists_empty_on_one_or_both_sides():
    assert state_overlap(state(), state()) == 1.0
    assert state_overlap(state(decisions=["a"]), state()) == 0.0
    assert state_overlap(state(), state(decisions=["a"])) == 0.0
    assert state_overlap(state(decisions=["a"]), state(decisions=["a"])) == 1.0
    # open_issues weighs 1, decisions 1.5, the two others are left out.
    assert state_overlap(state(["a"], open_issues=["b"]), state(["a"])) == pytest.approx(1.5 / 2.5)
    assert state_overlap(state(constraints=["a"], next_focus=["b"]), state(next_focus=["b"])) == pytest.approx(1 / 2.5)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("Keep API", "keep  api"), ("ﬁle", "file"), ("Straße", "STRASSE"), (" a\tb\n", "a b"), ("Ａ", "a")],
)
def test_state_items_are_folded_before_they_are_compared(ours, theirs):
    assert state_overlap(state([ours]), state([theirs])) == 1.0


@pytest.mark.parametrize(("ours", "theirs"), [("api", "арі"), ("a\u200bb", "ab"), ("resume", "résumé")])
def test_look_alikes_are_not_equal(ours, theirs):
    assert state_overlap(state([ours]), state([theirs])) == 0.0


def test_repeated_items_count_once():
    assert state_overlap(state(["a", "A", "a "]), state(["a"])) == 1.0
    assert state_overlap(state(["a"] * 16), state(["a", "b"])) == pytest.approx(0.5)


def test_soft_matching():
    def soft(ours, theirs):
        return state_overlap(state(ours), state(theirs), match="soft")

    # lev("keep the api", "keep the apis") = 12/13: J = S/(1 + 1 - S)
    s = 12 / 13
    assert soft(["keep the api"], ["keep the apis"]) == pytest.approx(s / (2 - s))
    assert soft(["abcd"], ["abxy"]) == pytest.approx(0.5 / 1.5)  # likeness exactly 0.5 counts
    assert soft(["abcde"], ["abxyz"]) == 0.0  # 0.4 does not
    assert soft(["abc", "uvw"], ["uvw", "abc"]) == 1.0
    assert soft(["aaaa"], ["aaaa", "zzzz"]) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="fuzzy"):
        state_overlap(state(), state(), match="fuzzy")


@pytest.mark.parametrize(
    ("cosine", "student", "teacher", "expected"),
    [(-0.5, 10, 10, 0.0), (1.2, 10, 10, 1.0), (1.0, 0, 10, 1.0), (1.0, 90, 10, 0.0), (1.0, 10**9, 1, 0.0),
     (0.1, 24, 10, 0.0)],
)  # fmt: skip
def test_think_similarity_stays_in_range(cosine, student, teacher, expected):
    assert think_similarity(cosine, student, teacher) == pytest.approx(expected)


@pytest.mark.parametrize("arguments", [(math.nan, 1, 1), (math.inf, 1, 1), (0.5, 1, 0), (0.5, -1, 1)])
def test_think_similarity_refuses_nonsense(arguments):
    with pytest.raises(ValueError, match=r"cosine|tokens"):
        think_similarity(*arguments)


def test_execution_term():
    config = RewardConfig(execution=0.25)
    assert combine(0.5, 0.5, 0.5, config, executed=True) == pytest.approx(0.75)
    assert combine(0.5, 0.5, 0.5, config, executed=False) == pytest.approx(0.5)
    assert combine(1, 1, 1, config, executed=True) == 1.0
    assert combine(0.5, 0.5, 0.5, executed=True) == pytest.approx(0.5)
    with pytest.raises(ValueError, match=r"reward\.execution"):
        combine(0.5, 0.5, 0.5, config)
    teacher = Trace("why", full(TEACHER), TEACHER_STATE)
    seen = []
    reward = score_trace(
        render_trace(teacher), teacher, cosine=1.0, student_tokens=1, teacher_tokens=1,
        config=RewardConfig(action_weight=0.25, execution=0.25), executed=lambda action: seen.append(action) or False,
    )  # fmt: skip
    assert (reward.total, seen) == (pytest.approx(0.75), [teacher.action])


@pytest.mark.parametrize(
    "wrong",
    [
        {"action_weight": -0.1}, {"state_weight": math.nan}, {"think_weight": math.inf}, {"malformed": 0.1},
        {"clip_low": 0.5}, {"clip_high": 0.0}, {"brevity_penalty": -1.0}, {"brevity_ratio": 0.0}, {"execution": -1.0},
        {"state_match": "fuzzy"}, {"action_weight": 0.0, "state_weight": 0.0, "think_weight": 0.0},
    ],
)  # fmt: skip
def test_wrong_configuration_is_named(wrong):
    with pytest.raises(ValueError, match="reward." + next(iter(wrong))):
        RewardConfig(**wrong)


def test_match_set_f1():
    assert match_set_f1([], []) == 1.0
    assert match_set_f1([("a.py", 0, 3)], []) == 0.0
    assert match_set_f1([("a.py", 0, 3), ("a.py", 9, 12)], [("a.py", 0, 3)]) == pytest.approx(2 / 3)
    assert match_set_f1(range(1000), [1]) == pytest.approx(2 / 1001)


def test_match_set_precision_and_recall():
    assert match_set_precision_recall([], []) == (1.0, 1.0)
    assert match_set_precision_recall([], [1]) == match_set_precision_recall([1], []) == (0.0, 0.0)
    # Three places, two of them right, of four that are wanted: 2/3 and 2/4, whose harmonic mean is 4/7.
    assert match_set_precision_recall([1, 2, 9], [1, 2, 3, 4]) == (pytest.approx(2 / 3), 0.5)
    assert match_set_f1([1, 2, 9], [1, 2, 3, 4]) == pytest.approx(4 / 7)


text = st.text(st.sampled_from("abc$( é"), min_size=1, max_size=12)
kinds = st.sampled_from(["regex", "kind"])
maybe = lambda strategy: st.none() | strategy
actions = st.builds(
    Action,
    maybe(st.sampled_from(LANGUAGES)),
    maybe(text),
    maybe(text),
    maybe(st.lists(text, min_size=1, max_size=4).map(tuple)),
    st.dictionaries(st.sampled_from("ABC"), st.builds(lambda kind, value: {kind: value}, kinds, text)),
)
states = st.builds(StateUpdate, *[st.lists(text, max_size=4).map(tuple)] * 4)
matches = st.sampled_from(["exact", "soft"])
units = st.floats(0, 1)


@given(actions, actions)
def test_action_similarity_is_symmetric_in_range_and_one_only_for_equals(a, b):
    similarity = action_similarity(a, b)
    assert 0 <= similarity <= 1
    assert similarity == pytest.approx(action_similarity(b, a), abs=1e-12)
    assert action_similarity(a, a) == 1.0
    if similarity == 1.0:
        assert dataclasses.replace(a, files=None) == dataclasses.replace(b, files=None)
        assert sorted(a.files or ()) == sorted(b.files or ())


@given(states, states, matches)
def test_state_overlap_is_symmetric_in_range_and_one_for_equals(a, b, match):
    overlap = state_overlap(a, b, match)
    assert 0 <= overlap <= 1
    assert overlap == pytest.approx(state_overlap(b, a, match), abs=1e-12)
    assert state_overlap(a, a, match) == 1.0


@given(states, states)
def test_soft_matching_never_scores_below_exact(a, b):
    assert state_overlap(a, b, "soft") >= state_overlap(a, b, "exact") - 1e-12


@given(states, states, st.lists(st.integers(0, 999), min_size=1, max_size=8), matches)
def test_padding_a_state_with_junk_never_helps(student, teacher, junk, match):
    padding = tuple(f"#{number:03d}#" for number in junk)  # shares no character with the teacher's items
    padded = [(*items, *padding) for items in dataclasses.astuple(student)]
    for place in range(4):
        lists = list(dataclasses.astuple(student))
        lists[place] = padded[place]
        assert state_overlap(StateUpdate(*lists), teacher, match) <= state_overlap(student, teacher, match)
    assert state_overlap(StateUpdate(*padded), teacher, match) <= state_overlap(student, teacher, match)


@given(actions, actions)
def test_junk_in_an_action_never_helps(student, teacher):
    base = action_similarity(student, teacher)
    if teacher.constraints:
        with_junk = {**(student.constraints or {}), "JUNK": {"regex": "#"}}
        # A student without constraints gains the field's name, which F1 pays for honestly; else junk only dilutes.
        if student.constraints:
            assert action_similarity(dataclasses.replace(student, constraints=with_junk), teacher) <= base
    else:
        assume(not student.constraints)
        assert action_similarity(dataclasses.replace(student, constraints={"J": {"kind": "#"}}), teacher) <= base
    if student.files and teacher.files and len(student.files) >= len(teacher.files):
        padded = dataclasses.replace(student, files=(*student.files, "####"))
        assert action_similarity(padded, teacher) <= base


configs = st.builds(
    RewardConfig,
    action_weight=units.map(lambda x: x + 0.01), state_weight=units, think_weight=units,
    malformed=st.floats(-1, 0), clip_low=st.floats(-1, 0), clip_high=st.floats(0.1, 2),
    brevity_penalty=units, brevity_ratio=st.floats(0.5, 3), state_match=matches, execution=units,
)  # fmt: skip


@given(units, units, units, st.booleans(), configs)
def test_a_well_formed_trace_never_scores_below_a_malformed_one(action, overlap, think, executed, config):
    total = combine(action, overlap, think, config, executed=executed)
    assert config.malformed <= 0 <= total <= config.clip_high


@given(st.floats(-1, 1), st.integers(0, 10**6), st.integers(0, 10**6), st.integers(1, 10**4), configs)
def test_longer_never_scores_more_for_the_same_likeness(cosine, tokens, extra, teacher_tokens, config):
    short = think_similarity(cosine, tokens, teacher_tokens, config)
    assert 0 <= think_similarity(cosine, tokens + extra, teacher_tokens, config) <= short <= 1


@given(units, units, units)
def test_default_weights_keep_identity_at_exactly_one(action, overlap, think):
    assert combine(1.0, 1.0, 1.0) == 1.0
    assert combine(action, overlap, think) <= 1.0
