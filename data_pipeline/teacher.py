"""Who writes traces: what every teacher offers, the catalogue's own oracle, and how several are mixed."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from data_pipeline.tasks.rule import Draft, fill
from data_pipeline.tasks.state import advance
from srl_jax.trace import Action, Trace, render_trace


@dataclass(frozen=True)
class Answer:
    """What a teacher said to one task, and what it took.

    `cut` is why reading was broken off before the end of the trace ("" when it was not): a `trace.Rejection`,
    "think_too_long" or "length". Tokens are those of the teacher's pinned tokenizer; `wasted_tokens` were written in
    attempts that failed half way and are paid for all the same. `original` is the text before its rationale was
    paraphrased, "" where it was not.
    """

    text: str
    teacher: str
    cut: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    wasted_tokens: int = 0
    attempts: int = 1
    cost_usd: float = 0.0
    seconds: float = 0.0
    served_model: str = ""
    original: str = ""


class NoAnswer(Exception):
    """This task got no answer: `reason` is counted, and the next run asks again. Other tasks may fare better."""

    def __init__(
        self, teacher: str, reason: str, *, attempts: int, prompt_tokens: int, wasted_tokens: int, cost_usd: float
    ) -> None:
        self.teacher, self.reason, self.attempts = teacher, reason, attempts
        self.prompt_tokens, self.wasted_tokens, self.cost_usd = prompt_tokens, wasted_tokens, cost_usd
        super().__init__(reason)


class Teacher(Protocol):
    """Whoever writes traces.

    `name` goes into every record. `version` changes with whatever may change an answer. `concurrency` is how many
    tasks may be asked at once. `answer` returns what was said, which may be malformed, or raises `NoAnswer` for this
    task, `DataError` when asking on is useless; it is called from several threads. `request` names the question: the
    same task put the same way gives the same string. `pinned` is what a manifest says of the teacher.
    """

    name: str
    version: str
    concurrency: int
    pinned: Mapping[str, Any]

    def request(self, draft: Draft) -> str: ...

    def answer(self, draft: Draft) -> Answer: ...


class OracleTeacher:
    """Knows the rule each task was made from and writes its canonical trace. Never wrong unless the rule is."""

    name = "catalogue-oracle/1"
    version = name
    concurrency = 1
    pinned: Mapping[str, Any] = {"kind": "oracle"}

    def request(self, draft: Draft) -> str:
        return self.write(draft)

    def answer(self, draft: Draft) -> Answer:
        return Answer(self.write(draft), self.name)

    def write(self, draft: Draft) -> str:
        rule, names, task = draft.rule, draft.names, draft.task
        path = task.context[0].path
        action = Action(
            language=rule.language,
            pattern=fill(rule.pattern, names),
            replacement=fill(rule.replacement, names),
            files=(path,),
            constraints={
                variable: {kind: fill(value, names) for kind, value in condition.items()}
                for variable, condition in rule.constraints.items()
            },
        )
        state = advance(task.prior_state, path=path, decision=fill(rule.decision, names), keep=draft.keep)
        return render_trace(Trace(draft.think, action, state))


@dataclass(frozen=True)
class TeacherMix:
    """Teachers with weights; which of them a task goes to hangs on `seed` and the task alone."""

    teachers: Sequence[Teacher]
    weights: Sequence[float]
    seed: int = 0

    @property
    def name(self) -> str:
        return "+".join(teacher.name for teacher in self.teachers)

    def choose(self, draft: Draft) -> Teacher:
        digest = hashlib.sha256(f"{self.seed}/{draft.task.task_id}".encode()).digest()
        place = int.from_bytes(digest[:8], "big") / 2**64 * sum(self.weights)
        for teacher, weight in zip(self.teachers, self.weights, strict=True):
            place -= weight
            if place < 0:
                return teacher
        return self.teachers[-1]  # rounding
