"""The planner's state before a task, and what follows from it.

The state after a step is the state before it, moved on: the step's decision is added, its constraint is added, the
issue about the edited file is closed, and the first item of the plan is done. So the update can be derived from the
prompt, which shows the prior state, and from the rewrite.
"""

import random
from collections.abc import Sequence
from dataclasses import replace

from srl_jax.trace import StateUpdate

_TESTS_STAY = "tests stay as they are"
_CONSTRAINTS = (
    "keep public names",
    "no new imports",
    "small diff",
    "same behaviour elsewhere",
    _TESTS_STAY,
    "no new dependencies",
    "keep line order",
    "no comments removed",
)
_DECISIONS = ("one rule per step", "work file by file", "no manual edits", "start with callers")
_ISSUES = ("docs lag behind", "changelog is empty", "version not bumped", "examples are old", "types unchecked")
_PLANS = (
    "run the tests",
    "review the diff",
    "update the changelog",
    "format the code",
    "check the docs",
    "bump the version",
)


def issue_about(path: str) -> str:
    """The open issue that an edit of `path` closes."""
    return f"{path} is outdated"


def draw_prior(rng: random.Random, path: str) -> StateUpdate:
    """A state in which editing `path` is the next thing to do."""
    issues = [issue_about(path)] if rng.random() < 0.4 else []
    if rng.random() < 0.25:
        issues.append(rng.choice(_ISSUES))
    return StateUpdate(
        decisions=(rng.choice(_DECISIONS),) if rng.random() < 0.15 else (),
        constraints=(rng.choice(_CONSTRAINTS),),
        open_issues=tuple(issues),
        next_focus=(f"edit {path}", rng.choice(_PLANS)),
    )


def draw_plan(rng: random.Random, paths: Sequence[str]) -> StateUpdate:
    """A state in which `paths` are to be edited one after the other, each an open issue until then."""
    return StateUpdate(
        decisions=(rng.choice(_DECISIONS),) if rng.random() < 0.3 else (),
        constraints=(rng.choice(_CONSTRAINTS),),
        open_issues=(*map(issue_about, paths), *((rng.choice(_ISSUES),) if rng.random() < 0.25 else ())),
        next_focus=(*(f"edit {path}" for path in paths), rng.choice(_PLANS)),
    )


def for_test_code(state: StateUpdate) -> StateUpdate:
    """`state` without the promise to leave tests alone, for a task that edits tests."""
    return replace(
        state, constraints=tuple("small diff" if item == _TESTS_STAY else item for item in state.constraints)
    )


def advance(prior: StateUpdate, *, path: str, decision: str, keep: str) -> StateUpdate:
    """The state after a step that edited `path`, took `decision` and must respect `keep`; nothing is listed twice."""
    return StateUpdate(
        decisions=tuple(dict.fromkeys((*prior.decisions, decision))),
        constraints=tuple(dict.fromkeys((*prior.constraints, keep))),
        open_issues=tuple(issue for issue in prior.open_issues if issue != issue_about(path)),
        next_focus=tuple(item for item in prior.next_focus if item != f"edit {path}"),
    )
