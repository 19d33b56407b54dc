"""Run an action and its tests where they can hurt nobody, and say what happened.

    with Sandbox() as sandbox:
        report = sandbox.execute(action, files, tests=task.tests, expected=changed_files)

An action succeeds when it applied, when exactly the expected test ids passed in a test run that reached its end, and
when the edited repository is the expected one, as far as tests and an expectation are given.  Tests and
configuration cannot have been touched: an edit to a protected file is refused, and the repository the tests see is
laid out afresh and read-only.

What the tests prove is bounded: they share a process with the code under test, and code that hunts for the reporter
inside its own process can forge a pass.  The oracle on the diff is outside its reach; give `expected` where it matters.
"""

from __future__ import annotations

import dataclasses
import json
import queue
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from types import TracebackType
from typing import Any

from srl_jax.records import TestSpec
from srl_jax.sandbox.engine import EngineResult, Status, apply_action
from srl_jax.sandbox.globs import is_relative_path
from srl_jax.sandbox.isolation import Jail, Limits, SandboxUnavailable, Slot, SlotPool, open_jail
from srl_jax.trace import Action

ENV_REPORT_VERSION = "srl-env-report/2"

# Files that decide what a test run means, whatever the task says: version control, and configuration of runners.
PROTECTED = (
    "**/.git/**", "**/.hg/**", "**/.github/**", "**/.gitignore", "**/.gitattributes",
    "**/conftest.py", "**/sitecustomize.py", "**/usercustomize.py", "**/setup.py", "**/noxfile.py",
    "**/pyproject.toml", "**/setup.cfg", "**/tox.ini", "**/pytest.ini", "**/sgconfig.yml",
    "**/package.json", "**/package-lock.json", "**/*.config.js", "**/*.config.mjs", "**/*.config.cjs", "**/*.config.ts",
)  # fmt: skip

_TEST_SUFFIXES = {"unittest": (".py",), "pytest": (".py",), "node": (".js", ".mjs", ".cjs"), "java": (".java",)}

_COMPANIONS = {  # of guest/run_tests.py; what it needs for Java, the toolchain binds
    "unittest": ("run_unittest.py",),
    "pytest": ("run_pytest.py",),
    "node": ("node_reporter.mjs",),
    "java": (),
}


class RunnerUnavailable(SandboxUnavailable):
    """The machine lacks the program a test runner needs (Node, pytest, a JDK); other runners are unaffected."""


@dataclass(frozen=True)
class SandboxConfig:
    """`slots` runs may be under way at once, each under its own uid; limits are per run.

    `slot_memory_bytes` and `slot_processes` bound a whole run, where the machine gives us control groups.
    """

    slots: int = 1
    slot_memory_bytes: int = 2 << 30
    slot_processes: int = 256
    engine_limits: Limits = field(default_factory=Limits)
    test_limits: Limits = field(default_factory=lambda: Limits(wall_s=30.0, cpu_s=20))
    max_matches: int = 1000
    allow_overlaps: bool = True


@dataclass(frozen=True)
class TestOutcome:
    """One test run.  `ended` is "finished", "cut" (the runner died or left early), "timeout", "output_limit" or
    "memory_limit".
    """

    __test__ = False  # pytest would collect the class for its name

    ended: str
    passed: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    output: str = ""

    def satisfies(self, expected_ids: Sequence[str]) -> bool:
        """Whether the run reached its end and every expected id (there must be one) passed."""
        return self.ended == "finished" and bool(expected_ids) and set(expected_ids) <= set(self.passed)


