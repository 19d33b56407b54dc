"""Executing an action: what counts as success, what the report says, and that runs do not meet."""

from __future__ import annotations

import dataclasses
import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srl_jax.records import TestSpec
from srl_jax.sandbox import EnvReport, Limits, RunnerUnavailable, Sandbox, SandboxConfig, Status, TestOutcome
from srl_jax.sandbox.runner import ENV_REPORT_VERSION, runnable_files
from srl_jax.trace import Action

needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")

FILES = {
    "app/shop.py": "def total(xs):\n    return add_all(xs)\n\n\ndef add_all(xs):\n    return 0\n",
    "app/other.py": "def keep(xs):\n    return add_all(xs)\n",
    "tests/test_shop.py": (
        "import unittest\nfrom app.shop import total\n\n"
        "class ShopTest(unittest.TestCase):\n"
        "    def test_total(self):\n        self.assertEqual(total([1, 2]), 3)\n"
        "    def test_other(self):\n"
        "        with open('app/other.py') as f:\n            self.assertIn('add_all', f.read())\n"
    ),
}
SPEC = TestSpec(
    "unittest",
    ("tests.test_shop.ShopTest.test_total", "tests.test_shop.ShopTest.test_other"),
    ("tests/test_shop.py",),
)
RIGHT = Action("python", "return add_all($X)", "return sum($X)", ("app/shop.py",))
EXPECTED = {"app/shop.py": FILES["app/shop.py"].replace("return add_all(xs)", "return sum(xs)")}


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(SandboxConfig(slots=3, test_limits=Limits(wall_s=8.0, cpu_s=4))) as opened:
        yield opened


class TestSuccess:
    def test_the_right_edit(self, sandbox):
        report = sandbox.execute(RIGHT, FILES, tests=SPEC, expected=EXPECTED)
        assert report.success
        assert (report.status, report.matches, report.tests, report.expected_diff) == (Status.OK, 1, "finished", True)
        assert set(report.tests_passed) == set(SPEC.expected_ids)
        assert report.tests_failed == ()
        assert "-    return add_all(xs)\n+    return sum(xs)\n" in report.diff
        assert report.duration_s > 0
        assert report.versions.keys() >= {"ast-grep", "bwrap", "python"}

    def test_the_tests_fail_before_the_edit(self, sandbox):
        outcome = sandbox.run_tests(FILES, SPEC)
        assert outcome.failed == ("tests.test_shop.ShopTest.test_total",)
        assert outcome.passed == ("tests.test_shop.ShopTest.test_other",)

    def test_an_over_broad_edit_fails(self, sandbox):
        broad = dataclasses.replace(RIGHT, files=("app/*.py",))
        report = sandbox.execute(broad, FILES, tests=SPEC, expected=EXPECTED)
        assert not report.success
        assert report.expected_diff is False
        assert report.tests_failed == ("tests.test_shop.ShopTest.test_other",)

    def test_an_edit_that_is_not_the_expected_one_fails_though_tests_pass(self, sandbox):
        other = dataclasses.replace(RIGHT, replacement="return sum(list($X))")
        report = sandbox.execute(other, FILES, tests=SPEC, expected=EXPECTED)
        assert (report.success, report.tests, report.expected_diff) == (False, "finished", False)
        assert sandbox.execute(other, FILES, tests=SPEC).success

    def test_an_action_that_does_not_apply_runs_no_tests(self, sandbox):
        report = sandbox.execute(
            dataclasses.replace(RIGHT, pattern="nothing($X)"), FILES, tests=SPEC, expected=EXPECTED
        )
        assert (report.success, report.status, report.tests) == (False, Status.NO_MATCH, "not_run")
        assert report.expected_diff is False

    def test_without_tests_or_expectation_applying_is_success(self, sandbox):
        report = sandbox.execute(RIGHT, FILES)
        assert (report.success, report.tests, report.expected_diff) == (True, "not_run", None)

    def test_more_or_fewer_matches_than_expected_are_refused(self, sandbox):
        one = sandbox.execute(RIGHT, FILES, tests=SPEC, expect_matches=(1, 1))
        more = sandbox.execute(RIGHT, FILES, tests=SPEC, expect_matches=(2, 9))
        assert (one.success, more.success, more.status, more.matches) == (True, False, Status.TOO_MANY, 1)
        assert sandbox.apply(RIGHT, FILES, expect_matches=(0, 0)).status is Status.TOO_MANY

    def test_an_expected_id_that_does_not_exist_is_no_success(self, sandbox):
        spec = dataclasses.replace(SPEC, expected_ids=(*SPEC.expected_ids, "tests.test_shop.ShopTest.test_gone"))
        assert not sandbox.execute(RIGHT, FILES, tests=spec).success

    def test_no_expected_id_is_no_success(self, sandbox):
        assert not sandbox.execute(RIGHT, FILES, tests=dataclasses.replace(SPEC, expected_ids=())).success

    def test_the_tests_own_files_are_protected(self, sandbox):
        action = Action("python", "self.assertEqual($A, $B)", "pass", ("tests/*.py",))
        assert sandbox.execute(action, FILES, tests=SPEC).status is Status.PATH_DENIED

    def test_a_name_with_glob_characters_protects_itself_only(self, sandbox):
        files = {"tests/test_[a].py": "f(1)\n", "tests/test_a.py": "f(1)\n"}
        spec = TestSpec("unittest", ("x",), ("tests/test_[a].py",))
        action = Action("python", "f($A)", "g($A)", ("tests/test_a.py",))
        assert sandbox.execute(action, files, tests=spec).status is Status.OK
        action = Action("python", "f($A)", "g($A)", ("tests/test_[[]a].py",))
        assert sandbox.execute(action, files, tests=spec).status is Status.PATH_DENIED


