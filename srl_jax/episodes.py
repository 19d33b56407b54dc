"""Episodes as they are used: every step starts from the files and the state that one's own step before left.

In training each step starts where the teacher's step before ended. Here an error stays: the next prompt shows the
files as they have become and the state as it was written.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from srl_jax.config import TrainConfig
from srl_jax.evaluation import rejection_of, success_of
from srl_jax.records import SourceFile, Task, TeacherRecord
from srl_jax.sandbox.engine import Status
from srl_jax.sandbox.runner import Sandbox, exact_globs
from srl_jax.sandbox.service import Score
from srl_jax.trace import StateUpdate, TraceError, parse_trace

Answers = Callable[[Sequence[TeacherRecord]], Sequence[tuple[str, Score]]]  # completion and score, one a record

PROMPT_TOO_LONG = "prompt_too_long"


@dataclasses.dataclass
class _Played:
    """An episode under way: what the steps so far have made of the repository and the state."""

    steps: Sequence[TeacherRecord]
    files: Mapping[str, str]
    state: StateUpdate


def whole_episodes(records: Sequence[TeacherRecord]) -> list[list[TeacherRecord]]:
    """The episodes of which every step is among `records`, their steps in order; tasks of their own are left out."""
    found: dict[str, list[TeacherRecord]] = {}
    for record in records:
        if record.task.episode:
            found.setdefault(record.task.episode.episode_id, []).append(record)
    episodes = [sorted(steps, key=lambda record: record.task.episode.step) for steps in found.values()]
    return [
        steps
        for steps in episodes
        if [record.task.episode.step for record in steps] == list(range(1, steps[0].task.episode.steps + 1))
    ]


def play(
    episodes: Sequence[Sequence[TeacherRecord]],
    answers: Answers,
    sandbox: Sandbox,
    config: TrainConfig,
    *,
    fits: Callable[[Task], bool] = lambda task: True,
) -> list[dict]:
    """Plays all episodes at once, a step at a time; one item for every step, in the order of play.

    A step succeeds when its own file comes out right, nothing else has changed since the step before, and the tests
    that came with it pass: errors of earlier steps are not counted again. A step whose prompt does not fit is a
    failure without a reward. The reward is that of the teacher's answer to the step as the teacher found it.
    """
    played = [
        _Played(steps, {file.path: file.text for file in steps[0].task.files}, steps[0].task.prior_state)
        for steps in episodes
    ]
    items: list[dict] = []
    for number in range(max((len(steps) for steps in episodes), default=0)):
        due = [(one, _own(one, number)) for one in played if number < len(one.steps)]
        asked = [(one, record) for one, record in due if fits(record.task)]
        found = answers([record for _, record in asked]) if asked else ()
        answered = dict(zip((id(one) for one, _ in asked), found, strict=True))
        for one, record in due:
            text, score = answered.get(id(one), ("", Score(None, None, PROMPT_TOO_LONG)))
            items.append(_item(record, text, score, config))
            _move_on(one, one.steps[number].task, text, sandbox)
    return items


def _own(played: _Played, number: int) -> TeacherRecord:
    """The record of a step, asked of one's own files and state."""
    record = played.steps[number]
    task = record.task
    given = {file.path: file.text for file in task.files}
    context = tuple(_shown(file, given.get(file.path, ""), played.files.get(file.path, "")) for file in task.context)
    tests = task.tests
    if tests and number and (before := played.steps[number - 1].task.tests):
        # Tests of earlier steps would fail again for what went wrong there.
        new = tuple(test for test in tests.expected_ids if test not in set(before.expected_ids))
        tests = dataclasses.replace(tests, expected_ids=new) if new else None
    own = dataclasses.replace(
        task,
        files=tuple(SourceFile(path, text) for path, text in played.files.items()),
        context=context,
        prior_state=played.state,
        tests=tests,
    )
    return dataclasses.replace(record, task=own)


def _shown(file: SourceFile, given: str, now: str) -> SourceFile:
    """The excerpt as it was where its lines are untouched, else the same lines of the file as it is now."""
    text = file.text.strip("\n")
    if text in now:
        return file
    first = given.count("\n", 0, max(given.find(text), 0))
    lines = now.split("\n")[first : first + text.count("\n") + 1]
    return SourceFile(file.path, "\n".join(lines).strip("\n") + "\n") if any(map(str.strip, lines)) else file


def _move_on(played: _Played, task: Task, text: str, sandbox: Sandbox) -> None:
    try:
        trace = parse_trace(text)
    except TraceError:
        return
    protected = exact_globs(task.tests.files) if task.tests else ()
    result = sandbox.apply(trace.action, played.files, protected=protected)
    if result.status is Status.OK:
        played.files = result.files_after
    played.state = trace.state


def _item(record: TeacherRecord, text: str, score: Score, config: TrainConfig) -> dict:
    task, reward = record.task, score.reward
    return {
        "episode_id": task.episode.episode_id,
        "step": task.episode.step,
        "steps": task.episode.steps,
        "task_id": task.task_id,
        "rule": task.rule,
        "completion": text,
        "reward": None if reward is None else reward.total,
        "action": None if reward is None else reward.action,
        "state": None if reward is None else reward.state,
        "rejection": rejection_of(score),
        "success": False if score.unscored == PROMPT_TOO_LONG else success_of(score, config),
        "status": score.report.status.value if score.report else score.unscored,
    }
