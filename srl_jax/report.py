"""What a run did, as a page: base against student with intervals, by slice, with curves and traces side by side.

Reads what training left in a working directory: `metrics.jsonl`, `eval_base.json`, `eval_student.json`, any further
`eval_<name>.json` such as a floor or the teacher, `seen_<name>.json` (the same on tasks of the training split), and
`eval_step<N>.json` as points of a curve. Writes `report.md` and `plots/*.png` beside them.
"""

import html
import io
import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from srl_jax import report_tables as tables
from srl_jax.evaluation import write_bytes
from srl_jax.intervals import bootstrap_ci, paired_bootstrap_ci, sign_flip_p
from srl_jax.measures import values_of
from srl_jax.metrics import read_metrics

REPORT_FILE = "report.md"

_ITEM_FIELDS = (
    "task_id", "slice", "rule", "instruction", "completion", "teacher", "reward", "action", "state", "think",
    "brevity", "rejection", "success", "kl", "think_tokens", "state_tokens",
)  # fmt: skip
_SHOWN_TRACE = 1500  # characters
_LEVEL = 0.05  # of the verdict's test, as of its 95 % interval


class ReportError(ValueError):
    """An evaluation file that cannot be reported; the message names the file, the field and the remedy."""


def load_evaluation(path: Path) -> dict[str, Any]:
    """Reads one `eval_<name>.json`; raises `ReportError` when it is absent, malformed or holds no items."""
    try:
        evaluation = json.loads(path.read_text(encoding="utf-8"))
        items = evaluation["items"]
        seen = Counter(item["task_id"] for item in items)
    except FileNotFoundError:
        raise ReportError(f"{path}: no such file; run launch/evaluate.py or launch/train.py first") from None
    except (ValueError, TypeError, KeyError) as error:
        raise ReportError(f"{path}: not an evaluation ({error!r}); evaluate again") from error
    if not items:
        raise ReportError(f"{path}: items is empty; evaluate at least one task")
    for number, item in enumerate(items):
        missing = [field for field in _ITEM_FIELDS if field not in item]
        if missing:
            raise ReportError(f"{path}: items[{number}] lacks {', '.join(missing)}; evaluate again")
    repeated = [task_id for task_id, count in seen.items() if count > 1]
    if repeated:
        raise ReportError(f"{path}: task_id {repeated[0]!r} occurs {seen[repeated[0]]} times; each task counts once")
    return evaluation


def write_report(workdir: str | os.PathLike[str]) -> Path:
    """Writes `<workdir>/report.md` and its plots, each atomically; returns the report's path.

    `eval_base.json` and `eval_student.json` must be there and hold the same tasks (`ReportError` otherwise).
    """
    workdir = Path(workdir)
    evaluations = {"base": load_evaluation(workdir / "eval_base.json")}
    evaluations["student"] = load_evaluation(workdir / "eval_student.json")
    held_out = {0: evaluations["base"]["items"]}
    for path in sorted(workdir.glob("eval_*.json")):
        name = path.stem.removeprefix("eval_")
        if during := re.fullmatch(r"step(\d+)", name):
            held_out[int(during.group(1))] = load_evaluation(path)["items"]
        else:
            evaluations.setdefault(name, load_evaluation(path))
    items = {name: evaluation["items"] for name, evaluation in evaluations.items()}
    base, student = _paired(items["base"], items["student"], workdir)
    seen = {name: load_evaluation(path)["items"] for name in items if (path := workdir / f"seen_{name}.json").exists()}
    records = read_metrics(workdir)
    if records:
        # What was evaluated then stands: where the best state is kept, the student is an earlier one.
        held_out.setdefault(records[-1]["step"], student)
    tasks = lambda answers: {item["task_id"] for item in answers}
    # launch/evaluate.py may have asked the base other tasks since.
    held_out = {step: answers for step, answers in held_out.items() if tasks(answers) == tasks(base)}

    sections = [
        "# Report",
        _summary(base, student, records),
        "## Base against student",
        "Mean [95 % bootstrap interval over tasks]. Components are over traces that parse; a difference is over the "
        "tasks where both have a value, its p that of the paired sign-flip test, not corrected for the number of rows.",
        tables.comparison(items, base, student),
        "## By slice",
        tables.by_slice(items, base, student),
        *tables.by_kind(items, seen),
        *tables.episodes(evaluations),
        "## Rejected traces",
        tables.rejections(items),
        *tables.times(evaluations),
        "## Curves",
        _plots(workdir / "plots", items, records, held_out),
        "## Traces side by side",
        *(_side_by_side(*pair) for pair in _chosen(base, student)),
    ]
    path = workdir / REPORT_FILE
    write_bytes(path, ("\n\n".join(sections) + "\n").encode())
    return path


