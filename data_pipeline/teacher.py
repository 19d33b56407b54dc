"""The oracle teacher: the catalogue's own trace for a task."""

from typing import Protocol

from data_pipeline.tasks.rule import Draft, fill
from data_pipeline.tasks.state import advance
from srl_jax.trace import Action, Trace, render_trace


class Teacher(Protocol):
    """Whoever writes traces. `name` goes into every record; `write` returns the raw text, which may be malformed."""

    name: str

    def write(self, draft: Draft) -> str: ...


class OracleTeacher:
    """Knows the rule each task was made from and writes its canonical trace. Never wrong unless the rule is."""

    name = "catalogue-oracle/1"

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
