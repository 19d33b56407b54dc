"""The engine applies one action byte-exactly, tells its failures apart and never touches what is protected."""

from __future__ import annotations

import dataclasses
import fnmatch
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srl_jax.sandbox import Limits, Sandbox, SandboxConfig, Status
from srl_jax.sandbox.engine import inline_rules, unified_diff
from srl_jax.sandbox.globs import is_relative_path, matches
from srl_jax.sandbox.guest.engine import apply_edits, select_edits
from srl_jax.trace import Action


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(SandboxConfig(engine_limits=Limits(wall_s=20.0))) as opened:
        yield opened


def python(pattern, replacement, files=("**/*.py",), **constraints):
    return Action("python", pattern, replacement, files, constraints)


class TestGlobs:
    @pytest.mark.parametrize(
        ("path", "glob", "expected"),
        [
            ("a.py", "*.py", True),
            ("src/a.py", "*.py", False),
            ("src/a.py", "./src/*.py", True),
            ("a.py", "**/*.py", True),
            ("src/x/a.py", "src/**/a.py", True),
            ("src/a.py", "src/**/a.py", True),
            ("src/a.py", "src/**", True),
            ("srcx/a.py", "src/**", False),
            ("src/a.py", "src", False),
            ("a1.py", "a?.py", True),
            ("a/.py", "a?.py", False),
            ("b.py", "[a-c].py", True),
            ("d.py", "[!a-c].py", True),
            ("b.py", "[!a-c].py", False),
            ("[x].py", "[[]x].py", True),
            ("a[.py", "a[.py", True),
            ("a{b}.py", "a{b}.py", True),
            ("**", "[*][*]", True),
        ],
    )
    def test_examples(self, path, glob, expected):
        assert matches(path, glob) is expected

    @given(st.text("ab/", max_size=8), st.text("ab*?", max_size=8))
    def test_one_segment_agrees_with_fnmatch(self, path, glob):
        path = path.replace("/", "")
        if glob != "**":  # a segment of its own meaning
            assert matches(path, glob) is bool(fnmatch.fnmatchcase(path, glob))

    @given(st.lists(st.sampled_from(["a", "b", "*", "**", "a*"]), min_size=1, max_size=6), st.text("ab/", max_size=9))
    def test_segments_agree_with_a_search(self, parts, path):
        def search(parts, segments):
            if not parts:
                return not segments
            if parts[0] == "**":
                return search(parts[1:], segments) or bool(segments and search(parts, segments[1:]))
            first = segments and fnmatch.fnmatchcase(segments[0], parts[0])
            return bool(first and search(parts[1:], segments[1:]))

        path = "/".join(filter(None, path.split("/"))) or "a"
        assert matches(path, "/".join(parts)) is search(parts, path.split("/"))

    def test_hostile_globs_take_no_time(self):
        path = "/".join(["a" * 40] * 40) + "/b"
        started = time.monotonic()
        for glob in ("**/" * 400 + "c", "*a" * 400 + "c", "/".join(["**", "*a*a*a*a*a"] * 100) + "/c", "[a-" * 400):
            assert not matches(path, glob)
        assert time.monotonic() - started < 2

    @pytest.mark.parametrize("path", ["", "/a", "a//b", "../a", "a/..", "./a", "a/", "a\0b", "a\\b", "."])
    def test_paths_that_leave_the_repository(self, path):
        assert not is_relative_path(path)


class TestEdits:
    def test_outermost_of_nested_edits_wins(self):
        kept, dropped = select_edits([(2, 5, "b"), (0, 9, "a"), (9, 10, "c"), (9, 10, "d"), (8, 11, "e")])
        assert kept == [(0, 9, "a"), (9, 10, "c")]
        assert dropped == 3

    @given(st.text(max_size=30), st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30), st.text(max_size=3))))
    def test_selected_edits_always_apply_to_ascii(self, text, edits):
        text = text.encode("ascii", "ignore").decode()
        edits = [(min(a, b), max(a, b), new) for a, b, new in edits if max(a, b) <= len(text)]
        kept, dropped = select_edits(edits)
        assert len(kept) + dropped == len(edits)
        after = apply_edits(text, kept)
        size = len(text.encode()) + sum(len(new.encode()) - (end - start) for start, end, new in kept)
        assert len(after.encode()) == size

    def test_offsets_are_bytes(self):
        assert apply_edits("é = 1", [(5, 6, "2")]) == "é = 2"

    @pytest.mark.parametrize("edits", [[(3, 1, "")], [(0, 99, "")], [(2, 3, ""), (0, 1, "")], [(0, 2, ""), (1, 3, "")]])
    def test_edits_out_of_order_are_refused(self, edits):
        with pytest.raises(ValueError, match="out of order"):
            apply_edits("abcdef", edits)

    def test_an_edit_that_splits_a_character_is_refused(self):
        with pytest.raises(UnicodeDecodeError):
            apply_edits("é", [(0, 1, "")])


