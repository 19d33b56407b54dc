"""Whether a teacher's step may be learnt from: strict parse, sandbox execution, and the oracle on the diff.

Nothing is repaired: a step that fails is dropped and its reason counted.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from data_pipeline.tasks.rule import Draft
from srl_jax.sandbox.engine import Status
from srl_jax.sandbox.runner import Sandbox
from srl_jax.trace import Trace, TraceError, parse_trace, render_trace


class Drop(StrEnum):
    """Why a step is not kept. Malformed traces are counted as ``malformed:<rejection>``, failed actions as
    ``action:<status>``."""

    MALFORMED = "malformed"
    ROUND_TRIP = "round_trip"  # its canonical text means something else
    ACTION = "action"
    WRONG_DIFF = "wrong_diff"
    PASSED_BEFORE = "tests_passed_before"
    BROKEN_BEFORE = "tests_did_not_run_before"
    FAILED_AFTER = "tests_failed_after"
    TOO_LONG = "too_long"
    DUPLICATE = "duplicate"
    NEAR_DUPLICATE = "near_duplicate"  # of a task in an earlier split
    EPISODE = "episode_incomplete"  # another step of the episode was dropped
    LOW_QUALITY = "low_quality"
    NO_ANSWER = "no_answer"  # with the endpoint's reason after a colon; asked again by the next run


@dataclass(frozen=True)
class Verdict:
    """A checked step: `reason` is None when it is kept, else a `Drop`, with the detail after a colon.

    `quality` is `trace_quality` of a step that got so far.
    """

    reason: str | None
    trace: Trace | None = None
    env_report: dict[str, Any] | None = None
    quality: float | None = None


def stable_report(report: dict[str, Any]) -> dict[str, Any]:
    """`report` without times and test output, which differ from run to run: the same seed gives the same bytes."""
    return {**report, "duration_s": 0.0, "test_output": ""}


def validate(draft: Draft, text: str, sandbox: Sandbox, max_trace: int) -> Verdict:
    """Parses `text`, executes its action on the task's files and compares diff and tests with what must happen.

    A trace of more than `max_trace` characters is dropped: what the student has no room to write cannot be imitated.
    """
    task = draft.task
    try:
        trace = parse_trace(text)
    except TraceError as error:
        return Verdict(f"{Drop.MALFORMED}:{error.rejection}")
    canonical = render_trace(trace)  # white space and the order of keys are the teacher's own affair
    if not _means(canonical, trace):
        return Verdict(Drop.ROUND_TRIP, trace)
    if len(canonical) > max_trace:
        return Verdict(Drop.TOO_LONG, trace)
    files = {file.path: file.text for file in task.files}
    if task.tests is not None and task.source != "user":  # a user's tests may as well guard what works already
        outcome = sandbox.run_tests(files, task.tests)
        if outcome.satisfies(task.tests.expected_ids):
            return Verdict(Drop.PASSED_BEFORE, trace)
        if outcome.ended != "finished":
            return Verdict(f"{Drop.BROKEN_BEFORE}:{outcome.ended}", trace)
    # Of a user's task nobody knows the right edit.
    expected = {file.path: file.text for file in task.expected} if task.source != "user" else None
    report = sandbox.execute(trace.action, files, tests=task.tests, expected=expected)
    plain = stable_report(report.to_dict())
    if report.status is not Status.OK:
        return Verdict(f"{Drop.ACTION}:{report.status}", trace, plain)
    if report.expected_diff is False:
        return Verdict(Drop.WRONG_DIFF, trace, plain)
    if not report.success:
        return Verdict(Drop.FAILED_AFTER, trace, plain)
    return Verdict(None, trace, plain)


def _means(text: str, trace: Trace) -> bool:
    try:
        return parse_trace(text) == trace
    except TraceError:
        return False
