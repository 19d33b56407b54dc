"""The report's tables in Markdown: by measure, slice, kind of task, episode, rejection and time."""

import html
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from srl_jax.intervals import bootstrap_ci, paired_bootstrap_ci, sign_flip_p
from srl_jax.measures import MEASURES, Item, kinds_of, values_of

Items = Mapping[str, Sequence[Item]]  # whose answers -> one item a task


def comparison(items: Items, base: Sequence[Item], student: Sequence[Item]) -> str:
    """Every measure of everyone, and what the student has over the base; `base` and `student` are paired."""
    rows = []
    for measure in MEASURES:
        cells = [_interval(values_of(some, measure)) for some in items.values()]
        if set(cells) != {"-"}:
            rows.append([measure, *cells, _difference(measure, base, student)])
    return markdown_table(["", *items, "student - base"], rows)


def by_slice(items: Items, base: Sequence[Item], student: Sequence[Item]) -> str:
    """The same for the tasks of each slice."""
    parts = []
    for name in sorted({item["slice"] for item in base}):
        picked = {who: [item for item in some if item["slice"] == name] for who, some in items.items()}
        before, after = ([item for item in some if item["slice"] == name] for some in (base, student))
        parts.append(f"### {code(name)}, {len(before)} tasks\n\n{comparison(picked, before, after)}")
    return "\n\n".join(parts)


def by_kind(items: Items, seen: Items) -> list[str]:
    """Reward and execution success by kind of task; `seen` are items of training tasks, which stand in no other table.

    Nothing for evaluations that do not tell kinds.
    """
    found = {name: kinds_of(some) for name, some in items.items()}
    for name, some in seen.items():
        for place, own in kinds_of(some).items():
            if place[0] == "rule":
                found[name][place] = [*found[name].get(place, ()), *own]
    names = list(items)
    places = dict.fromkeys(place for kinds in found.values() for place in kinds)
    if not places:
        return []
    rows = []
    for kind, value in places:
        picked = {name: found[name].get((kind, value), []) for name in names}
        base, student = (sorted(picked[name], key=lambda item: item["task_id"]) for name in ("base", "student"))
        paired = [item["task_id"] for item in base] == [item["task_id"] for item in student]
        rows.append([
            f"{kind}: {html.escape(value)}",
            str(len(student)),
            *(_interval(values_of(picked[name], "reward")) for name in names),
            _difference("reward", base, student) if paired else "-",
            *(_interval(values_of(picked[name], "execution success")) for name in ("base", "student")),
        ])  # fmt: skip
    heads = ["", "tasks", *(f"reward, {name}" for name in names), "student - base"]
    table = markdown_table([*heads, "success, base", "success, student"], rows)
    parts = ["## By kind of task", table]
    if seen:
        parts.append("Tasks whose rule was seen are of the training split, and may have been trained on themselves.")
    return parts


def episodes(evaluations: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """How far each gets in episodes when every step starts from its own files and state; [] without episodes."""
    played = {name: evaluation["episodes"] for name, evaluation in evaluations.items() if evaluation.get("episodes")}
    if not played:
        return []
    alone = {name: {item["task_id"]: item for item in evaluations[name]["items"]} for name in played}
    rows = []
    for name, steps in played.items():
        for step in sorted({item["step"] for item in steps}):
            own = [item for item in steps if item["step"] == step]
            given = [alone[name][item["task_id"]] for item in own if item["task_id"] in alone[name]]
            rows.append([
                name, str(step), str(len(own)),
                _interval([item["reward"] for item in own if item["reward"] is not None]),
                _interval([item["reward"] for item in given if item["reward"] is not None]),
                _interval([float(item["success"]) for item in own if item["success"] is not None]),
                _interval([float(item["success"]) for item in given if item["success"] is not None]),
            ])  # fmt: skip
    heads = ["", "step", "episodes", "reward, own state", "reward, teacher's state"]
    whole = [
        [name, str(len(ends)), _interval([float(end) for end in ends if end is not None])]
        for name, steps in played.items()
        if (ends := _ends(steps))
    ]
    return [
        "## Episodes",
        "Each step starts from the files and the state that the one's own step before left; beside it, where the step "
        "was evaluated alone, from those that the teacher's left.",
        markdown_table([*heads, "success, own state", "success, teacher's state"], rows),
        markdown_table(["", "episodes", "every step succeeds"], whole),
    ]


def _ends(steps: Sequence[Item]) -> list[bool | None]:
    """Of every episode whether all its steps succeeded; None where no step failed and one is not known."""
    by_episode: dict[str, list[bool | None]] = {}
    for item in steps:
        by_episode.setdefault(item["episode_id"], []).append(item["success"])
    return [False if False in found else None if None in found else True for found in by_episode.values()]


def rejections(items: Items) -> str:
    """Counts by reason; with `(free)` those of the answers without the grammar."""
    counts = {name: Counter(item["rejection"] for item in some if item["rejection"]) for name, some in items.items()}
    for name, some in items.items():
        counts[name].update(
            f"{answer['rejection']} (free)" for item in some for answer in item.get("free") or () if answer["rejection"]
        )
    reasons = sorted(set().union(*counts.values()))
    if not reasons:
        return "None: every trace parses."
    rows = [[reason, *(str(c[reason]) for c in counts.values())] for reason in reasons]
    return markdown_table(["reason", *items], rows)


def times(evaluations: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Where the evaluation's time went; [] for evaluations that do not say."""
    rows = []
    for name, evaluation in evaluations.items():
        passes = {"greedy": evaluation.get("metrics", {}), **evaluation.get("passes", {})}
        for kind, taken in passes.items():
            if "seconds" in taken:
                parts = ", ".join(f"{part} {value:g}" for part, value in taken.get("seconds_by_part", {}).items())
                rows.append([name, kind, f"{taken['seconds']:.1f}", parts or "-"])
    return ["## Time", markdown_table(["", "answers", "seconds", "of these"], rows)] if rows else []


def p_value(p: float) -> str:
    """A p-value as it is printed."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def code(text: str) -> str:
    """Text of a model or a repository, on one line, as HTML that Markdown leaves alone."""
    return f"<code>{html.escape(' '.join(text.split()))}</code>"


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; bars in cells are escaped."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _difference(measure: str, base: Sequence[Item], student: Sequence[Item]) -> str:
    pairs = [(MEASURES[measure](b), MEASURES[measure](s)) for b, s in zip(base, student, strict=True)]
    both = [(b, s) for b, s in pairs if b is not None and s is not None]
    if not both:
        return "-"
    before, after = zip(*both, strict=True)
    return f"{paired_bootstrap_ci(before, after)}, {p_value(sign_flip_p(before, after))}"


def _interval(values: Sequence[float]) -> str:
    return str(bootstrap_ci(values)) if values else "-"