@dataclass(frozen=True)
class EnvReport:
    """What executing an action did.  `to_dict` is plain JSON data; `from_dict` reads this version only.

    `tests` is "not_run" or the TestOutcome's `ended`; `expected_diff` is None when nothing was expected; `places` are
    the (path, start, end) byte ranges that matched, in order.
    """

    success: bool
    status: Status
    detail: str
    diff: str
    matches: int
    overlaps: int
    tests: str
    tests_passed: tuple[str, ...]
    tests_failed: tuple[str, ...]
    test_output: str
    expected_diff: bool | None
    duration_s: float
    isolation: str
    versions: dict[str, str] = field(default_factory=dict)
    places: tuple[tuple[str, int, int], ...] = ()
    version: str = ENV_REPORT_VERSION

    def to_dict(self) -> dict[str, Any]:
        """Plain data: strings, numbers, lists and one dict."""
        plain = dataclasses.asdict(self)
        plain.update(
            status=self.status.value,
            tests_passed=list(self.tests_passed),
            tests_failed=list(self.tests_failed),
            places=[list(place) for place in self.places],
        )
        return plain

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> EnvReport:
        """The inverse; raises ValueError naming the field that is missing, unknown, mistyped or of another version."""
        if value.get("version") != ENV_REPORT_VERSION:
            raise ValueError(f"env_report: version {value.get('version')!r}, this reads {ENV_REPORT_VERSION!r}")
        types: dict[str, type | tuple[type, ...]] = {
            "success": bool, "status": str, "detail": str, "diff": str, "matches": int, "overlaps": int, "tests": str,
            "tests_passed": list, "tests_failed": list, "test_output": str, "expected_diff": (bool, type(None)),
            "duration_s": (int, float), "isolation": str, "versions": dict, "places": list,
            "version": str,
        }  # fmt: skip
        if odd := set(types) ^ set(value):
            raise ValueError(f"env_report: fields missing or unknown: {sorted(odd)}")
        for name, kind in types.items():
            if not isinstance(value[name], kind):
                raise ValueError(f"env_report: {name} is {type(value[name]).__name__}, not {kind}")
        fields = dict(value)
        fields["status"] = Status(value["status"])
        for name in ("tests_passed", "tests_failed"):
            if not all(isinstance(test, str) for test in value[name]):
                raise ValueError(f"env_report: {name} holds something other than strings")
            fields[name] = tuple(value[name])
        for place in value["places"]:
            if not isinstance(place, list) or [type(part) for part in place] != [str, int, int]:
                raise ValueError("env_report: places holds something other than [path, start, end]")
        fields["places"] = tuple(tuple(place) for place in value["places"])
        return cls(**fields)


def runnable_files(tests: TestSpec) -> tuple[str, ...]:
    """The files of `tests` that its runner is to load: of its language, with "test" or "spec" in the base name."""
    if tests.runner not in _TEST_SUFFIXES:
        raise ValueError(f"tests.runner is {tests.runner!r}, must be one of {sorted(_TEST_SUFFIXES)}")
    found = []
    for path in tests.files:
        name = PurePosixPath(path)
        if name.suffix in _TEST_SUFFIXES[tests.runner] and any(word in name.stem.lower() for word in ("test", "spec")):
            found.append(path)
    if not found:
        raise ValueError(f"tests.files names no {tests.runner} test file (of {list(tests.files)})")
    return tuple(found)


def exact_globs(paths: Sequence[str]) -> tuple[str, ...]:
    """Globs that match these paths only: TestSpec.files are names, in which brackets are literal."""
    return tuple(path.replace("[", "[[]").replace("*", "[*]").replace("?", "[?]") for path in paths)


