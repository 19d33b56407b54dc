import copy
import json
import pickle
import time
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srl_jax.trace import (
    LANGUAGES,
    MAX_JSON_BYTES,
    TAGS,
    Action,
    Rejection,
    StateUpdate,
    Trace,
    TraceError,
    parse_action,
    parse_state,
    parse_trace,
    render_action,
    render_state,
    render_trace,
    strict_json,
)

ACTION = {"language": "python", "pattern": "print($A)", "replacement": "logger.info($A)", "files": ["src/app.py"]}
STATE = {"decisions": ["log"], "constraints": ["keep API"], "open_issues": [], "next_focus": ["tests"]}
CANONICAL = (
    "<think>use the logger</think>\n"
    '<action>{"language":"python","pattern":"print($A)","replacement":"logger.info($A)","files":["src/app.py"]}'
    "</action>\n"
    '<state_update>{"decisions":["log"],"constraints":["keep API"],"open_issues":[],"next_focus":["tests"]}'
    "</state_update>"
)


def text_of(think="why", action=None, state=None):
    action = json.dumps(ACTION if action is None else action)
    state = json.dumps(STATE if state is None else state)
    return f"<think>{think}</think><action>{action}</action><state_update>{state}</state_update>"


def with_action(**changes):
    return json.dumps({**ACTION, **changes})


def rejection(parse, text):
    with pytest.raises(TraceError) as caught:
        parse(text)
    assert isinstance(caught.value.rejection, Rejection)
    return caught.value.rejection, caught.value.field


def test_canonical_text_parses_and_renders_to_itself():
    trace = parse_trace(CANONICAL)
    assert trace == Trace(
        "use the logger",
        Action("python", "print($A)", "logger.info($A)", ("src/app.py",)),
        StateUpdate(("log",), ("keep API",), (), ("tests",)),
    )
    assert render_trace(trace) == CANONICAL


def test_key_order_white_space_and_escapes_do_not_matter():
    shuffled = json.dumps(dict(reversed(list(ACTION.items()))), indent=3)
    escaped = json.dumps(STATE).replace("log", "\\u006cog")
    text = (
        f"\n <think>\n use the logger\t</think>\r\n\n<action> {shuffled}\n</action> "
        f"<state_update>\n{escaped}</state_update>"
    )
    assert render_trace(parse_trace(text)) == CANONICAL


@pytest.mark.parametrize("tail", ["\n", " thanks!", "<think>again</think>", "</state_update>", "\ud800", "{" * 10**6])
def test_text_after_the_stop_tag_is_cut(tail):
    assert render_trace(parse_trace(CANONICAL + tail)) == CANONICAL


