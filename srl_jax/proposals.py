"""What is asked of a policy for somebody's code, and what becomes of its answers: executed, tested, ranked.

Whoever proposes, a student or a teacher behind an endpoint: every action is bounded by the engine and executed in the
sandbox, before a person sees it as a diff. `srl_jax.worktree` alone writes files. Imports no JAX.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from srl_jax.excerpt import excerpt
from srl_jax.records import SourceFile, Task, TestSpec
from srl_jax.relevance import Place, holds_a_marked_name, language_of, relevant_places
from srl_jax.sandbox.engine import EXTENSIONS, EngineResult, Status, reached_files
from srl_jax.sandbox.isolation import MAX_REPOSITORY_FILES, Limits, check_repository
from srl_jax.sandbox.runner import Sandbox, SandboxConfig, TestOutcome, exact_globs, runnable_files
from srl_jax.trace import StateUpdate, Trace, render_action, render_state
from srl_jax.worktree import DirectoryError


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked of a policy. `runner` is a test runner of the sandbox, or None to run no tests."""

    instruction: str
    files: Mapping[str, str]
    state: StateUpdate | None = None
    languages: tuple[str, ...] = ()
    runner: str | None = None
    places: int = 1  # files shown, one a prompt
    candidates: int = 8  # for each of them; the first is greedy
    seed: int = 0
    test_seconds: float = 30.0  # for one run of the tests

    def sandbox(self) -> SandboxConfig:
        """What a sandbox for its tests is opened with."""
        return SandboxConfig(test_limits=Limits(wall_s=self.test_seconds, cpu_s=math.ceil(self.test_seconds)))


@dataclasses.dataclass(frozen=True)
class Proposal:
    """One distinct action. `logprob` is the policy's, per token, at temperature 1; None where it is not told."""

    trace: Trace
    shown: Place
    logprob: float | None
    result: EngineResult
    tests: TestOutcome | None = None
    broken_tests: tuple[str, ...] = ()  # passed before the edit, do not pass after it
    on_topic: bool = True  # holds a name that the instruction marks; an edit of something else may pass every test

    @property
    def usable(self) -> bool:
        """Whether it applied, is about what the instruction marks, and broke no test where tests were run."""
        tested = self.tests is None or (self.tests.ended == "finished" and not self.broken_tests)
        return self.result.status is Status.OK and self.on_topic and tested

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {
            "usable": self.usable,
            "on_topic": self.on_topic,
            "think": self.trace.think,
            "action": render_action(self.trace.action),
            "state": render_state(self.trace.state),
            "shown": self.shown.path,
            "logprob": self.logprob,
            "status": self.result.status.value,
            "detail": self.result.detail,
            "matches": dict(self.result.matches),
            "diff": self.result.diff,
            "tests": None if self.tests is None else self.tests.ended,
            "broken_tests": list(self.broken_tests),
        }


def places_to_show(request: Request) -> list[Place]:
    """The files that the instruction speaks of, best first; raises `DirectoryError` for none."""
    languages = request.languages or tuple(EXTENSIONS)
    if not any(language_of(path) in languages for path in request.files):
        raise DirectoryError(
            f"none of the directory's {len(request.files)} files is {' or '.join(languages)}; files that git ignores "
            "do not count, nor do links, hidden folders and files above 1 MiB"
        )
    places = relevant_places(request.instruction, request.files, languages=languages, limit=request.places)
    if not places:
        raise DirectoryError(
            "no file holds a word of the instruction; name a file in it, or something that stands in the code"
        )
    return places


def task_of(request: Request, place: Place, limit: int) -> Task | None:
    """The task of editing one file, of which at most `limit` characters are shown; None if its line is longer."""
    shown = excerpt(request.files[place.path], place.line, limit)
    if not shown:
        return None
    before = request.state or StateUpdate((), (), (), ("run the tests",))
    # In training the plan's first item is always the file at hand.
    step = f"edit {place.path}"
    focus = (step, *(item for item in before.next_focus if item != step))[:16]
    return Task(
        task_id="rewrite",
        instruction=request.instruction,
        language=place.language,
        slice=place.language,
        rule="",
        difficulty=1,
        source="real",
        files=(),
        context=(SourceFile(place.path, shown),),
        prior_state=dataclasses.replace(before, next_focus=focus),
        tests=None,
        expected=(),
    )


class TestBench:
    """The directory's tests before any edit, and which of them an edit breaks."""

    __test__ = False  # pytest would collect the class for its name

    def __init__(self, sandbox: Sandbox, files: Mapping[str, str], runner: str) -> None:
        try:
            check_repository(files)
        except ValueError as error:
            raise DirectoryError(f"{error}; give a smaller --directory or leave --tests out") from None
        size, room = sum(len(text.encode()) for text in files.values()), sandbox.config.test_limits.tmp_bytes
        if size > room:
            raise DirectoryError(
                f"{size >> 20} MiB of files, and the sandbox lays out at most {room >> 20} for tests; give a smaller "
                "--directory or leave --tests out"
            )
        try:
            self.files = runnable_files(TestSpec(runner, (), tuple(files)))
        except ValueError:
            raise DirectoryError(f"no {runner} test file in the directory; leave --tests out") from None
        self._sandbox, self._repository = sandbox, files
        self._spec = TestSpec(runner, (), self.files)
        self.before = sandbox.run_tests(files, self._spec)
        if not self.before.passed:
            raise DirectoryError(
                f"no {runner} test passes before the edit ({self.before.ended}), so tests can tell nothing; leave "
                f"--tests out or name their runner. They said: {self.before.output.strip()[-500:]}"
            )
        if self.before.ended != "finished":
            raise DirectoryError(
                f"the {runner} tests do not come to their end even before the edit ({self.before.ended}, after "
                f"{len(self.before.passed)} that pass); raise --test_seconds, give a smaller --directory or leave "
                "--tests out"
            )

    def run(self, edited: Mapping[str, str]) -> tuple[TestOutcome, tuple[str, ...]]:
        """The tests' outcome after the edit, and those that passed before and do not now."""
        after = self._sandbox.run_tests({**self._repository, **edited}, self._spec)
        return after, tuple(sorted(set(self.before.passed) - set(after.passed)))


def judge(
    traces: Sequence[tuple[Place, Trace, float | None]],
    request: Request,
    sandbox: Sandbox,
    bench: TestBench | None,
) -> list[Proposal]:
    """Executes each trace's action on the request's files; the best first.

    Usable ones come first, then those that applied at all, then the rest; within each the policy's own log-prob
    decides, and the order of `traces` where it is not told.
    """
    proposals = []
    for shown, trace, logprob in traces:
        reached = reached_files(trace.action, request.files)
        if len(reached) > MAX_REPOSITORY_FILES:
            result = EngineResult(Status.TOO_MANY, reached, f"reaches {len(reached)} files")
        else:
            result = sandbox.apply(trace.action, reached, protected=exact_globs(bench.files) if bench else ())
        on_topic = holds_a_marked_name(request.instruction, f"{trace.action.pattern}\n{trace.action.replacement}")
        proposal = Proposal(trace, shown, logprob, result, on_topic=on_topic)
        if bench and result.status is Status.OK:
            tests, broken = bench.run(result.files_after)
            proposal = dataclasses.replace(proposal, tests=tests, broken_tests=broken)
        proposals.append(proposal)
    return sorted(proposals, key=lambda p: (not p.usable, p.result.status is not Status.OK, -(p.logprob or 0.0)))