class Sandbox:
    """Proven isolation with a fixed number of slots.  Thread-safe; opening it runs the escape probe (about 0.1 s).

    Raises SandboxUnavailable on opening when the machine offers no isolation, SandboxCrash from a run when the
    isolation itself fails (retry it: it says nothing about the action), ValueError for a repository or test
    specification that is not one.
    """

    def __init__(self, config: SandboxConfig | None = None) -> None:
        self.config = config or SandboxConfig()
        if self.config.slots < 1:
            raise ValueError(f"sandbox.slots is {self.config.slots}, must be at least 1")
        self._jail: Jail = open_jail()
        self._pool = SlotPool(memory_bytes=self.config.slot_memory_bytes, processes=self.config.slot_processes)
        self._slots: queue.SimpleQueue[Slot] = queue.SimpleQueue()
        for _ in range(self.config.slots):
            slot = self._pool.lease()
            self._bounded = slot.cgroup is not None
            self._slots.put(slot)

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the slots' uids back; runs under way end by themselves."""
        self._pool.close()

    @property
    def isolation(self) -> str:
        """Which isolation is in use, in words."""
        return self._jail.description + (", control group" if self._bounded else "")

    @property
    def versions(self) -> dict[str, str]:
        """Versions of the tools inside."""
        return dict(self._jail.toolchain.versions)

    @property
    def runners(self) -> frozenset[str]:
        """Test runners this machine can serve; "node", "java" and "pytest" are absent where there is none."""
        toolchain = self._jail.toolchain
        optional = {"node": toolchain.node, "java": toolchain.java, "pytest": toolchain.pytest}
        return frozenset({"unittest"} | {name for name, found in optional.items() if found})

    @contextmanager
    def _slot(self) -> Iterator[Slot]:
        slot = self._slots.get()
        try:
            yield slot
        finally:
            self._slots.put(slot)

    def apply(
        self,
        action: Action,
        files: Mapping[str, str],
        *,
        protected: Sequence[str] = (),
        expect_matches: tuple[int, int] | None = None,
    ) -> EngineResult:
        """Apply the action alone.  `protected` are globs or exact paths, added to PROTECTED; an action whose number of
        matches is outside the inclusive range `expect_matches` is refused whole (TOO_MANY, NO_MATCH).
        """
        with self._slot() as slot:
            return apply_action(
                action,
                files,
                jail=self._jail,
                limits=self.config.engine_limits,
                slot=slot,
                protected=(*PROTECTED, *protected),
                max_matches=self.config.max_matches,
                expect_matches=expect_matches,
                allow_overlaps=self.config.allow_overlaps,
            )

    def run_tests(self, files: Mapping[str, str], tests: TestSpec) -> TestOutcome:
        """Run the test files of `tests` over a read-only copy of `files`; `expected_ids` are not looked at."""
        selected = runnable_files(tests)
        for path in selected:
            if path not in files or not is_relative_path(path):
                raise ValueError(f"tests.files names {path!r}, which is not in the repository")
        if tests.runner not in self.runners:
            raise RunnerUnavailable(
                tests.runner, f"{tests.runner} is not installed; tests that need it cannot run here"
            )
        limits = self.config.test_limits
        toolchain = self._jail.toolchain
        job = {
            "runner": tests.runner,
            "files": list(selected),
            "wall_s": limits.wall_s * 0.9,  # the guest reports its own timeouts, with what passed so far
            "nonce": secrets.token_hex(16),
            "programs": {
                "python": toolchain.python,
                "node": toolchain.node,
                "java": toolchain.java,
                "java_runner": toolchain.java_runner,
            },
        }
        alongside = _COMPANIONS[tests.runner]
        binds = (toolchain.pytest,) if tests.runner == "pytest" and toolchain.pytest else ()
        with self._slot() as slot:
            done = self._jail.run(
                "run_tests", job, limits=limits, slot=slot, repository=files, alongside=alongside, binds=binds
            )
        if done.ended != "exit":
            return TestOutcome(done.ended)
        if done.exit_code != 0:
            # The tests starved their supervisor: whatever they had to say does not count.
            return TestOutcome("cut", output=done.stderr[-4000:].decode("utf-8", "replace"))
        try:
            answer = json.loads(done.stdout)
        except ValueError:
            return TestOutcome("cut", output="the supervisor's answer was cut")
        ended = "finished" if answer["finished"] else "cut" if answer["ended"] == "exit" else answer["ended"]
        return TestOutcome(
            ended, tuple(answer["passed"]), tuple(answer["failed"]), tuple(answer["skipped"]), answer["output"]
        )

    def execute(
        self,
        action: Action,
        files: Mapping[str, str],
        *,
        tests: TestSpec | None = None,
        expected: Mapping[str, str] | None = None,
        protected: Sequence[str] = (),
        expect_matches: tuple[int, int] | None = None,
    ) -> EnvReport:
        """Apply the action, then run the tests on the result and compare it with what was expected.

        `expected` holds the files that the right edit changes, with their texts after it; every other file must
        be unchanged.  The files of `tests` are protected in addition to `protected` and PROTECTED.  `expect_matches`
        as in `apply`.
        """
        started = time.monotonic()
        exact = exact_globs(tests.files) if tests else ()
        result = self.apply(action, files, protected=(*exact, *protected), expect_matches=expect_matches)
        outcome = TestOutcome("not_run")
        matched: bool | None = None
        if expected is not None:
            matched = result.status is Status.OK and dict(result.files_after) == {**files, **expected}
        if tests is not None and result.status is Status.OK:
            outcome = self.run_tests(result.files_after, tests)
        success = (
            result.status is Status.OK
            and matched is not False
            and (tests is None or outcome.satisfies(tests.expected_ids))
        )
        return EnvReport(
            success=success,
            status=result.status,
            detail=result.detail,
            diff=result.diff,
            matches=sum(result.matches.values()),
            overlaps=result.overlaps,
            tests=outcome.ended,
            tests_passed=outcome.passed,
            tests_failed=outcome.failed,
            test_output=outcome.output,
            expected_diff=matched,
            duration_s=time.monotonic() - started,
            isolation=self.isolation,
            versions=self.versions,
            places=tuple(sorted(result.places)),
        )