@pytest.mark.parametrize("end", range(1, len(CANONICAL) - len(TAGS[-1]) + 1, 7))
def test_every_proper_beginning_is_truncated_or_lacks_its_first_tag(end):
    found, field = rejection(parse_trace, CANONICAL[:end])
    if end < len("<think>"):
        assert (found, field) == (Rejection.MISSING_TAG, "<think>")
    else:
        assert found == Rejection.TRUNCATED
        assert field == next(tag for tag in TAGS if tag not in CANONICAL[:end])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", (Rejection.MISSING_TAG, "<think>")),
        ("no tags at all", (Rejection.MISSING_TAG, "<think>")),
        (CANONICAL.replace("</think>", ""), (Rejection.MISSING_TAG, "</think>")),
        (CANONICAL.replace("<action>", ""), (Rejection.MISSING_TAG, "<action>")),
        (CANONICAL.replace("<state_update>", ""), (Rejection.MISSING_TAG, "<state_update>")),
        (CANONICAL.replace("</state_update>", ""), (Rejection.TRUNCATED, "</state_update>")),
        (CANONICAL.replace("<think>", "<think><think>"), (Rejection.REPEATED_TAG, "<think>")),
        (CANONICAL.replace("use", "use <action>"), (Rejection.REPEATED_TAG, "<action>")),
        (CANONICAL.replace("use", "use </think>"), (Rejection.REPEATED_TAG, "</think>")),
        (CANONICAL.replace("use", "use </state_update>"), (Rejection.MISSING_TAG, "</think>")),
        (CANONICAL.upper(), (Rejection.MISSING_TAG, "<think>")),
        (CANONICAL.replace("<think>", "<think >"), (Rejection.MISSING_TAG, "<think>")),
        (CANONICAL.replace("<think>", "<th\u200bink>"), (Rejection.MISSING_TAG, "<think>")),
        ("Sure! " + CANONICAL, (Rejection.STRAY_TEXT, "<think>")),
        ("\ufeff" + CANONICAL, (Rejection.STRAY_TEXT, "<think>")),
        ("Sure! <think>and then", (Rejection.STRAY_TEXT, "<think>")),
        (CANONICAL.replace("<action>", "so <action>"), (Rejection.STRAY_TEXT, "<action>")),
        (CANONICAL.replace("<state_update>", "\u200b<state_update>"), (Rejection.STRAY_TEXT, "<state_update>")),
        (CANONICAL.replace("use the logger", ""), (Rejection.EMPTY_THINK, "think")),
        (CANONICAL.replace("use the logger", " \n\t\u00a0 "), (Rejection.EMPTY_THINK, "think")),
        (CANONICAL.replace("logger<", "\ud83d<"), (Rejection.LONE_SURROGATE, "think")),
        ("<think>" * 10**5, (Rejection.REPEATED_TAG, "<think>")),
    ],
)  # fmt: skip
def test_tag_and_text_rejections(text, expected):
    assert rejection(parse_trace, text) == expected


def test_blocks_in_another_order_are_misordered():
    think, action, state = CANONICAL.split("\n")
    assert rejection(parse_trace, f"{action}{think}{state}") == (Rejection.MISORDERED_TAG, "<action>")
    nested = "<think>a<action>{}</think></action><state_update>{}</state_update>"
    assert rejection(parse_trace, nested) == (Rejection.MISORDERED_TAG, "<action>")
    # The stop condition cuts a leading state update off from the rest.
    assert rejection(parse_trace, f"{state}{think}{action}") == (Rejection.MISSING_TAG, "<think>")


@pytest.mark.parametrize("tag", TAGS)
def test_tag_text_cannot_be_smuggled_in_by_escapes(tag):
    smuggled = json.dumps({**STATE, "decisions": ["x" + tag]}).replace("<", "\\u003c")
    assert rejection(parse_state, smuggled) == (Rejection.TAG_IN_BLOCK, "state_update")
    smuggled = with_action(replacement=tag).replace("<", "\\u003C")
    assert rejection(parse_action, smuggled) == (Rejection.TAG_IN_BLOCK, "action")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", Rejection.BAD_JSON),
        ("{", Rejection.BAD_JSON),
        ("{'language': 'python'}", Rejection.BAD_JSON),
        (json.dumps(ACTION) + "x", Rejection.BAD_JSON),
        (json.dumps(ACTION)[:-1] + ",}", Rejection.BAD_JSON),
        (with_action().replace("print", "pr\nint"), Rejection.BAD_JSON),
        (with_action().replace("print", "pr\\xint"), Rejection.BAD_JSON),
        ('{"a": ' + "9" * 10000 + "}", Rejection.BAD_JSON),
        ('"' * 16000, Rejection.BAD_JSON),
        ('{"a":"' + '\\"' * 8000, Rejection.BAD_JSON),
        (with_action()[:-1] + ', "language": "python"}', Rejection.DUPLICATE_KEY),
        (with_action()[:-1] + ', "l\\u0061nguage": "python"}', Rejection.DUPLICATE_KEY),
        (with_action(constraints={"A": 1}).replace('"A": 1', '"A": {}, "A": {}'), Rejection.DUPLICATE_KEY),
        ('{"a": NaN}', Rejection.NOT_FINITE),
        ('{"a": -Infinity}', Rejection.NOT_FINITE),
        ("Infinity", Rejection.NOT_FINITE),
        (with_action().replace("print", "\\ud800"), Rejection.LONE_SURROGATE),
        (with_action().replace("print", "\\udc00\\ud800"), Rejection.LONE_SURROGATE),
        (with_action().replace("print", "\udfff"), Rejection.LONE_SURROGATE),
        (with_action()[:-1] + ', "\\ud800": 1}', Rejection.LONE_SURROGATE),
        ("[" * 8 + "]" * 8, Rejection.SCHEMA_VIOLATION),
        ("[" * 9 + "]" * 9, Rejection.TOO_DEEP),
        ("[" * 16000, Rejection.TOO_DEEP),
        ("[" * 10**5, Rejection.TOO_LARGE),
        ('{"a":' * 10**5, Rejection.TOO_LARGE),
        ("x" * 10**6, Rejection.TOO_LARGE),
        ("é" * (MAX_JSON_BYTES // 2 + 1), Rejection.TOO_LARGE),
        ("[]", Rejection.SCHEMA_VIOLATION),
        ("null", Rejection.SCHEMA_VIOLATION),
        ("1e999", Rejection.SCHEMA_VIOLATION),
    ],
)
def test_json_rejections(text, expected):
    assert rejection(parse_action, text) == (expected, "action")