FILES = {"src/a.py": "print('ü')\nprint(1)\n", "src/b.py": "x = 1\n", "tests/test_a.py": "print(1)\n"}
GUARDED = {"src/a.py": "f(1)\n", "tests/test_a.py": "f(1)\n", "conftest.py": "f(1)\n", "sub/setup.py": "f(1)\n"}


class TestStatuses:
    def test_ok(self, sandbox):
        result = sandbox.apply(python("print($A)", "log($A)", ("src/*.py",)), FILES)
        assert result.status is Status.OK
        assert result.files_after == {**FILES, "src/a.py": "log('ü')\nlog(1)\n"}
        assert result.matches == {"src/a.py": 2}
        assert result.places == {("src/a.py", 0, 11), ("src/a.py", 12, 20)}  # bytes: the ü is two
        assert result.diff.splitlines()[:2] == ["--- a/src/a.py", "+++ b/src/a.py"]

    @pytest.mark.parametrize(
        ("action", "status"),
        [
            (python("print($A", "log($A)"), Status.ENGINE_REJECT),
            (python("print($A)", "log($A)", A={"kind": "no_such_kind"}), Status.ENGINE_REJECT),
            (python("print($A)", "log($A)", A={"regex": "("}), Status.ENGINE_REJECT),
            (python("nothing($A)", "log($A)"), Status.NO_MATCH),
            (python("print($A)", "log($A)", ("lib/*.py",)), Status.NO_MATCH),
            (python("print($A)", "print($A)", ("src/*.py",)), Status.NOOP),
            (python("print($A)", "log($A", ("src/*.py",)), Status.UNPARSABLE_AFTER),
            (python("print($A)", "return break", ("src/*.py",)), Status.UNPARSABLE_AFTER),
            (python("print($A)", "log($B)"), Status.SCHEMA_ERROR),
            (python("$A", "$A"), Status.SCHEMA_ERROR),
            (python("print($A)", "log($A)", ("../*.py",)), Status.SCHEMA_ERROR),
            (Action("cobol", "a", "b", ("*",)), Status.SCHEMA_ERROR),
            (Action("python", "a", "b", None), Status.SCHEMA_ERROR),
            (Action("python", None, "b", ("*",)), Status.SCHEMA_ERROR),
            (python("a", "b", "*.py"), Status.NO_MATCH),  # a string of globs is one glob per character
            (Action("python", "a", 7, ("*",)), Status.SCHEMA_ERROR),  # type: ignore[arg-type]
        ],
    )
    def test_failures_leave_the_repository_alone(self, sandbox, action, status):
        result = sandbox.apply(action, FILES)
        assert result.status is status
        assert result.files_after == FILES
        assert result.diff == ""

    def test_too_many(self):
        files = {"a.py": "f(1)\n" * 11}
        with Sandbox(SandboxConfig(max_matches=10)) as strict:
            assert strict.apply(python("f($A)", "g($A)"), files).status is Status.TOO_MANY
            files["a.py"] = "f(1)\n" * 10
            assert strict.apply(python("f($A)", "g($A)"), files).status is Status.OK

    def test_nested_matches_rewrite_the_outermost_and_are_counted(self, sandbox):
        files = {"a.py": "f(f(f(1)))\n"}
        result = sandbox.apply(python("f($A)", "g($A)"), files)
        assert (result.status, result.files_after["a.py"], result.overlaps) == (Status.OK, "g(f(f(1)))\n", 2)
        with Sandbox(SandboxConfig(allow_overlaps=False)) as strict:
            assert strict.apply(python("f($A)", "g($A)"), files).status is Status.OVERLAP

    def test_expected_match_counts_are_bounds(self, sandbox):
        from srl_jax.sandbox.engine import apply_action

        def run(bounds):
            with sandbox._slot() as slot:
                return apply_action(
                    python("print($A)", "log($A)", ("src/*.py",)),
                    FILES,
                    jail=sandbox._jail,
                    limits=Limits(),
                    slot=slot,
                    expect_matches=bounds,
                ).status

        assert [run((2, 2)), run((1, 3)), run((3, 9)), run((0, 1))] == [
            Status.OK, Status.OK, Status.TOO_MANY, Status.TOO_MANY,
        ]  # fmt: skip

    def test_a_hostile_text_cannot_crash_the_service(self, sandbox):
        result = sandbox.apply(python("f($A)", "g($A)"), {"a.py": "(" * 60_000 + "f(1)"})
        assert result.status in (Status.CRASH, Status.TIMEOUT, Status.NO_MATCH, Status.OK)
        assert sandbox.apply(python("f($A)", "g($A)"), {"a.py": "f(1)\n"}).status is Status.OK