class TestUnittestRunner:
    @pytest.mark.parametrize(("size", "ends"), [(65536, ("output_limit",)), (1, ("timeout", "cut"))])
    def test_what_keeps_the_supervisor_busy_is_the_guests_failure_and_no_crash(self, size, ends):
        """The supervisor's processor time is not what a flood may use up: a crash would leave the policy unscored."""
        flood = {"test_x.py": f"import os\nwhile True: os.write(1, b'x' * {size})\n"}
        with Sandbox(SandboxConfig(test_limits=Limits(wall_s=4.0, cpu_s=1))) as hasty:
            outcome = hasty.run_tests(flood, TestSpec("unittest", (), ("test_x.py",)))
        assert outcome.ended in ends

    def run(self, sandbox, body, **more):
        files = {"test_x.py": "import unittest\n" + body, **more}
        return sandbox.run_tests(files, TestSpec("unittest", (), ("test_x.py",)))

    def test_every_outcome_is_told_apart(self, sandbox):
        outcome = self.run(
            sandbox,
            "class T(unittest.TestCase):\n"
            "    def test_ok(self): pass\n"
            "    def test_fail(self): self.fail()\n"
            "    def test_error(self): 1 / 0\n"
            "    def test_skip(self): self.skipTest('x')\n"
            "    @unittest.expectedFailure\n    def test_expected(self): self.fail()\n"
            "    @unittest.expectedFailure\n    def test_unexpected(self): pass\n"
            "    def test_subtests(self):\n"
            "        for i in range(2):\n"
            "            with self.subTest(i=i): self.assertEqual(i, 0)\n"
            "    def test_teardown(self): self.addCleanup(lambda: 1 / 0)\n",
        )
        assert outcome.ended == "finished"
        assert outcome.passed == ("test_x.T.test_ok",)
        assert outcome.skipped == ("test_x.T.test_expected", "test_x.T.test_skip")
        assert outcome.failed == tuple(
            f"test_x.T.test_{name}" for name in ("error", "fail", "subtests", "teardown", "unexpected")
        )

    @pytest.mark.parametrize(
        "body",
        [
            "1 / 0",
            "def broken(:",
            "class T(unittest.TestCase):\n"
            "    @classmethod\n    def setUpClass(cls): 1 / 0\n"
            "    def test_ok(self): pass\n",
            "def setUpModule(): 1 / 0\nclass T(unittest.TestCase):\n    def test_ok(self): pass\n",
        ],
    )
    def test_set_up_failures_pass_nothing(self, sandbox, body):
        outcome = self.run(sandbox, body)
        assert outcome.passed == ()
        assert outcome.failed
        assert outcome.ended == "finished"

    def test_a_test_reported_twice_must_pass_twice(self, sandbox):
        outcome = self.run(
            sandbox,
            "class T(unittest.TestCase):\n"
            "    n = 0\n"
            "    def test_x(self):\n        type(self).n += 1\n        self.assertEqual(self.n, 1)\n"
            "def load_tests(loader, tests, pattern):\n"
            "    return unittest.TestSuite([T('test_x'), T('test_x')])\n",
        )
        assert outcome.failed == ("test_x.T.test_x",)

    def test_packages_scratch_space_and_arguments(self, sandbox):
        outcome = self.run(
            sandbox,
            "import sys, tempfile, os\nfrom pkg import value\n"
            "class T(unittest.TestCase):\n"
            "    def test_x(self):\n"
            "        self.assertEqual((value, len(sys.argv), os.getcwd()), (7, 1, '/repo'))\n"
            "        with tempfile.NamedTemporaryFile() as f: f.write(b'x')\n",
            **{"pkg/__init__.py": "from .inner import value\n", "pkg/inner.py": "value = 7\n"},
        )
        assert outcome.passed == ("test_x.T.test_x",), outcome.output

    def test_output_is_kept_to_its_end(self, sandbox):
        outcome = self.run(sandbox, "print('x' * 100_000 + 'the end')\n")
        assert 3000 < len(outcome.output) <= 4000
        assert "the end" in outcome.output

    def test_a_timeout_keeps_what_passed(self, sandbox):
        body = (
            "import time\nclass T(unittest.TestCase):\n"
            "    def test_a(self): pass\n    def test_b(self): time.sleep(99)\n"
        )
        with Sandbox(SandboxConfig(test_limits=Limits(wall_s=2.0))) as hasty:
            started = time.monotonic()
            outcome = self.run(hasty, body)
        assert time.monotonic() - started < 4
        assert (outcome.ended, outcome.passed) == ("timeout", ("test_x.T.test_a",))
        assert not outcome.satisfies(["test_x.T.test_a"])


