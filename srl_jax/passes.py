"""Further passes over evaluated tasks: samples, answers without the grammar, and episodes on one's own state.

Each adds to an evaluation that `srl_jax.evaluate` made, and goes on with what an interrupted pass has saved.
"""

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from srl_jax.config import TrainConfig
from srl_jax.episodes import Answers, play
from srl_jax.evaluate import answer_groups, duration, greedy, log_ratios
from srl_jax.evaluation import rejection_of, success_of, write_json
from srl_jax.groups import Groups
from srl_jax.records import TeacherRecord
from srl_jax.sandbox.runner import Sandbox
from srl_jax.sandbox.service import Score, ScoreRequest, ScoresCompletions
from srl_jax.student import Student

_SEEDS = {"sampled": 1, "free": 2}


@dataclasses.dataclass(frozen=True)
class Passes:
    """How much is done beside one greedy answer a task; 0 leaves a pass out.

    `samples` are answers to each task at the sampling temperature, `free` such answers without the grammar,
    `episodes` so many whole episodes, `seen` so many tasks of the training split, whose rules were seen.
    """

    samples: int = 0
    free: int = 0
    episodes: int = 0
    seen: int = 0


def add_answers(
    path: Path,
    evaluation: dict,
    kind: str,
    student: Student,
    lora: dict | None,
    records: Sequence[TeacherRecord],
    service: ScoresCompletions,
    config: TrainConfig,
    *,
    count: int,
    advance: Callable[[int], None] = lambda _: None,
) -> None:
    """Gives every item `count` answers of a `kind`: "sampled", or "free" for those without the grammar.

    `evaluation` is that of `records`; after every batch it is written to `path`.
    """
    items, passes = evaluation["items"], evaluation.setdefault("passes", {})
    if passes.get(kind, {}).get("count") != count:
        passes[kind] = {"count": count, "seconds": 0.0, "seconds_by_part": {}}
        for item in items:
            item.pop(kind, None)
    done = sum(kind in item for item in items)
    advance(done)
    if done == len(items):
        return
    policy = student.without_grammar() if kind == "free" else student
    timing = Counter(passes[kind]["seconds_by_part"])
    started = time.perf_counter() - passes[kind]["seconds"]
    against_base = kind == "sampled"
    for groups, took in answer_groups(
        policy, lora, records, service, config, group_size=count, seed=_SEEDS[kind], start=done, reference=against_base
    ):
        ratios = log_ratios(groups) if against_base else [[None] * count] * len(groups.records)
        for item, *answers in zip(items[done:], groups.texts, groups.scores, ratios, strict=False):
            item[kind] = [_answer(*answer, config) for answer in zip(*answers, strict=True)]
        done += len(groups.records)
        timing += took
        passes[kind].update(duration(started, timing))
        write_json(path, evaluation)
        advance(len(groups.records))


def _answer(text: str, score: Score, kl: float | None, config: TrainConfig) -> dict:
    reward = score.reward
    return {
        "completion": text,
        "reward": None if reward is None else reward.total,
        "rejection": rejection_of(score),
        "success": success_of(score, config),
        "kl": kl,
    }


def add_episodes(
    path: Path,
    evaluation: dict,
    answers: Answers,
    episodes: Sequence[Sequence[TeacherRecord]],
    sandbox: Sandbox,
    config: TrainConfig,
    *,
    student: Student | None = None,
) -> None:
    """Plays the episodes, unless these have been played, and writes the evaluation with them to `path`.

    `student` is whose prompts have to fit, None for answers that need no prompt.
    """
    names = [steps[0].task.episode.episode_id for steps in episodes]
    passes = evaluation.setdefault("passes", {})
    if passes.get("episodes", {}).get("names") == names:
        return
    started = time.perf_counter()
    fits = lambda task: (
        student is None
        or (len(student.tokenizer.encode_prompt(task, few_shot=config.data.few_shot)) <= config.data.max_prompt_tokens)
    )
    evaluation["episodes"] = play(episodes, answers, sandbox, config, fits=fits)
    passes["episodes"] = {"names": names, **duration(started, Counter())}
    write_json(path, evaluation)


def greedy_answers(
    student: Student, lora: dict | None, service: ScoresCompletions, config: TrainConfig, *, like: int
) -> Answers:
    """The student's greedy answers to any records; batches are cut as for `like` records."""

    def answer(records: Sequence[TeacherRecord]) -> list[tuple[str, Score]]:
        found = answer_groups(greedy(student), lora, records, service, config, reference=False, like=like)
        return [(texts[0], scores[0]) for groups, _ in found for texts, scores in _pairs(groups)]

    return answer


def _pairs(groups: Groups) -> Iterable[tuple[list[str], list[Score]]]:
    return zip(groups.texts, groups.scores, strict=True)


def teachers_answers(service: ScoresCompletions) -> Answers:
    """The teacher's own traces."""

    def answer(records: Sequence[TeacherRecord]) -> list[tuple[str, Score]]:
        scores = service.score([ScoreRequest(record.trace, record) for record in records])
        return [(record.trace, score) for record, score in zip(records, scores, strict=True)]

    return answer