json_texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=8)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | json_texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(json_texts, inner, max_size=4),
    max_leaves=12,
)


def same_as_json(text):
    return repr(strict_json(text, max_bytes=10**6, max_depth=None)) == repr(json.loads(text))


@given(json_values, st.sampled_from([(",", ":"), (", ", ": ")]), st.booleans())
def test_strict_json_reads_what_json_reads_however_it_is_written(value, separators, ensure_ascii):
    assert same_as_json(json.dumps(value, separators=separators, ensure_ascii=ensure_ascii))


@pytest.mark.parametrize(
    "text",
    ["1E5", "1e22", "1e-05", "-0", "-0.0", "1e400", "5e-324", "0.10",
     str(2**63), str(2**64 - 1), str(2**64), str(-(2**63) - 1),
     '"\\/"', '"\\u007f"', '"\x7f\u2028"', '"\\ud83d\\ude00"', '" \\u0000"', "[]", " {} "],
)  # fmt: skip
def test_strict_json_reads_odd_spellings_as_json_does(text):
    assert same_as_json(text)


@pytest.mark.parametrize("text", ['{"a":1,"a":1}', '[{"b":{"a":1,"a":2}}]', '{"a":1,"\\u0061":1}'])
def test_a_key_twice_is_refused_in_compact_json_too(text):
    assert rejection(partial(strict_json, max_bytes=100, max_depth=None), text) == (Rejection.DUPLICATE_KEY, None)


def test_whole_surrogate_pairs_and_brackets_in_strings_are_fine():
    action = parse_action(with_action(replacement="\U0001f600" + "[" * 100 + '\\"{'))
    assert action.replacement == "\U0001f600" + "[" * 100 + '\\"{'


def test_size_limit_counts_utf8_bytes_and_is_inclusive():
    padding = MAX_JSON_BYTES - len(json.dumps(STATE).encode())
    assert parse_state(json.dumps(STATE) + " " * padding)
    assert rejection(parse_state, json.dumps(STATE) + " " * (padding + 1))[0] == Rejection.TOO_LARGE


@pytest.mark.parametrize("name", list(ACTION))
def test_every_action_field_is_required_and_typed(name):
    without = {key: value for key, value in ACTION.items() if key != name}
    assert rejection(parse_action, json.dumps(without)) == (Rejection.SCHEMA_VIOLATION, name)
    for wrong in (None, 1, True, 1.5, {}, [1], [[]], "" if name != "replacement" else None):
        assert rejection(parse_action, with_action(**{name: wrong})) == (Rejection.SCHEMA_VIOLATION, name)


