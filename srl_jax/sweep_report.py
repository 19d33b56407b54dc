"""What a sweep found: every cell against its base and against the first cell, failures shown as failures."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from srl_jax.evaluation import write_bytes
from srl_jax.intervals import Interval, bootstrap_ci, paired_bootstrap_ci
from srl_jax.measures import MEASURES
from srl_jax.report import load_evaluation
from srl_jax.report_tables import code, markdown_table
from srl_jax.sweep import Job

_FURTHER = ("R_action", "R_state", "R_think", "parse rate", "match-set F1")
_FLOORS = ("base", "copied_prompt", "common_trace")
_Items = Mapping[tuple[int, str], Mapping[str, Any]]  # (seed, task id) -> item


def write_sweep_report(jobs: Sequence[Job], out: Path) -> Path:
    """Writes `<out>/sweep.md` and its plot; returns the path.

    A cell's numbers are over all tasks of the seeds that are done. Intervals resample whole rules, since tasks of one
    rule, and one task under several seeds, are alike. Differences pair the same task under the same seed.
    """
    cells = list(dict.fromkeys(job.cell for job in jobs))
    student = {cell: _answers(jobs, cell, "student") for cell in cells}
    base = {cell: _answers(jobs, cell, "base") for cell in cells}
    reference = cells[0]
    heads = ["cell", "seeds", "reward", "over its base", f"over {reference}", "execution success", "KL per token"]
    rows = []
    for cell in cells:
        own = [job for job in jobs if job.cell == cell]
        done = sum(job.status["state"] == "done" for job in own)
        against = "reference" if cell == reference else _difference(student[reference], student[cell])
        rows.append([
            f"`{cell}`", f"{done} of {len(own)}", _mean(student[cell], "reward"),
            _difference(base[cell], student[cell]), against,
            _mean(student[cell], "execution success"), _mean(student[cell], "KL per token"),
        ])  # fmt: skip
    sections = [
        "# Sweep",
        f"{len(cells)} cells, seeds {', '.join(str(seed) for seed in dict.fromkeys(job.seed for job in jobs))}. Mean "
        "[95 % bootstrap interval over rules] on held-out tasks.",
        markdown_table(heads, rows),
    ]
    rows = [(f"`{cell}`", items) for cell, items in student.items()]
    rows += [(f"{name} of `{reference}`", _answers(jobs, reference, name)) for name in _FLOORS]
    sections += [
        "## By measure",
        markdown_table(
            ["answers", *_FURTHER, "mean reward of each seed"],
            [[name, *(_mean(items, field) for field in _FURTHER), _by_seed(items)] for name, items in rows if items],
        ),
    ]
    slices = sorted({item["slice"] for items in student.values() for item in items.values()})
    if len(slices) > 1:
        for title, field in (("Reward", "reward"), ("Execution success", "execution success")):
            means = [[f"`{cell}`", *(_mean(_of(items, n), field) for n in slices)] for cell, items in student.items()]
            sections += [f"## {title} by slice", markdown_table(["cell", *map(code, slices)], means)]
    drawn = {cell: _interval(items, "reward") for cell, items in student.items() if items}
    if drawn:
        (out / "plots").mkdir(parents=True, exist_ok=True)
        image = io.BytesIO()
        _figure(drawn).savefig(image, format="png", dpi=120)
        write_bytes(out / "plots" / "sweep.png", image.getvalue())
        sections.append("![Held-out reward of every cell](plots/sweep.png)")
    sections += ["## Not done", _unfinished(jobs)]
    path = out / "sweep.md"
    write_bytes(path, ("\n\n".join(sections) + "\n").encode())
    return path


def _answers(jobs: Sequence[Job], cell: str, name: str) -> _Items:
    return {
        (job.seed, item["task_id"]): item
        for job in jobs
        if job.cell == cell and job.status["state"] == "done" and (job.workdir / f"eval_{name}.json").exists()
        for item in load_evaluation(job.workdir / f"eval_{name}.json")["items"]
    }


def _of(items: _Items, name: str) -> _Items:
    return {key: item for key, item in items.items() if item["slice"] == name}


def _interval(items: _Items, field: str) -> Interval | None:
    values = [(MEASURES[field](item), item["rule"]) for item in items.values()]
    kept = [(value, rule) for value, rule in values if value is not None]
    if not kept:
        return None
    return bootstrap_ci([value for value, _ in kept], clusters=[rule for _, rule in kept])


def _mean(items: _Items, field: str) -> str:
    return str(_interval(items, field) or "-")


def _by_seed(items: _Items) -> str:
    seeds: dict[int, list[float]] = {}
    for (seed, _), item in items.items():
        seeds.setdefault(seed, []).extend([item["reward"]] if item["reward"] is not None else [])
    return ", ".join(f"{sum(rewards) / len(rewards):.3f}" for _, rewards in sorted(seeds.items()) if rewards)


def _difference(before: _Items, after: _Items) -> str:
    pairs = [(before[key], after[key]) for key in sorted(before.keys() & after.keys())]
    pairs = [(b, a) for b, a in pairs if b["reward"] is not None and a["reward"] is not None]
    if not pairs:
        return "-"
    rules = [after["rule"] for _, after in pairs]
    return str(paired_bootstrap_ci([b["reward"] for b, _ in pairs], [a["reward"] for _, a in pairs], clusters=rules))


def _unfinished(jobs: Sequence[Job]) -> str:
    lines = []
    for job in jobs:
        status = job.status
        if status["state"] == "failed":
            said = status["said"].replace("`", "'")
            lines.append(f"- `{job.cell}`, seed {job.seed}: **failed** with exit code {status['code']}: `{said}`")
        elif status["state"] != "done":
            lines.append(f"- `{job.cell}`, seed {job.seed}: {status['state']}")
    return "\n".join(lines) or "Every cell is done."


def _figure(intervals: Mapping[str, Interval | None]) -> Figure:
    shown = [(cell, interval) for cell, interval in intervals.items() if interval is not None]
    figure = Figure(figsize=(7, 1 + 0.35 * len(shown)), layout="constrained")
    axes = figure.add_subplot()
    for place, (_, interval) in enumerate(shown):
        axes.plot([interval.low, interval.high], [place, place], color="C0")
        axes.plot([interval.mean], [place], "o", color="C0" if place else "C3")
    axes.set_yticks(range(len(shown)), [cell for cell, _ in shown], fontsize="small")
    axes.invert_yaxis()
    axes.set(title="Held-out reward, mean and 95 % interval (red: the reference)")
    axes.grid(axis="x", alpha=0.3)
    return figure
