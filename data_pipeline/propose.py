"""Rewriting with a teacher instead of a student: the endpoint of a teacher.yaml, asked about somebody's code."""

import dataclasses
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data_pipeline.endpoint import EndpointTeacher
from data_pipeline.errors import DataError
from data_pipeline.teacher import NoAnswer
from data_pipeline.teacher_config import load_teacher_config
from srl_jax.proposals import Proposal, Request, TestBench, judge, places_to_show, task_of
from srl_jax.records import Task
from srl_jax.relevance import Place
from srl_jax.sandbox.runner import Sandbox
from srl_jax.trace import Trace, TraceError, parse_trace, render_action

_ATTEMPTS, _UNANSWERED = 3, 2  # of one request; requests after which nobody is thought to be there
_SHOWN = 2000  # characters of a file; a teacher reads more at once than a student was trained to


class _Silence(Exception):
    """Not one request was answered; the message is why most were not."""


def propose(path: Path, request: Request) -> list[Proposal]:
    """Proposals of the weightiest endpoint of a teacher.yaml, executed and ranked like a student's.

    Every place is asked about `request.candidates` times, with seeds from the pinned one on. An endpoint does not tell
    its log-probs, so among equals the first answer stands first. Raises `DirectoryError` for a directory or
    instruction that gives nothing to do, `DataError` for a configuration without an endpoint, one that refuses us, or
    one that answered nothing at all.
    """
    config = load_teacher_config(path)
    specs = [spec for spec in config.teachers if spec.kind == "openai"]
    if not specs:
        raise DataError(f"{path}: teachers names no endpoint (kind: openai), so there is none to ask")
    spec = max(specs, key=lambda spec: spec.weight)
    # Somebody waits for this: what a night's collection would sit out is said at once.
    patience = {"attempts": min(_ATTEMPTS, spec.limits.attempts), "stop_after_failures": sys.maxsize}
    limits = dataclasses.replace(spec.limits, **patience)
    with Sandbox(request.sandbox()) as sandbox:
        bench = TestBench(sandbox, request.files, request.runner) if request.runner else None
        teacher = EndpointTeacher(config, dataclasses.replace(spec, limits=limits))
        try:
            traces = _traces(teacher, request)
        except _Silence as silence:
            raise DataError(
                f"teacher {teacher.name}: no answer from {spec.base_url} ({silence}); see that its server runs, or "
                f"mend base_url in {path}"
            ) from None
        return judge(traces, request, sandbox, bench)


def _traces(teacher: EndpointTeacher, request: Request) -> list[tuple[Place, Trace, None]]:
    """Distinct actions that parse, in the order asked."""
    tasks = [(place, task) for place in places_to_show(request) if (task := task_of(request, place, _SHOWN))]
    jobs = [(place, task, number) for place, task in tasks for number in range(request.candidates)]
    failures: Counter[str] = Counter()
    answered = False

    def ask(task: Task, number: int) -> str:
        nonlocal answered
        if not answered and failures.total() >= max(_UNANSWERED, teacher.concurrency):
            return ""  # nobody is there
        try:
            text = teacher.ask(teacher.messages(task), variant=request.seed + number).text
        except NoAnswer as error:
            failures[error.reason] += 1
            return ""
        answered = True
        return text

    with ThreadPoolExecutor(teacher.concurrency) as pool:
        texts = list(pool.map(ask, [task for _, task, _ in jobs], [number for *_, number in jobs]))
    if jobs and not answered:
        raise _Silence(failures.most_common(1)[0][0])
    found: dict[tuple[str, str], tuple[Place, Trace, None]] = {}
    for (place, _, _), text in zip(jobs, texts, strict=True):
        try:
            trace = parse_trace(text)
        except TraceError:
            continue
        found.setdefault((place.path, render_action(trace.action)), (place, trace, None))
    return list(found.values())