@pytest.mark.parametrize("name", list(STATE))
def test_every_state_list_is_required_and_typed(name):
    without = {key: value for key, value in STATE.items() if key != name}
    assert rejection(parse_state, json.dumps(without)) == (Rejection.SCHEMA_VIOLATION, name)
    for wrong in (None, "text", {}, [None], [1], [""], ["x"] * 17, ["x" * 301]):
        assert rejection(parse_state, json.dumps({**STATE, name: wrong})) == (Rejection.SCHEMA_VIOLATION, name)
    for right in ([], ["x"] * 16, ["x" * 300], ["\U0001f600" * 300]):
        assert parse_state(json.dumps({**STATE, name: right}))


def test_unknown_keys_are_rejected_by_name_and_cut():
    assert rejection(parse_action, with_action(rule="x")) == (Rejection.UNKNOWN_KEY, "rule")
    assert rejection(parse_action, with_action(**{"k" * 9000: 1})) == (Rejection.UNKNOWN_KEY, "k" * 40)
    assert rejection(parse_state, json.dumps({**STATE, "notes": []})) == (Rejection.UNKNOWN_KEY, "notes")


@pytest.mark.parametrize("language", LANGUAGES)
def test_languages(language):
    assert parse_action(with_action(language=language)).language == language


@pytest.mark.parametrize("language", ["Python", "py", "rust", " python", "pythоn"])  # the last with a Cyrillic o
def test_other_languages_are_rejected(language):
    assert rejection(parse_action, with_action(language=language)) == (Rejection.SCHEMA_VIOLATION, "language")


@pytest.mark.parametrize(
    "pattern",
    ["", " \n", "$A", " $A ", "$$A", "$$$A", "$$$", "$_", "$_REST", "x" * 2001, "(" * 65 + ")" * 65, "([{" * 22],
)
def test_bad_patterns(pattern):
    action = with_action(pattern=pattern, replacement="x")
    assert rejection(parse_action, action) == (Rejection.SCHEMA_VIOLATION, "pattern")


@pytest.mark.parametrize(
    "pattern", ["x", "$a", "$(x)", "f($$$)", "x" * 2000, "(" * 64 + ")" * 64, "()" * 900, "$A.$B", "é" * 2000]
)
def test_good_patterns(pattern):
    assert parse_action(with_action(pattern=pattern, replacement="x")).pattern == pattern


# Each verdict agrees with ast-grep 0.51's own, except that `$$A` and `$A` (interchangeable there) are kept apart.
@pytest.mark.parametrize(
    ("pattern", "replacement", "bound"),
    [
        ("f($A)", "g($A)", True),
        ("f($A1)", "g($A1)", True),
        ("f($A_B)", "$A_B", True),
        ("f($$$ARGS)", "g($$$ARGS, 1)", True),
        ("f($$OP)", "g($$OP)", True),
        ("f($A)", "g(x$A)", True),
        ("f($A)", "g($Abc)", True),
        ("f($A)", "$1 ${x} $ $abc $$", True),
        ("f($$$)", "g($$$)", True),
        ("f($A)", "", True),
        ("f($A)", "x" * 4000, True),
        ("f($A)", "g($B)", False),
        ("f($A)", "g($A, $B)", False),
        ("f($A)", "g('$B')", False),
        ("f($A)", "g($$$A)", False),
        ("f($$$A)", "g($A)", False),
        ("f($$A)", "g($A)", False),
        ("f($A)", "g($$$$A)", False),
        ("f($A)", "g($A_b)", False),
        ("f($AB)", "g($A)", False),
        ("f($Abc)", "g($A)", False),
        ("f(x$A)", "g($A)", False),
        ("f($_A)", "g($_A)", False),
        ("f($$$_A)", "g($$$_A)", False),
        ("f($_)", "g($_)", False),
        ("f($A)", "x" * 4001, False),
    ],
)
def test_replacement_uses_only_what_the_pattern_binds(pattern, replacement, bound):
    action = with_action(pattern=pattern, replacement=replacement)
    if bound:
        assert parse_action(action).replacement == replacement
    else:
        assert rejection(parse_action, action) == (Rejection.SCHEMA_VIOLATION, "replacement")