class TestProtection:
    def test_an_edit_to_a_protected_file_refuses_the_whole_action(self, sandbox):
        result = sandbox.apply(python("f($A)", "g($A)"), GUARDED, protected=["tests/**"])
        assert result.status is Status.PATH_DENIED
        assert result.files_after == GUARDED
        for path in ("conftest.py", "tests/test_a.py", "sub/setup.py"):
            assert path in result.detail

    def test_reaching_a_protected_file_without_a_match_is_no_edit(self, sandbox):
        files = {"src/a.py": "f(1)\n", "tests/test_a.py": "h(1)\n"}
        assert sandbox.apply(python("f($A)", "g($A)"), files, protected=["tests/**"]).status is Status.OK

    @pytest.mark.parametrize("path", [".git/hooks/x.py", "a/.github/x.py", "sitecustomize.py", "a/conftest.py"])
    def test_some_files_are_always_protected(self, sandbox, path):
        assert sandbox.apply(python("f($A)", "g($A)"), {path: "f(1)\n"}).status is Status.PATH_DENIED


class TestExactness:
    @pytest.mark.parametrize(
        ("before", "after"),
        [
            ("\n\n  \nf(1)\n", "\n\n  \ng(1)\n"),
            ("\ufefff(1)\n", "\ufeffg(1)\n"),
            ("f(1)\r\nx\r\n", "g(1)\r\nx\r\n"),
            ("x = '\U0001f600'; f(1)  # \u0085\u2028\x7f\n", None),
            ("f(1)", "g(1)"),
            ("if x:\n\tf(1)\n", "if x:\n\tg(1)\n"),
            ("# ast-grep-ignore\nf(1)\n\nf(2)\n", "# ast-grep-ignore\nf(1)\n\ng(2)\n"),
        ],
    )
    def test_bytes_around_the_edit_stay(self, sandbox, before, after):
        result = sandbox.apply(python("f($A)", "g($A)"), {"a.py": before})
        assert result.status is Status.OK
        assert result.files_after["a.py"] == (after if after is not None else before.replace("f(1)", "g(1)"))

    def test_multiline_replacements_are_indented(self, sandbox):
        files = {"a.py": "def h():\n    if x:\n        f(1)\n"}
        result = sandbox.apply(python("f($A)", "if ready:\n    g($A)"), files)
        assert result.files_after["a.py"] == "def h():\n    if x:\n        if ready:\n            g(1)\n"

    @pytest.mark.parametrize("text", ["\U0001f600é", "\u0085\u2028\x7f", "---\n- x: [", "#{}&*!|>%@`", "\\ud83d\\ude0"])
    def test_any_text_travels_in_the_rule(self, sandbox, text):
        literal = repr(text)
        result = sandbox.apply(python("f($A)", f"g($A, {literal})"), {"a.py": "f(1)\n"})
        assert result.status is Status.OK, result.detail
        assert result.files_after["a.py"] == f"g(1, {literal})\n"

    def test_constraints_filter(self, sandbox):
        files = {"a.py": "f(1)\nf('s')\nf(12)\n"}
        by_regex = sandbox.apply(python("f($A)", "g($A)", A={"regex": "^1$"}), files)
        by_kind = sandbox.apply(python("f($A)", "g($A)", A={"kind": "string"}), files)
        assert by_regex.files_after["a.py"] == "g(1)\nf('s')\nf(12)\n"
        assert by_kind.files_after["a.py"] == "f(1)\ng('s')\nf(12)\n"

    @pytest.mark.parametrize(
        ("language", "path", "before", "after"),
        [
            ("javascript", "a.mjs", "foo(a, b);\n", "bar(a, b);\n"),
            ("typescript", "a.ts", "const x: number = foo(a);\n", "const x: number = bar(a);\n"),
            ("tsx", "a.tsx", "const x = <A b={foo(1)}/>;\n", "const x = <A b={bar(1)}/>;\n"),
            ("java", "A.java", "class A { int x = foo(1, 2); }\n", "class A { int x = bar(1, 2); }\n"),
        ],
    )
    def test_every_language(self, sandbox, language, path, before, after):
        action = Action(language, "foo($$$A)", "bar($$$A)", ("*",))
        result = sandbox.apply(action, {path: before, "other.py": "foo(1)\n"})
        assert (result.status, result.files_after[path]) == (Status.OK, after)
        broken = sandbox.apply(dataclasses.replace(action, replacement="bar($$$A"), {path: before})
        assert broken.status is Status.UNPARSABLE_AFTER

    @pytest.mark.parametrize(
        ("language", "path", "pattern", "replacement", "before", "after"),
        [
            # What JavaScript's grammar would refuse.  A statement's match takes its semicolon with it.
            ("typescript", "a.ts", "let $N: any", "let $N: unknown", "let x: any;\n", "let x: unknown\n"),
            ("typescript", "a.mts", "f<$T>($A)", "g<$T>($A)", "f<number>(1);\n", "g<number>(1);\n"),
            ("typescript", "a.cts", "$X as any", "$X as unknown", "g(x as any);\n", "g(x as unknown);\n"),
            ("typescript", "a.ts", "<any>$X", "$X as any", "const y = <any>x;\n", "const y = x as any;\n"),
            ("typescript", "a.ts", "$X!.$P", "$X?.$P", "a!.b();\n", "a?.b();\n"),
            ("typescript", "a.ts", "enum $E { $$$M }", "const enum $E {$$$M}", "enum E {A}\n", "const enum E {A}\n"),
            ("tsx", "a.tsx", "<$T>{$X}</$T>", "<$T>{f($X)}</$T>", "a = <b>{x}</b>;\n", "a = <b>{f(x)}</b>;\n"),
            ("tsx", "a.tsx", "<Old $$$P />", "<New $$$P />", "a = <Old x={1} y />;\n", "a = <New x={1} y />;\n"),
            ("tsx", "a.tsx", "useState<$T>($A)", "useRef<$T>($A)", "useState<A>(null);\n", "useRef<A>(null);\n"),
        ],
    )  # fmt: skip
    def test_typescript_and_its_jsx(self, sandbox, language, path, pattern, replacement, before, after):
        result = sandbox.apply(Action(language, pattern, replacement, ("*",)), {path: before})
        assert (result.status, result.files_after[path]) == (Status.OK, after)

    @pytest.mark.parametrize(
        ("language", "path"), [("typescript", "a.tsx"), ("tsx", "a.ts"), ("javascript", "a.ts"), ("typescript", "a.js")]
    )
    def test_a_language_reaches_its_own_files_only(self, sandbox, language, path):
        result = sandbox.apply(Action(language, "f($A)", "g($A)", ("*",)), {path: "f(1);\n"})
        assert result.status is Status.NO_MATCH

    @pytest.mark.parametrize(
        ("language", "path", "before", "replacement"),
        [
            ("typescript", "a.ts", "let x: A = f(1);\n", "<b>g</b>"),  # JSX is no TypeScript
            ("tsx", "a.tsx", "let x = f(1);\n", "<any>g"),  # and the old cast is an open tag in TSX
            ("typescript", "a.ts", "f(1);\n", "interface { x: number }"),
        ],
    )
    def test_what_the_dialect_does_not_parse_is_refused(self, sandbox, language, path, before, replacement):
        result = sandbox.apply(Action(language, "f($A)", replacement, ("*",)), {path: before})
        assert result.status is Status.UNPARSABLE_AFTER

    def test_a_file_that_did_not_parse_before_may_still_be_edited(self, sandbox):
        result = sandbox.apply(python("f($A)", "g($A)"), {"a.py": "f(1)\ndef (:\n"})
        assert result.files_after["a.py"] == "g(1)\ndef (:\n"

    @settings(max_examples=15, deadline=None)
    @given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20))
    def test_any_string_literal_survives(self, sandbox, text):
        literal = repr(text)
        result = sandbox.apply(python("f($A)", "g($A)"), {"a.py": f"# {literal}\nf({literal})\n"})
        assert result.files_after["a.py"] == f"# {literal}\ng({literal})\n"


def test_rules_are_plain_ascii_documents():
    edit, damage = inline_rules(python("f('\u2028\U0001f600')", "g"))
    assert (edit + damage).isascii()
    assert edit.count("\n---\n") == 1
    assert "\\U0001f600" in edit


@pytest.mark.parametrize(
    "files", [{"/etc/x": ""}, {"../x": ""}, {"a//b": ""}, {"a": "", "a/b": ""}, {f"{i}.py": "" for i in range(513)}]
)
def test_repositories_that_are_none(sandbox, files):
    with pytest.raises(ValueError, match="repository"):
        sandbox.apply(python("f($A)", "g($A)"), files)


def test_diff_names_added_and_unterminated_files():
    diff = unified_diff({"a": "x\n"}, {"a": "y", "b": "z\n"})
    assert diff == (
        "--- a/a\n+++ b/a\n@@ -1 +1 @@\n-x\n+y\n\\ No newline at end of file\n--- a/b\n+++ b/b\n@@ -0,0 +1 @@\n+z\n"
    )
