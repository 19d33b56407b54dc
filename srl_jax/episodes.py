"""Episodes as they are used: every step starts from the files and the state that one's own step before left.

A record of a step starts where the teacher's step before ended, and so does training with `grpo.returns="step"`. On a
chain an error stays: the next prompt shows the files as they have become and the state as it was written. Evaluation
plays episodes so, and training with returns beyond the step (`srl_jax.chains`).
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Self, TypeVar

from srl_jax.config import TrainConfig
from srl_jax.evaluation import rejection_of, success_of
from srl_jax.records import EpisodeStep, SourceFile, Task, TeacherRecord
from srl_jax.sandbox.engine import Status
from srl_jax.sandbox.isolation import SandboxCrash
from srl_jax.sandbox.runner import Sandbox, exact_globs
from srl_jax.sandbox.service import Score
from srl_jax.trace import StateUpdate, TraceError, parse_trace

Answers = Callable[[Sequence[TeacherRecord]], Sequence[tuple[str, Score]]]  # completion and score, one a record

PROMPT_TOO_LONG = "prompt_too_long"
_TRIES = 3  # of applying an action, where the isolation fails

_Item = TypeVar("_Item")


def whole(steps: Iterable[tuple[EpisodeStep, _Item]]) -> list[list[_Item]]:
    """The episodes of which every step is among `steps`: what was given with their steps, in the steps' order."""
    found: dict[str, list[tuple[EpisodeStep, _Item]]] = {}
    for step, item in steps:
        found.setdefault(step.episode_id, []).append((step, item))
    episodes = [sorted(parts, key=lambda part: part[0].step) for parts in found.values()]
    return [
        [item for _, item in parts]
        for parts in episodes
        if [step.step for step, _ in parts] == list(range(1, parts[0][0].steps + 1))
    ]


def whole_episodes(records: Sequence[TeacherRecord]) -> list[list[TeacherRecord]]:
    """The episodes of which every step is among `records`, their steps in order; tasks of their own are left out."""
    return whole((record.task.episode, record) for record in records if record.task.episode)


@dataclasses.dataclass
class Chain:
    """A way through an episode: its steps as the teacher took them, and what one's own answers so far have made of
    the repository and the state."""

    steps: Sequence[TeacherRecord]
    files: Mapping[str, str]
    state: StateUpdate

    @classmethod
    def begin(cls, steps: Sequence[TeacherRecord]) -> Self:
        first = steps[0].task
        return cls(steps, {file.path: file.text for file in first.files}, first.prior_state)

    def record(self, number: int) -> TeacherRecord:
        """The record of step `number` (from 0), asked of one's own files and state.

        Its tests are those that came with the step: earlier ones would fail again for what went wrong there.
        """
        record = self.steps[number]
        task, tests = record.task, record.task.tests
        given = {file.path: file.text for file in task.files}
        context = tuple(_shown(file, given.get(file.path, ""), self.files.get(file.path, "")) for file in task.context)
        if tests and number and (before := self.steps[number - 1].task.tests):
            new = tuple(test for test in tests.expected_ids if test not in set(before.expected_ids))
            tests = dataclasses.replace(tests, expected_ids=new) if new else None
        own = dataclasses.replace(
            task,
            files=tuple(SourceFile(path, text) for path, text in self.files.items()),
            context=context,
            prior_state=self.state,
            tests=tests,
        )
        return dataclasses.replace(record, task=own)

    def move_on(self, number: int, text: str, sandbox: Sandbox) -> bool:
        """Takes over what the answer `text` to step `number` makes of files and state; whether its action applied.

        An action that does not apply leaves the files as they are, a malformed answer the state too. Raises what
        `Sandbox.apply` raises.
        """
        try:
            trace = parse_trace(text)
        except TraceError:
            return False
        tests = self.steps[number].task.tests
        result = sandbox.apply(trace.action, self.files, protected=exact_globs(tests.files) if tests else ())
        if result.status is Status.OK:
            self.files = result.files_after
        self.state = trace.state
        return result.status is Status.OK


def moved_on(chain: Chain, number: int, text: str, sandbox: Sandbox) -> bool:
    """`Chain.move_on`, tried again where the isolation itself fails; raises the last failure."""
    for attempt in range(_TRIES - 1):
        try:
            return chain.move_on(number, text, sandbox)
        except (SandboxCrash, OSError):
            time.sleep(0.1 * 2**attempt)
    return chain.move_on(number, text, sandbox)


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
    chains = [Chain.begin(steps) for steps in episodes]
    items: list[dict] = []
    for number in range(max((len(steps) for steps in episodes), default=0)):
        due = [(chain, chain.record(number)) for chain in chains if number < len(chain.steps)]
        asked = [(chain, record) for chain, record in due if fits(record.task)]
        found = answers([record for _, record in asked]) if asked else ()
        answered = dict(zip((id(chain) for chain, _ in asked), found, strict=True))
        for chain, record in due:
            text, score = answered.get(id(chain), ("", Score(None, None, PROMPT_TOO_LONG)))
            items.append(_item(record, text, score, config))
            if number + 1 < len(chain.steps):
                moved_on(chain, number, text, sandbox)
    return items


def _shown(file: SourceFile, given: str, now: str) -> SourceFile:
    """The excerpt as it was where its lines are untouched, else the same lines of the file as it is now."""
    text = file.text.strip("\n")
    if text in now:
        return file
    first = given.count("\n", 0, max(given.find(text), 0))
    lines = now.split("\n")[first : first + text.count("\n") + 1]
    return SourceFile(file.path, "\n".join(lines).strip("\n") + "\n") if any(map(str.strip, lines)) else file


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