@pytest.mark.parametrize("glob", ["a.py", "src/**/*.py", "./a.py", "a..b.py", "...", "*.{js,ts}", "[ab]/c d.py", ".x"])
def test_good_globs(glob):
    assert parse_action(with_action(files=[glob])).files == (glob,)


@pytest.mark.parametrize(
    "glob",
    ["", " ", "/etc/passwd", "//x", "..", "../x", "a/../b", "a/..", "{..,a}/x", "{a,..}/x", "a\\b", "C:\\x", "a\0b"],
)
def test_bad_globs(glob):
    assert rejection(parse_action, with_action(files=["ok.py", glob])) == (Rejection.SCHEMA_VIOLATION, "files")


def test_number_of_globs():
    assert len(parse_action(with_action(files=["a"] * 16)).files) == 16
    for files in ([], ["a"] * 17, "a.py", None):
        assert rejection(parse_action, with_action(files=files)) == (Rejection.SCHEMA_VIOLATION, "files")


def test_constraints():
    for rule in ({"regex": "^x$"}, {"kind": "call"}):
        assert parse_action(with_action(constraints={"A": rule})).constraints == {"A": rule}
    empty = parse_action(with_action(constraints={}))
    assert empty == parse_action(with_action())
    assert "constraints" not in render_action(empty)


@pytest.mark.parametrize(
    "constraints",
    [None, [], "A", {"B": {"regex": "x"}}, {"$A": {"regex": "x"}}, {"A": {}}, {"A": {"regex": "x", "kind": "y"}},
     {"A": {"pattern": "x"}}, {"A": {"regex": 1}}, {"A": {"regex": ""}}, {"A": "x"}, {"": {"regex": "x"}},
     {"M": {"kind": "x"}}, {"_U": {"regex": "x"}}],
)  # fmt: skip
def test_bad_constraints(constraints):
    action = with_action(pattern="f($A, $_U, $$$M)", replacement="", constraints=constraints)
    assert rejection(parse_action, action) == (Rejection.SCHEMA_VIOLATION, "constraints")


def test_constraint_names_are_rendered_in_one_order():
    first = {"B": {"kind": "call"}, "A": {"regex": "é"}}
    action = with_action(pattern="f($A, $B)", replacement="", constraints=first)
    swapped = with_action(pattern="f($A, $B)", replacement="", constraints=dict(reversed(first.items())))
    assert render_action(parse_action(action)) == render_action(parse_action(swapped))
    assert '"constraints":{"A":{"regex":"é"},"B":{"kind":"call"}}' in render_action(parse_action(action))


def test_error_says_what_and_where_and_survives_pickling():
    with pytest.raises(TraceError, match=r"pattern.*bare metavariable") as caught:
        parse_trace(text_of(action={**ACTION, "pattern": "$A"}))
    assert caught.value.block == "action"
    for clone in (pickle.loads(pickle.dumps(caught.value)), copy.copy(caught.value)):
        assert (clone.rejection, clone.field, clone.block) == (Rejection.SCHEMA_VIOLATION, "pattern", "action")
        assert str(clone) == str(caught.value)


def test_parsed_traces_are_picklable():
    trace = parse_trace(text_of(action={**ACTION, "constraints": {"A": {"regex": "x"}}}))
    assert pickle.loads(pickle.dumps(trace)) == trace


@pytest.mark.parametrize(
    "text",
    [
        "<think>" + "a" * 10**7,
        "<" * 10**7,
        "<think>" + "[" * 10**6 + CANONICAL,
        text_of().replace("{", "{" * 10**5),
        text_of().replace('"print', '"' + '\\"' * 10**6),
        text_of().replace("print(", "print(" * 2000),
        "</think>" * 10**6,
        " " * 10**7 + CANONICAL[:-1],
    ],
    ids=lambda text: text[:12],
)
def test_hostile_sizes_are_refused_quickly(text):
    start = time.perf_counter()
    rejection(parse_trace, text)
    assert time.perf_counter() - start < 2.0


