"""Completions in, scores out: parsing, similarities, embeddings and optional execution, for whole batches.

Parsing and similarities are cheap and done by the batch's thread; thinks are embedded in one call per batch;
executions go to a fixed pool of threads, one per sandbox slot, each of which only waits for a subprocess.  No process
is forked from this one (the sandbox is started by vfork and exec), so the service lives beside JAX's threads.

Two kinds of failure are kept apart.  What the completion did wrong is its score.  What the infrastructure did wrong
is retried, and then leaves the completion *unscored*: its reward is None and the trainer masks it out of its group,
because 0 or -0.2 would be a lie about the policy.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field
from types import TracebackType
from typing import Generic, Protocol, TypeVar

import numpy as np

from srl_jax.embedding import cosine
from srl_jax.records import Task, TeacherRecord
from srl_jax.rewards import (
    DEFAULT_CONFIG,
    Reward,
    RewardConfig,
    match_set_f1,
    match_set_precision_recall,
    score_trace,
)
from srl_jax.sandbox.engine import Status
from srl_jax.sandbox.isolation import SandboxCrash, SandboxUnavailable
from srl_jax.sandbox.runner import EnvReport, Sandbox, exact_globs
from srl_jax.trace import Action, Trace, TraceError, parse_trace, render_action


class Embeds(Protocol):
    """What the service asks of an embedder: unit rows, float32 [n, 384]."""

    def embed(self, texts: Sequence[str]) -> np.ndarray: ...


@dataclass(frozen=True)
class ScoreRequest:
    """One completion and the record it answers."""

    completion: str
    record: TeacherRecord


@dataclass(frozen=True)
class Score:
    """`reward` is None exactly when the completion is unscored, and then `unscored` says why.

    `report` is the execution's, or None when the completion is malformed, was not executed, or could not be; in the
    last case `unscored` says why even when the reward, which did not depend on it, is there.  `match_f1`, precision and
    recall compare the places that the action matched with those that the teacher's matches; None without a report, and
    where the teacher's matches could not be had (which leaves the completion unscored only when its reward depends on
    them).  `queued_s` is how long the execution waited for a sandbox's slot, None where none was begun for it; of two
    equal scores one may have waited longer.
    """

    reward: Reward | None
    report: EnvReport | None = None
    unscored: str | None = None
    match_f1: float | None = None
    match_precision: float | None = None
    match_recall: float | None = None
    queued_s: float | None = field(default=None, compare=False)


class PendingScores(Protocol):
    """Scores under way, such as a `Future` of them."""

    def result(self) -> list[Score]: ...


class ScoresCompletions(Protocol):
    """What training and evaluation ask of a reward service, here or on another machine."""

    @property
    def counts(self) -> dict[str, int]: ...

    def score(self, items: Sequence[ScoreRequest]) -> list[Score]: ...

    def submit(self, items: Sequence[ScoreRequest]) -> PendingScores: ...


@dataclass(frozen=True)
class ServiceConfig:
    """`deadline_s` is what a batch may wait for one of its executions, from the batch's start."""

    deadline_s: float = 120.0
    retries: int = 2
    max_pending_batches: int = 4
    cache_entries: int = 20_000

    def __post_init__(self) -> None:
        if not self.deadline_s > 0:
            raise ValueError(f"service.deadline_s is {self.deadline_s}, must be more than 0")
        for name in ("retries", "cache_entries"):
            if getattr(self, name) < 0:
                raise ValueError(f"service.{name} is {getattr(self, name)}, must be 0 or more")
        if self.max_pending_batches < 1:
            raise ValueError(f"service.max_pending_batches is {self.max_pending_batches}, must be at least 1")


_Value = TypeVar("_Value")
_TEACHER_TIMED_OUT = "the teacher's own action timed out: "
Places = frozenset[tuple[str, int, int]]


class _Cache(Generic[_Value]):
    """Least-recently-used mapping, safe between threads."""

    def __init__(self, entries: int) -> None:
        self._entries = entries
        self._lock = threading.Lock()
        self._values: OrderedDict[Hashable, _Value] = OrderedDict()

    def get(self, key: Hashable) -> _Value | None:
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
            return self._values.get(key)

    def drop(self, key: Hashable) -> None:
        with self._lock:
            self._values.pop(key, None)

    def put(self, key: Hashable, value: _Value) -> None:
        with self._lock:
            self._values[key] = value
            self._values.move_to_end(key)
            while len(self._values) > self._entries:
                self._values.popitem(last=False)


@dataclass(frozen=True)
class _Teacher:
    trace: Trace
    tokens: int


@dataclass
class _Turn:
    """When work was put into the queue for a slot, and when it left it; neither where another's result serves."""

    asked: float | None = None
    begun: float | None = None

    @property
    def waited(self) -> float | None:
        """Seconds in the queue, until now for what is still in it."""
        return None if self.asked is None else (self.begun or time.monotonic()) - self.asked