def _paired(
    base: Sequence[Mapping[str, Any]], student: Sequence[Mapping[str, Any]], workdir: Path
) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """Both lists in the order of task ids."""
    by_task = [{item["task_id"]: item for item in items} for items in (base, student)]
    alone = sorted(by_task[0].keys() ^ by_task[1].keys())
    if alone:
        raise ReportError(
            f"{workdir}: task {alone[0]!r} ({len(alone)} in all) is in only one of eval_base.json and "
            "eval_student.json; evaluate both on the same tasks"
        )
    tasks = sorted(by_task[0])
    return [by_task[0][task] for task in tasks], [by_task[1][task] for task in tasks]


def _summary(base: Sequence[Mapping], student: Sequence[Mapping], records: Sequence[Mapping]) -> str:
    scored = [(b, s) for b, s in zip(base, student, strict=True) if None not in (b["reward"], s["reward"])]
    if not scored:
        return "No task has a reward in both evaluations, so nothing can be compared."
    rewards = [b["reward"] for b, _ in scored], [s["reward"] for _, s in scored]
    rules = [b["rule"] for b, _ in scored]
    difference = paired_bootstrap_ci(*rewards)
    by_rule = paired_bootstrap_ci(*rewards, clusters=rules)
    p_tasks, p_rules = sign_flip_p(*rewards), sign_flip_p(*rewards, clusters=rules)
    # An interval resampled from a handful of tasks is too narrow to go by alone: the test has to agree.
    if difference.low > 0 and p_tasks < _LEVEL:
        verdict = "the student scores higher"
    elif difference.high < 0 and p_tasks < _LEVEL:
        verdict = "the student scores **lower**"
    else:
        verdict = "no difference can be told"
    lines = [
        f"Held-out reward, student minus base: **{difference}** over {len(scored)} tasks (mean and 95 % bootstrap "
        f"interval of the paired difference): {verdict}.",
        f"Resampling whole rules ({len(set(rules))} of them) instead of tasks: {by_rule}.",
        f"Sign-flip test of the paired differences: {tables.p_value(p_tasks)}; flipping whole rules: "
        f"{tables.p_value(p_rules)}.",
    ]
    if len(scored) < len(base):
        lines.append(f"{len(base) - len(scored)} tasks could not be scored in one of the two and are left out.")
    if records:
        lines.append(f"Training: {records[-1]['step']} steps.")
    recorded = [record for record in records if record.get("seconds/record") is not None]
    if recorded:
        steady = [record for record in recorded if not record.get("compiles")] or recorded
        spent, steps = (math.fsum(record[name] for record in steady) for name in ("seconds/record", "seconds/step"))
        lines.append(f"Storing their rollouts took {spent / steps:.2%} of {len(steady)} steps' time (seconds/record).")
    return "  \n".join(lines)


def _plots(
    directory: Path,
    items: Mapping[str, Sequence[Mapping]],
    records: Sequence[Mapping],
    held_out: Mapping[int, Sequence[Mapping]],
) -> str:
    """Draws what there are numbers for; returns the Markdown that shows it."""
    directory.mkdir(exist_ok=True)
    curves = {
        "Reward by component": ["reward/total", "reward/action", "reward/state", "reward/think"],
        "KL per token against the base": ["kl"],
        "Parse rate": ["parse_rate"],
    }
    shown = []
    for title, names in curves.items():
        series = {
            name: [(record["step"], record[name]) for record in records if record.get(name) is not None]
            for name in names
        }
        series = {name: points for name, points in series.items() if points}
        if series:
            file = directory / f"{names[0].split('/')[0]}.png"
            _save_figure(_curve_figure(title, series), file)
            shown.append(f"![{title}](plots/{file.name})")
    points = [(step, values) for step, some in sorted(held_out.items()) if (values := values_of(some, "reward"))]
    if len(points) > 2:
        _save_figure(_held_out_figure(points), directory / "held_out.png")
        shown.append("![Held-out reward](plots/held_out.png)")
    _save_figure(_before_after_figure(items), directory / "before_after.png")
    return "\n\n".join([*shown, "![Before and after](plots/before_after.png)"])