def test_megabyte_of_think_still_parses():
    assert len(parse_trace(text_of(think="ab " * 10**6)).think) == 3 * 10**6 - 1


# Text that ends in a tag's beginning, looks like JSON, or is rich in escapes is likelier to break a parser.
characters = st.one_of(
    st.characters(exclude_categories=("Cs",)), st.sampled_from(list('<>/"\\{}[]$.\n\u2028\x7f\0é\U0001f600'))
)
words = st.text(characters, min_size=1, max_size=30).filter(lambda text: not any(tag in text for tag in TAGS))
states = st.builds(StateUpdate, *[st.lists(words, max_size=4).map(tuple)] * 4)
names = st.from_regex(r"[A-Z][A-Z0-9_]{0,3}", fullmatch=True)


@st.composite
def actions(draw):
    bound = draw(st.lists(names, max_size=3, unique=True))
    pattern = "f(" + ", ".join(f"${name}" for name in bound) + ") " + draw(words).replace("$", "")
    replacement = draw(words).replace("$", "") + "".join(f" ${name}" for name in bound)
    globs = words.map(lambda text: "g" + text.replace("\\", "").replace("\0", "").replace("..", "").replace("/", ""))
    kinds = st.sampled_from(["regex", "kind"])
    constraints = {name: {draw(kinds): draw(words)} for name in bound if draw(st.booleans())}
    files = tuple(draw(st.lists(globs, min_size=1, max_size=3)))
    return Action(draw(st.sampled_from(LANGUAGES)), pattern, replacement, files, constraints)


traces = st.builds(Trace, words.map(lambda text: "t" + text.strip() + "."), actions(), states)


@given(traces)
def test_parse_inverts_render(trace):
    text = render_trace(trace)
    assert parse_trace(text) == trace
    assert render_trace(parse_trace(text)) == text
    assert parse_action(render_action(trace.action)) == trace.action
    assert parse_state(render_state(trace.state)) == trace.state


@given(traces, st.sampled_from(["", " ", "\n\n"]), st.sampled_from([None, 1, 7]), st.booleans())
def test_white_space_and_escaping_do_not_change_the_meaning(trace, space, indent, ascii_only):
    action = json.dumps(json.loads(render_action(trace.action)), indent=indent, ensure_ascii=ascii_only)
    state = json.dumps(json.loads(render_state(trace.state)), indent=indent, ensure_ascii=ascii_only, sort_keys=True)
    text = (
        f"{space}<think>{space}{trace.think}{space}</think>{space}<action>{space}{action}{space}</action>{space}"
        f"<state_update>{state}</state_update>{space}"
    )
    assert render_trace(parse_trace(text)) == render_trace(trace)


pieces = st.one_of(st.sampled_from([*TAGS, json.dumps(ACTION), json.dumps(STATE), "{}", "x", " ", "\n"]), st.text())


@settings(max_examples=300)
@given(st.lists(pieces, max_size=12).map("".join))
def test_any_text_either_parses_and_round_trips_or_is_rejected(text):
    try:
        trace = parse_trace(text)
    except TraceError as error:
        assert error.rejection in Rejection
        return
    assert parse_trace(render_trace(trace)) == trace


@settings(max_examples=300)
@given(st.integers(0, len(CANONICAL) - 1), st.sampled_from(["", "x", '"', "{", "<", "\\", "\0", "<think>", "$B"]))
def test_damaged_canonical_text_either_round_trips_or_is_rejected(place, insert):
    text = CANONICAL[:place] + insert + CANONICAL[place + 1 :]
    try:
        trace = parse_trace(text)
    except TraceError:
        return
    assert parse_trace(render_trace(trace)) == trace
