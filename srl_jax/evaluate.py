"""The report's numbers: greedy answers to held-out tasks, scored by the trainer's own reward and executed.

The KL of an item is its mean log-ratio to the base over its tokens, under the policy at temperature 1.
"""

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import jax
from rich.progress import Progress

from srl_jax.checkpoint import CheckpointError
from srl_jax.config import TrainConfig
from srl_jax.evaluation import evaluation_item, summary, write_json
from srl_jax.floors import write_bounds
from srl_jax.page import write_page
from srl_jax.records import TeacherRecord
from srl_jax.report import load_evaluation, write_report
from srl_jax.rollout import executable, sample_groups
from srl_jax.run import Run
from srl_jax.sandbox.service import ScoresCompletions
from srl_jax.student import Student
from srl_jax.train_step import StepSettings

# Parts of the configuration that a greedy evaluation of given weights depends on.
_DECISIVE = ("model", "data", "sampling", "reward", "eval", "sandbox")


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


def evaluated_before(path: Path, tasks: Sequence[TeacherRecord], config: TrainConfig) -> bool:
    """Whether `path` holds an evaluation of these tasks under the same settings, so that it need not be repeated."""
    if not path.exists():
        return False
    saved = load_evaluation(path)
    same_tasks = [item["task_id"] for item in saved["items"]] == [record.task.task_id for record in tasks]
    return same_tasks and all(saved["config"].get(part) == config.to_dict()[part] for part in _DECISIVE)


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
    shards = student.mesh.shape["data"] * student.mesh.shape["fsdp"]
    # `width` prompts are decoded at once; up to four times as many wait their turn. All turns are equally long.
    width = -(-min(config.eval.batch_size, len(records)) // shards) * shards
    turns = -(-len(records) // (4 * width))
    size = -(-len(records) // (turns * width)) * width
    greedy = dataclasses.replace(student, sampling=dataclasses.replace(student.sampling, temperature=0.0))
    variables = student.sampling_variables(lora)
    settings = StepSettings(temperature=1.0, micro_batch=width)
    items: list[dict] = []
    timing: Counter = Counter()
    started = time.perf_counter()
    for start in range(0, len(records), size):
        batch = list(records[start : start + size])
        # A short last batch is filled up, so that nothing is compiled twice; the copies are dropped again.
        filled = batch + [batch[0]] * (size - len(batch))
        prompts = [student.tokenizer.encode_prompt(r.task, few_shot=config.data.few_shot) for r in filled]
        groups = sample_groups(
            greedy, variables, filled, prompts, jax.random.key(0), service,
            group_size=1, prompt_width=config.data.max_prompt_tokens, settings=settings, timing=timing,
            reference=lora is not None, slots=width,
        )  # fmt: skip
        for i, record in enumerate(batch):
            mask = groups.arrays["mask"][i, 0]
            ratio = groups.arrays["logprobs"][i, 0] - groups.arrays["ref"][i, 0]
            items.append(
                {
                    **evaluation_item(student.tokenizer, record, groups.texts[i][0], groups.scores[i][0], config),
                    "kl": float(ratio[mask].mean()),
                    "tokens": int(mask.sum()),
                }
            )
        advance(len(batch))
    seconds = time.perf_counter() - started
    metrics = {
        **summary(items),
        "seconds": round(seconds, 2),
        "seconds_by_part": {part: round(value, 2) for part, value in sorted(timing.items()) if part != "tokens"},
    }
    return {"name": name, "config": config.to_dict(), "metrics": metrics, "items": items}


def evaluate_run(
    config: TrainConfig,
    workdir: Path,
    out: Path,
    held_out: Sequence[TeacherRecord],
    corpus: Sequence[TeacherRecord] = (),
) -> Path:
    """Evaluates teacher, floors (`corpus`: training records), base and newest checkpoint of the run in `workdir`.

    Returns the report written into `out`. Raises `CheckpointError` when the run has no checkpoint yet, and what `Run`
    raises.
    """
    with Run(config, workdir, read_only=True) as run, Progress() as bar:
        if run.resume() is None:
            raise CheckpointError(f"{workdir}: no checkpoint to evaluate; train first")
        tasks = fitting_tasks(run.student, held_out, config, runners=run.runners, note=bar.console.print)
        out.mkdir(parents=True, exist_ok=True)
        write_bounds(out, tasks, corpus, run.student.tokenizer, run.judge, config)
        for name, adapters in (("base", None), ("student", run.state.lora)):
            advance = partial(bar.advance, bar.add_task(f"evaluating {name}", total=len(tasks)))
            result = evaluate(run.student, adapters, tasks, run.judge, config, name=name, advance=advance)
            write_json(out / f"eval_{name}.json", result)
    write_page(out)
    return write_report(out)