def _curve_figure(title: str, series: Mapping[str, Sequence[tuple[int, float]]]) -> Figure:
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.add_subplot()
    for index, (name, points) in enumerate(series.items()):
        steps, values = np.array(points, np.float64).T
        window = max(1, min(9, len(values) // 3))  # a short run keeps its shape
        smooth = np.convolve(values, np.ones(window) / window, mode="valid")
        axes.plot(steps, values, color=f"C{index}", alpha=0.3, linewidth=1)
        axes.plot(steps[window - 1 :], smooth, color=f"C{index}", label=name)
    axes.set(title=f"{title} (bold: mean of {window} steps)", xlabel="step")
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    return figure


def _held_out_figure(points: Sequence[tuple[int, Sequence[float]]]) -> Figure:
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.add_subplot()
    intervals = [bootstrap_ci(values) for _, values in points]
    steps = [step for step, _ in points]
    axes.plot(steps, [i.mean for i in intervals], marker="o")
    axes.fill_between(steps, [i.low for i in intervals], [i.high for i in intervals], alpha=0.2)
    axes.set(title="Held-out reward, mean and 95 % interval", xlabel="step")
    axes.grid(alpha=0.3)
    return figure


def _before_after_figure(items: Mapping[str, Sequence[Mapping]]) -> Figure:
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.add_subplot()
    measures = ["reward", "R_action", "R_state", "R_think", "parse rate", "execution success"]
    width = 0.8 / len(items)
    for index, (name, some) in enumerate(items.items()):
        present = [(place, values_of(some, m)) for place, m in enumerate(measures) if values_of(some, m)]
        intervals = [bootstrap_ci(values) for _, values in present]
        errors = [[i.mean - i.low for i in intervals], [i.high - i.mean for i in intervals]]
        places = [place + index * width for place, _ in present]
        axes.bar(places, [i.mean for i in intervals], width, yerr=np.maximum(errors, 0), capsize=2, label=name)
    axes.set_xticks([place + 0.4 - width / 2 for place in range(len(measures))], measures, fontsize="small")
    axes.set(title="Held-out tasks, mean and 95 % interval")
    axes.legend(fontsize="small")
    axes.grid(axis="y", alpha=0.3)
    return figure


def _chosen(base: Sequence[Mapping], student: Sequence[Mapping]) -> list[tuple[str, Mapping, Mapping]]:
    """The greatest gain, the median, and the greatest loss: chosen by rule, not by eye."""
    scored = [i for i in range(len(base)) if None not in (base[i]["reward"], student[i]["reward"])]
    if not scored:
        return []
    order = sorted(scored, key=lambda i: (base[i]["reward"] - student[i]["reward"], base[i]["task_id"]))
    places = {"Greatest gain": order[0], "Median": order[len(order) // 2], "Greatest loss": order[-1]}
    unique = {index: title for title, index in reversed(places.items())}
    return [(title, base[index], student[index]) for index, title in reversed(unique.items())]


def _side_by_side(title: str, base: Mapping[str, Any], student: Mapping[str, Any]) -> str:
    """One task as an HTML table, because a Markdown table cannot hold lines. Model text is escaped throughout."""
    columns = {
        "teacher": base["teacher"],
        f"base, reward {base['reward']:.3f}": base["completion"],
        f"student, reward {student['reward']:.3f}": student["completion"],
    }
    heads = "".join(f"<th>{html.escape(head)}</th>" for head in columns)
    cells = "".join(f"<td><pre>{_trace_text(text)}</pre></td>" for text in columns.values())
    task, slice_name, rule, instruction = map(
        tables.code, (base[f] for f in ("task_id", "slice", "rule", "instruction"))
    )
    return (
        f"### {title}: {task} ({slice_name}, rule {rule})\n\n"
        f"Instruction: {instruction}\n\n"
        f"<table><tr>{heads}</tr>\n<tr>{cells}</tr></table>"
    )


def _trace_text(text: str) -> str:
    shown = text if len(text) <= _SHOWN_TRACE else text[:_SHOWN_TRACE] + f"... ({len(text)} characters)"
    # A blank line would end the HTML block, and what follows would be read as Markdown.
    return html.escape(shown).replace("\r", "").replace("\n", "<br>")


def _save_figure(figure: Figure, path: Path) -> None:
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    write_bytes(path, image.getvalue())