class RewardService:
    """Scores batches of completions.  A context manager; thread-safe.

    `count_tokens` measures text in the student's tokenizer.  Without a `sandbox` nothing is executed; with one every
    well-formed completion is, and its report is returned.  The sandbox stays the caller's to close, after the service.
    """

    def __init__(
        self,
        embedder: Embeds,
        count_tokens: Callable[[str], int],
        *,
        reward: RewardConfig = DEFAULT_CONFIG,
        sandbox: Sandbox | None = None,
        config: ServiceConfig | None = None,
    ) -> None:
        if reward.needs_execution and sandbox is None:
            raise ValueError(
                f"reward.execution is {reward.execution} and reward.match_gate {reward.match_gate}, "
                "but there is no sandbox to execute in"
            )
        self.config = config or ServiceConfig()
        self._embedder, self._count_tokens, self._reward, self._sandbox = embedder, count_tokens, reward, sandbox
        self._teachers: _Cache[_Teacher] = _Cache(self.config.cache_entries)
        self._reports: _Cache[Future[EnvReport]] = _Cache(self.config.cache_entries)
        self._references: _Cache[Future[Places]] = _Cache(self.config.cache_entries)
        self._pending = threading.BoundedSemaphore(self.config.max_pending_batches)
        # Several, since the last execution of one batch would leave the other slots without work.
        self._batches = ThreadPoolExecutor(self.config.max_pending_batches, thread_name_prefix="reward-batch")
        slots = sandbox.config.slots if sandbox else 1
        self._workers = ThreadPoolExecutor(slots, thread_name_prefix="reward-sandbox")
        self._start_lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._counts_lock = threading.Lock()

    def __enter__(self) -> RewardService:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Finish what is under way, drop what has not begun."""
        self._batches.shutdown(wait=True, cancel_futures=True)
        self._workers.shutdown(wait=True, cancel_futures=True)

    @property
    def counts(self) -> dict[str, int]:
        """Since the start: requests, malformed, executed, cached (executions and teachers' matches that were known),
        retries, not_executed, unscored.
        """
        with self._counts_lock:
            return dict(self._counts)

    def submit(self, items: Sequence[ScoreRequest]) -> Future[list[Score]]:
        """Score in the background; blocks while `max_pending_batches` batches are under way."""
        self._pending.acquire()
        try:
            future = self._batches.submit(self.score, list(items))
        except RuntimeError:
            self._pending.release()
            raise
        future.add_done_callback(lambda _: self._pending.release())
        return future

    def score(self, items: Sequence[ScoreRequest]) -> list[Score]:
        """One score per request, in order.  Raises only for what is wrong with a record's own trace (TraceError)."""
        deadline = time.monotonic() + self.config.deadline_s
        teachers = [self._teacher(item.record) for item in items]
        students = [_parsed(item.completion) for item in items]
        # The teachers' matches before the executions, which may use up the time: they are few, quick and kept.
        # Where the student's action is the teacher's own, its execution gives them.
        references = [
            self._start_reference(item.record.task, teacher.trace.action, deadline)
            if student and student.action != teacher.trace.action
            else None
            for item, student, teacher in zip(items, students, teachers, strict=True)
        ]
        # These run while this thread embeds and compares.
        turns = [_Turn() for _ in items]
        executions = [
            self._start(student.action, item.record.task, deadline, turn) if student else None
            for item, student, turn in zip(items, students, turns, strict=True)
        ]
        cosines = self._cosines(items, students, teachers)
        scores = []
        for item, teacher, likeness, execution, reference, turn in zip(
            items, teachers, cosines, executions, references, turns, strict=True
        ):
            report, trouble = _await(execution, deadline)
            wanted, reference_trouble = _await(reference, deadline)
            if report is not None and reference is None:
                if report.status is Status.TIMEOUT:
                    reference_trouble = f"infrastructure: {_TEACHER_TIMED_OUT}{report.detail}"
                else:
                    wanted = frozenset(report.places)
            if self._reward.match_gate > 0:
                trouble = trouble or reference_trouble
            f1 = precision = recall = None
            if report is not None and wanted is not None:
                f1 = match_set_f1(report.places, wanted)
                precision, recall = match_set_precision_recall(report.places, wanted)
            reward: Reward | None = None
            if trouble is None or not self._reward.needs_execution:
                reward = score_trace(
                    item.completion,
                    teacher.trace,
                    cosine=likeness,
                    student_tokens=self._count_tokens,
                    teacher_tokens=teacher.tokens,
                    config=self._reward,
                    executed=report.success if report else None,
                    match_f1=f1,
                )
            scores.append(Score(reward, report, trouble, f1, precision, recall, turn.waited))
        self._count(
            requests=len(items),
            malformed=students.count(None),
            unscored=sum(score.reward is None for score in scores),
            not_executed=sum(score.unscored is not None for score in scores),
        )
        return scores

    def _count(self, **counts: int) -> None:
        with self._counts_lock:
            self._counts.update(counts)

    def _teacher(self, record: TeacherRecord) -> _Teacher:
        teacher = self._teachers.get(record.trace)
        if teacher is None:
            trace = parse_trace(record.trace)
            teacher = _Teacher(trace, self._count_tokens(trace.think))
            self._teachers.put(record.trace, teacher)
        return teacher

    def _cosines(
        self, items: Sequence[ScoreRequest], students: Sequence[Trace | None], teachers: Sequence[_Teacher]
    ) -> list[float]:
        """Of each student's think with its teacher's stored embedding; 1 for equal texts, 0 for malformed ones."""
        differing = [
            student.think
            for student, teacher in zip(students, teachers, strict=True)
            if student and student.think != teacher.trace.think
        ]
        texts = sorted(set(differing))
        rows = dict(zip(texts, self._embedder.embed(texts), strict=True)) if texts else {}
        cosines = []
        for item, student in zip(items, students, strict=True):
            if student is None:
                cosines.append(0.0)
            elif (row := rows.get(student.think)) is None:
                cosines.append(1.0)
            else:
                cosines.append(cosine(row, item.record.think_embedding))
        return cosines

    def _start(self, action: Action, task: Task, deadline: float, turn: _Turn) -> Future[EnvReport] | None:
        """The execution of this action on this task: under way or done already, or started now."""
        if (sandbox := self._sandbox) is None:
            return None

        def execute() -> EnvReport:
            report = sandbox.execute(
                action,
                {file.path: file.text for file in task.files},
                tests=task.tests,
                expected={file.path: file.text for file in task.expected} or None,
            )
            self._count(executed=1)
            return report

        def passing(report: EnvReport) -> bool:
            return Status.TIMEOUT in (report.status, report.tests)

        return self._once(self._reports, execution_key(action, task), execute, passing, deadline, turn)

    def _start_reference(self, task: Task, action: Action, deadline: float) -> Future[Places] | None:
        """The places that the teacher's action matches in the task's files, likewise."""
        if (sandbox := self._sandbox) is None:
            return None

        def apply() -> Places:
            protected = exact_globs(task.tests.files) if task.tests else ()
            result = sandbox.apply(action, {file.path: file.text for file in task.files}, protected=protected)
            if result.status is Status.TIMEOUT:
                raise SandboxCrash(_TEACHER_TIMED_OUT + result.detail)
            return result.places

        return self._once(self._references, execution_key(action, task), apply, lambda places: False, deadline, _Turn())

    def _once(
        self,
        cache: _Cache[Future[_Value]],
        key: str,
        work: Callable[[], _Value],
        passing: Callable[[_Value], bool],
        deadline: float,
        turn: _Turn,
    ) -> Future[_Value]:
        """The future of `work` under `key`, from the cache or started now on a slot's thread; `turn` is then kept.

        A result that is `passing` may be owed to the machine's load, a failure to its faults: neither is remembered.
        """
        with self._start_lock:
            known = cache.get(key)
            if known is not None:
                self._count(cached=1)
                return known
            turn.asked = time.monotonic()
            started = self._workers.submit(self._retried, work, deadline, turn)
            cache.put(key, started)

        def settle(done: Future[_Value]) -> None:
            if done.cancelled() or done.exception() or passing(done.result()):
                cache.drop(key)

        started.add_done_callback(settle)
        return started

    def _retried(self, work: Callable[[], _Value], deadline: float, turn: _Turn) -> _Value:
        turn.begun = time.monotonic()
        for attempt in range(self.config.retries + 1):
            if time.monotonic() > deadline:
                raise SandboxCrash("the batch's deadline passed before a slot was free")
            try:
                return work()
            except (SandboxCrash, OSError):
                if attempt == self.config.retries:
                    raise
                self._count(retries=1)
                time.sleep(min(1.0, 0.1 * 2**attempt))
        raise AssertionError("the last attempt returns or raises")


def execution_key(action: Action, task: Task) -> str:
    """A hash of everything an execution depends on: the action and the task's files, tests and expectation."""
    content = [
        render_action(action),
        [(file.path, file.text) for file in task.files],
        [(file.path, file.text) for file in task.expected],
        [task.tests.runner, task.tests.expected_ids, task.tests.files] if task.tests else None,
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _parsed(text: str) -> Trace | None:
    try:
        return parse_trace(text)
    except TraceError:
        return None  # score_trace names the rejection


def _await(execution: Future[_Value] | None, deadline: float) -> tuple[_Value | None, str | None]:
    """(result, None), or (None, why there is none) when the infrastructure or the record is at fault."""
    if execution is None:
        return None, None
    try:
        return execution.result(timeout=max(0.0, deadline - time.monotonic())), None
    except FutureTimeout:
        return None, "deadline: the execution was not done in time"
    except (SandboxCrash, SandboxUnavailable, OSError) as error:
        return None, f"infrastructure: {error}"
    except ValueError as error:
        return None, f"record: {error}"
