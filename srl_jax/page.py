"""One self-contained HTML page of a run: numbers by slice, histograms, curves, and every trace beside its teacher's.

The page needs no network and no server; what models and repositories wrote is data in it, never markup.
"""

import json
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from srl_jax.evaluation import write_bytes
from srl_jax.intervals import bootstrap_ci
from srl_jax.measures import MEASURES, kinds_of, values_of
from srl_jax.metrics import HISTOGRAMS_FILE, read_metrics
from srl_jax.report import ReportError, load_evaluation

PAGE_FILE = "page.html"
_OF_TASK = ("slice", "rule", "instruction", "prompt", "teacher")
_OF_ANSWER = (
    "completion", "reward", "action", "state", "think", "brevity", "rejection", "success", "status", "diff", "kl",
)  # fmt: skip
_MAX_COLUMNS = 120  # steps in a chart of distributions; more would be thinner than a pixel
_FIRST = ("base", "student", "teacher")  # then floors, then evaluations during training


def write_page(workdir: str | os.PathLike[str]) -> Path:
    """Writes `<workdir>/page.html` from the `eval_*.json` and metrics there, atomically; returns its path.

    Raises `ReportError` when there is no evaluation, or one that cannot be read.
    """
    workdir = Path(workdir)
    evaluations = {
        path.stem.removeprefix("eval_"): load_evaluation(path) for path in sorted(workdir.glob("eval_*.json"))
    }
    if not evaluations:
        raise ReportError(f"{workdir}: no eval_<name>.json; run launch/evaluate.py or launch/train.py first")
    template = resources.files("srl_jax").joinpath("page.html").read_text(encoding="utf-8")
    text = json.dumps(_page_data(workdir, evaluations), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # Inside a script element only "</" and "<!--" mean anything to the HTML parser, and JSON may spell "<" otherwise.
    page = template.replace("@DATA@", text.replace("<", "\\u003c"))
    path = workdir / PAGE_FILE
    write_bytes(path, page.encode("utf-8", "replace"))
    return path


def _page_data(workdir: Path, evaluations: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    names = sorted(evaluations, key=_place)
    items = {name: evaluations[name]["items"] for name in names}
    tasks = {item["task_id"]: item for some in items.values() for item in some}
    columns = [name for name in names if not name.startswith("step")]
    slices = sorted({item["slice"] for item in tasks.values()})
    tables = {"all": _table({name: items[name] for name in columns})}
    for wanted in slices:
        tables[wanted] = _table({name: [i for i in items[name] if i["slice"] == wanted] for name in columns})
    by_kind = {name: kinds_of(items[name]) for name in columns}
    for kind, value in kinds_of(list(tasks.values())):
        tables[f"{kind}: {value}"] = _table({name: by_kind[name].get((kind, value), []) for name in columns})
    metrics = read_metrics(workdir)
    config = evaluations[names[0]].get("config", {})
    facts = [f"{len(tasks)} held-out tasks", f"{metrics[-1]['step'] if metrics else 0} training steps"]
    facts += [str(config["model"]["source"])] if "model" in config else []
    return {
        "title": f"Run {workdir.resolve().name}",
        "facts": facts,
        "names": names,
        "columns": columns,
        "tables": tables,
        "metrics": metrics,
        "histograms": _thinned(read_metrics(workdir, HISTOGRAMS_FILE), _MAX_COLUMNS),
        "tasks": [{"id": name, **{field: tasks[name].get(field, "") for field in _OF_TASK}} for name in sorted(tasks)],
        "answers": {
            name: {item["task_id"]: {field: item.get(field) for field in _OF_ANSWER} for item in items[name]}
            for name in names
        },
    }


def _thinned(records: Sequence[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """At most `most` of the records, evenly spaced, the last among them."""
    every = -(-len(records) // most) if records else 1
    return list(records[::-1][::every][::-1])


def _place(name: str) -> tuple[int, int, str]:
    if name in _FIRST:
        return _FIRST.index(name), 0, name
    step = name.removeprefix("step")
    return (len(_FIRST) + 1, int(step), name) if step.isdigit() and step != name else (len(_FIRST), 0, name)


def _table(items: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, list[float]]]:
    """Measure -> name -> [mean, low, high]; a name without a value is absent, and so is a measure without a name."""
    rows: dict[str, dict[str, list[float]]] = {}
    for measure in MEASURES:
        cells = {}
        for name, some in items.items():
            if values := values_of(some, measure):
                interval = bootstrap_ci(values)
                cells[name] = [interval.mean, interval.low, interval.high]
        if cells:
            rows[measure] = cells
    return rows