class TestPytestRunner:
    def run(self, sandbox, body, **more):
        files = {"tests/test_x.py": "import pytest\n" + body, **more}
        return sandbox.run_tests(files, TestSpec("pytest", (), ("tests/test_x.py",)))

    def test_every_outcome_is_told_apart(self, sandbox):
        outcome = self.run(
            sandbox,
            "from pkg import value\n"
            "@pytest.fixture\ndef broken(): yield 1; 1 / 0\n"
            "@pytest.mark.parametrize('x', [1, 2])\ndef test_p(x): assert x == 1\n"
            "def test_ok(tmp_path, shared): (tmp_path / 'x').write_text('x'); assert shared == value\n"
            "def test_teardown(broken): pass\n"
            "def test_setup(missing): pass\n"
            "def test_skip(): pytest.skip('x')\n"
            "@pytest.mark.xfail\ndef test_xfail(): assert 0\n"
            "@pytest.mark.xfail\ndef test_xpass(): pass\n",
            **{
                "pkg.py": "value = 7\n",
                "tests/conftest.py": "import pytest\n@pytest.fixture\ndef shared(): return 7\n",
            },
        )
        at = "tests/test_x.py::test_"
        assert outcome.ended == "finished", outcome.output
        assert outcome.passed == (f"{at}ok", f"{at}p[1]")
        assert outcome.failed == (f"{at}p[2]", f"{at}setup", f"{at}teardown")
        assert outcome.skipped == (f"{at}skip", f"{at}xfail", f"{at}xpass")

    @pytest.mark.parametrize(
        ("body", "more"),
        [
            ("import os\nos._exit(0)\n", {}),
            ("raise SystemExit(0)\n", {}),
            ("pytest.exit('done', 0)\n", {}),
            ("pytest.skip('no', allow_module_level=True)\n", {}),
            ("def test_a(): pass\n", {"pytest.ini": "[pytest]\naddopts = --deselect tests/test_x.py::test_a\n"}),
            ("def test_a(): pass\n", {"pytest.ini": "[pytest]\naddopts = --collect-only\n"}),
            ("def test_a(): pass\n", {"conftest.py": "import os\nos._exit(0)\n"}),
        ],
    )
    def test_games_pass_nothing(self, sandbox, body, more):
        assert not self.run(sandbox, body, **more).satisfies(["tests/test_x.py::test_a"])


