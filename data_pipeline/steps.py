"""A teacher's step on its way through the stages, and what is kept of it for ever."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from data_pipeline.stages import Kept
from data_pipeline.tasks.rule import Draft
from data_pipeline.teacher import Answer, NoAnswer
from data_pipeline.validate import Drop, Verdict
from srl_jax.records import task_to_json
from srl_jax.trace import parse_trace, render_trace


@dataclass(frozen=True)
class Step:
    """A task, what its teacher said and what became of it; without an answer the text is empty."""

    draft: Draft
    text: str
    teacher: str
    verdict: Verdict
    answer: Answer | NoAnswer


def step_of(draft: Draft, answer: Answer | NoAnswer, told: Mapping[str, Any] | None) -> Step:
    """The step whose verdict the journal holds as `told`; None for a task without an answer."""
    if isinstance(answer, NoAnswer) or told is None:
        return Step(draft, "", answer.teacher, Verdict(f"{Drop.NO_ANSWER}:{answer.reason}"), answer)
    read = told["reason"] in (None, Drop.LOW_QUALITY)
    trace = parse_trace(answer.text) if read else None
    verdict = Verdict(told["reason"], trace, told["env_report"], told["quality"])
    return Step(draft, answer.text, answer.teacher, verdict, answer)


def kept_step(step: Step) -> Kept:
    """What the scoring stage needs of a step that is kept: the trace in canonical form, whatever the teacher wrote."""
    verdict = step.verdict
    text, think = render_trace(verdict.trace), verdict.trace.think
    return Kept(step.draft.task, text, think, verdict.quality, verdict.env_report, step.teacher)


def raw_line(step: Step, reason: str | None) -> dict[str, Any]:
    """A data set's raw line (`write.RAW_STEP`) of a step, kept or not: enough to rebuild and rescore records from."""
    return {
        "task_id": step.draft.task.task_id,
        "slice": step.draft.task.slice,
        "teacher": step.teacher,
        "text": step.text,
        "rejected": reason,
        "env_report": step.verdict.env_report,
        "quality": step.verdict.quality,
        "task": task_to_json(step.draft.task),
    }
