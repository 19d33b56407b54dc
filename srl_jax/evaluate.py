"""The report's numbers: greedy answers to held-out tasks, scored by the trainer's own reward and executed.

The KL of an item is its mean log-ratio to the base over its tokens, at the temperature they are drawn at
(greedy: 1). Samples, answers without the grammar and whole episodes come in further passes (`srl_jax.passes`).
"""

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from srl_jax import hosts
from srl_jax.config import TrainConfig
from srl_jax.evaluation import DECISIVE, VERSION, evaluation_item, summary
from srl_jax.groups import Groups
from srl_jax.model.hf import weights_hash
from srl_jax.records import TeacherRecord
from srl_jax.report import load_evaluation
from srl_jax.rollout import executable, sample_groups
from srl_jax.sandbox.service import ScoresCompletions
from srl_jax.student import Student
from srl_jax.train_step import StepSettings


class NothingToEvaluate(ValueError):
    """No held-out task can be answered here; the message says why."""


def fitting_tasks(
    student: Student,
    records: Sequence[TeacherRecord],
    config: TrainConfig,
    *,
    runners: frozenset[str] | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> list[TeacherRecord]:
    """The first `eval.max_tasks` records that can be evaluated here, spread over the slices in turn.

    Left out, with a notice, are records whose prompts do not fit and those whose tests need a runner that is not
    among `runners` (None: nothing is executed). Raises `NothingToEvaluate` when no record is left.
    """
    by_slice: dict[str, list[TeacherRecord]] = {}
    left_out: Counter[str] = Counter()
    for record in records:
        if not executable(record, runners):
            left_out[f"their tests need {record.task.tests.runner}, which this machine lacks"] += 1
            continue
        ids = student.tokenizer.encode_prompt(record.task, few_shot=config.data.few_shot)
        if len(ids) > config.data.max_prompt_tokens:
            left_out[f"their prompts exceed data.max_prompt_tokens={config.data.max_prompt_tokens}"] += 1
            continue
        by_slice.setdefault(record.task.slice, []).append(record)
    for reason, count in sorted(left_out.items()):
        note(f"notice: {count} of {len(records)} held-out tasks left out: {reason}")
    if not by_slice:
        reasons = "; ".join(f"{count}: {reason}" for reason, count in sorted(left_out.items()))
        raise NothingToEvaluate(f"none of the {len(records)} held-out tasks can be evaluated ({reasons})")
    queues = [list(reversed(by_slice[name])) for name in sorted(by_slice)]
    chosen: list[TeacherRecord] = []
    while len(chosen) < config.eval.max_tasks and any(queues):
        for queue in queues:
            if queue and len(chosen) < config.eval.max_tasks:
                chosen.append(queue.pop())
    return chosen


def evaluated_before(
    path: Path, tasks: Sequence[TeacherRecord], config: TrainConfig, *, adapters: str | None = None
) -> bool:
    """Whether `path` holds an evaluation of these tasks under the same settings, so that it need not be repeated.

    `adapters` is the hash of the policy's, where it is not known to be the same.
    """
    if not path.exists():
        return False
    saved = load_evaluation(path)
    told = [(item["task_id"], item["instruction"], item["teacher"]) for item in saved["items"]]
    same_tasks = told == [(record.task.task_id, record.task.instruction, record.trace) for record in tasks]
    same_policy = saved.get("version") == VERSION and (adapters is None or saved.get("adapters") == adapters)
    return same_tasks and same_policy and all(saved["config"].get(p) == config.to_dict()[p] for p in DECISIVE)


def answer_groups(
    student: Student,
    lora: dict | None,
    records: Sequence[TeacherRecord],
    service: ScoresCompletions,
    config: TrainConfig,
    *,
    group_size: int = 1,
    seed: int = 0,
    start: int = 0,
    reference: bool = True,
    like: int = 0,
) -> Iterator[tuple[Groups, Counter]]:
    """Scored answers of `student` with its own sampling settings, `group_size` to a record: batch by batch, with what
    each batch took in seconds by part.

    `eval.batch_size` rows are decoded at once. `start` goes on at the batch that begins with that record, with the
    answers it would have had in a whole run. `reference=False` spares the base's log-probs. `like` records are what
    batches are cut for, where several calls are to share one size.
    """
    shards = student.mesh.shape["data"] * student.mesh.shape["fsdp"]
    count = max(len(records), like)
    prompts_at_once = max(1, min(config.eval.batch_size, count * group_size) // group_size)
    # `width` prompts are decoded at once; up to four times as many wait their turn, though not between hosts. All turns
    # are equally long.
    width = -(-prompts_at_once // shards) * shards
    turns = -(-count // (width if hosts.count() > 1 else 4 * width))
    size = -(-count // (turns * width)) * width
    variables = student.sampling_variables(lora)
    settings = StepSettings(temperature=student.sampling.temperature or 1.0, micro_batch=width)
    for first in range(start, len(records), size):
        batch = list(records[first : first + size])
        # A short last batch is filled up, so that its size is compiled already; the copies are dropped again.
        filled = batch + [batch[0]] * (size - len(batch))
        prompts = [student.tokenizer.encode_prompt(r.task, few_shot=config.data.few_shot) for r in filled]
        timing: Counter = Counter()
        groups = sample_groups(
            student, variables, filled, prompts, jax.random.fold_in(jax.random.key(seed), first), service,
            group_size=group_size, max_prompt_tokens=config.data.max_prompt_tokens, settings=settings, timing=timing,
            reference=reference and lora is not None, slots=width,
        )  # fmt: skip
        yield groups.take(range(len(batch))), timing


def greedy(student: Student) -> Student:
    """The same student, answering greedily."""
    return dataclasses.replace(student, sampling=dataclasses.replace(student.sampling, temperature=0.0))


def log_ratios(groups: Groups) -> list[list[float]]:
    """Mean over its tokens of each answer's log-ratio to the base."""
    mask = groups.arrays["mask"]
    ratio = np.where(mask, groups.arrays["logprobs"] - groups.arrays["ref"], 0.0)
    return (ratio.sum(-1) / np.maximum(mask.sum(-1), 1)).tolist()


def evaluate(
    student: Student,
    lora: dict | None,
    records: Sequence[TeacherRecord],
    service: ScoresCompletions,
    config: TrainConfig,
    *,
    name: str,
    advance: Callable[[int], None] = lambda _: None,
) -> dict:
    """Greedy evaluation of the student (`lora`) or of the base (`lora=None`) on `records`.

    Returns the evaluation as JSON data: `name`, `config`, `metrics`, and one entry in `items` for each task.
    """
    items: list[dict] = []
    timing: Counter = Counter()
    started = time.perf_counter()
    for groups, took in answer_groups(greedy(student), lora, records, service, config):
        timing += took
        kl, tokens = log_ratios(groups), groups.arrays["mask"].sum(-1)
        for i, record in enumerate(groups.records):
            item = evaluation_item(student.tokenizer, record, groups.texts[i][0], groups.scores[i][0], config)
            items.append({**item, "kl": kl[i][0], "tokens": int(tokens[i, 0])})
        advance(len(groups.records))
    metrics = {**summary(items), **duration(started, timing)}
    adapters = None if lora is None else weights_hash(lora)
    about = {"name": name, "version": VERSION, "config": config.to_dict(), "adapters": adapters}
    return {**about, "metrics": metrics, "items": items}


def duration(started: float, timing: Counter) -> dict:
    """Seconds since `started`, and of these by part."""
    by_part = {part: round(value, 2) for part, value in sorted(timing.items()) if part != "tokens"}
    return {"seconds": round(time.perf_counter() - started, 2), "seconds_by_part": by_part}