@needs_node
class TestNodeRunner:
    FILES = (
        ("src/shop.js", "exports.total = (xs) => first(xs);\nfunction first(xs) { return xs[0]; }\n"),
        (
            "test/shop.test.js",
            "const { test, describe, it } = require('node:test');\nconst assert = require('node:assert');\n"
            "const { total } = require('../src/shop.js');\n"
            "test('totals', () => assert.equal(total([1, 2]), 3));\n"
            "describe('suite', () => {\n  it('inner', () => {});\n  it.skip('skipped', () => {});\n"
            "  describe('deep', () => { it('deepest', () => console.log('noise')); });\n});\n"
            "test('parent', async (t) => { await t.test('child', () => {}); });\n",
        ),
    )
    SPEC = TestSpec("node", ("test/shop.test.js::totals",), ("test/shop.test.js",))

    def test_before_and_after(self, sandbox):
        files = dict(self.FILES)
        assert sandbox.run_tests(files, self.SPEC).failed == ("test/shop.test.js::totals",)
        action = Action("javascript", "first($X)", "$X.reduce((a, b) => a + b, 0)", ("src/*.js",))
        report = sandbox.execute(action, files, tests=self.SPEC)
        assert report.success, report
        assert report.tests_passed == (
            "test/shop.test.js::parent",
            "test/shop.test.js::parent > child",
            "test/shop.test.js::suite > deep > deepest",
            "test/shop.test.js::suite > inner",
            "test/shop.test.js::totals",
        )

    @pytest.mark.parametrize(
        "body", ["process.exit(0)", "process.kill(process.ppid)", "throw new Error()", "while (true) {}", "import 'x'"]
    )
    def test_a_file_that_leaves_early_passes_nothing_expected(self, body):
        files = {"a.test.mjs": f"import test from 'node:test';\n{body};\ntest('t', () => {{}});\n"}
        spec = TestSpec("node", ("a.test.mjs::t",), ("a.test.mjs",))
        with Sandbox(SandboxConfig(test_limits=Limits(wall_s=4.0, cpu_s=3))) as hasty:
            outcome = hasty.run_tests(files, spec)
        assert not outcome.satisfies(spec.expected_ids), outcome

    def test_without_node_javascript_is_refused_by_name(self, monkeypatch):
        find = shutil.which
        monkeypatch.setattr(shutil, "which", lambda name: None if name == "node" else find(name))
        with Sandbox() as bare:
            assert "node" not in bare.runners
            with pytest.raises(RunnerUnavailable, match="node"):
                bare.run_tests(dict(self.FILES), self.SPEC)
            assert bare.execute(RIGHT, FILES, tests=SPEC).success


class TestSpecifications:
    def test_only_runnable_files_are_loaded(self):
        spec = TestSpec("unittest", (), ("tests/test_a.py", "pyproject.toml", "tests/data.json", "tests/helper.py"))
        assert runnable_files(spec) == ("tests/test_a.py",)

    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            (TestSpec("cargo", (), ("tests/test_a.py",)), "runner"),
            (TestSpec("unittest", (), ("setup.cfg",)), "names no unittest test file"),
            (TestSpec("unittest", (), ("test_gone.py",)), "not in the repository"),
        ],
    )
    def test_bad_ones_are_named(self, sandbox, spec, message):
        with pytest.raises(ValueError, match=message):
            sandbox.run_tests(FILES, spec)

    def test_slots_must_be_positive(self):
        with pytest.raises(ValueError, match="slots"):
            Sandbox(SandboxConfig(slots=0))


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
reports = st.builds(
    EnvReport,
    success=st.booleans(),
    status=st.sampled_from(Status),
    detail=texts,
    diff=texts,
    matches=st.integers(0, 9),
    overlaps=st.integers(0, 9),
    tests=st.sampled_from(["not_run", "finished", "cut", "timeout", "output_limit"]),
    tests_passed=st.lists(texts, max_size=3).map(tuple),
    tests_failed=st.lists(texts, max_size=3).map(tuple),
    test_output=texts,
    expected_diff=st.sampled_from([None, True, False]),
    duration_s=st.floats(0, 99),
    isolation=texts,
    versions=st.dictionaries(texts, texts, max_size=2),
    places=st.lists(st.tuples(texts, st.integers(0, 9), st.integers(0, 9)), max_size=3).map(tuple),
    version=st.just(ENV_REPORT_VERSION),
)


class TestEnvReport:
    @given(reports)
    def test_round_trips_through_json(self, report):
        assert EnvReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"version": "srl-env-report/0"}, "version"),
            ({"success": 1}, "success"),
            ({"status": "fine"}, "fine"),
            ({"tests_passed": "abc"}, "tests_passed"),
            ({"tests_passed": [1]}, "tests_passed"),
            ({"extra": 1}, "extra"),
            ({"matches": None}, "matches"),
            ({"places": [["a.py", 0]]}, "places"),
            ({"places": [["a.py", 0, True]]}, "places"),
        ],
    )
    def test_foreign_data_is_refused_by_field(self, change, message):
        good = EnvReport(True, Status.OK, "", "", 1, 0, "not_run", (), (), "", None, 0.1, "x").to_dict()
        with pytest.raises(ValueError, match=message):
            EnvReport.from_dict(good | change)
        del good["diff"]
        with pytest.raises(ValueError, match="diff"):
            EnvReport.from_dict(good)

    @given(st.lists(texts), st.lists(texts))
    def test_outcomes_are_satisfied_by_supersets_only(self, passed, expected):
        outcome = TestOutcome("finished", tuple(passed))
        assert outcome.satisfies(expected) == (bool(expected) and set(expected) <= set(passed))
        assert not TestOutcome("cut", tuple(passed)).satisfies(expected)


class TestConcurrency:
    def test_runs_share_nothing(self, sandbox):
        body = (
            "import unittest, os, time\nclass T(unittest.TestCase):\n    def test_x(self):\n"
            "        self.assertEqual([n for n in os.listdir('/tmp')], [])\n"
            "        open('/tmp/mark', 'w').close()\n        time.sleep(0.3)\n"
        )
        spec = TestSpec("unittest", ("test_x.T.test_x",), ("test_x.py",))
        with ThreadPoolExecutor(6) as pool:
            outcomes = list(pool.map(lambda _: sandbox.run_tests({"test_x.py": body}, spec), range(6)))
        assert all(outcome.satisfies(spec.expected_ids) for outcome in outcomes), outcomes

    def test_no_more_runs_than_slots(self, sandbox):
        running, most, lock = [0], [0], threading.Lock()
        inner = sandbox._jail.run

        class Counting:
            def __getattr__(self, name):
                return getattr(sandbox_jail, name)

            def run(self, *args, **kwargs):
                with lock:
                    running[0] += 1
                    most[0] = max(most[0], running[0])
                try:
                    return inner(*args, **kwargs)
                finally:
                    with lock:
                        running[0] -= 1

        sandbox_jail = sandbox._jail
        sandbox._jail = Counting()
        try:
            with ThreadPoolExecutor(9) as pool:
                list(pool.map(lambda _: sandbox.apply(RIGHT, FILES), range(18)))
        finally:
            sandbox._jail = sandbox_jail
        assert most[0] == 3


def test_an_action_without_tests_is_quick(sandbox):
    sandbox.apply(RIGHT, FILES)
    times = []
    for _ in range(7):
        started = time.monotonic()
        assert sandbox.apply(RIGHT, FILES).status is Status.OK
        times.append(time.monotonic() - started)
    assert sorted(times)[3] < 1.0  # 0.05 s on an idle machine; the suite may share its two cores
