"""Rounds to figures: medians with their spread, ratios taken within rounds, and the tables that show them."""

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Spread:
    """Median, least and greatest of some rounds."""

    median: float
    least: float
    greatest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(statistics.median(values), min(values), max(values))

    def show(self, digits: int) -> str:
        return f"{self.median:.{digits}f} ({self.least:.{digits}f}..{self.greatest:.{digits}f})"


Turn = Mapping[str, Any]
MEASURES: dict[str, Callable[[Turn], float]] = {
    "rollout_s": lambda turn: turn["rollout"]["seconds"],
    "tokens_per_s": lambda turn: turn["rollout"]["tokens"] / turn["rollout"]["seconds"],
    "update_s": lambda turn: turn["update"]["seconds"],
    "step_s": lambda turn: turn["rollout"]["seconds"] + turn["update"]["seconds"],
}
# How many times as fast the first system is as another; tokens/s the other way round than seconds.
_FASTER = {"rollout": ("tokens_per_s", 1), "update": ("update_s", -1), "step": ("step_s", -1)}


def summary(value: Mapping[str, Any], first: str) -> dict[str, dict[str, Any]]:
    """System -> its figures over all finished rounds; `{"failed": reason}` where it failed in any.

    `times_as_fast` compares `first` with the system, round by round: above 1, `first` is faster.
    """
    rounds = [entry["systems"] for entry in value["rounds"]]
    result: dict[str, dict[str, Any]] = {}
    for system in value["warmup"]:
        failures = [turns[system]["failed"] for turns in rounds if "failed" in turns[system]]
        if failures or not rounds:
            result[system] = {"failed": failures[0] if failures else "no round was finished"}
            continue
        turns = [turns[system] for turns in rounds]
        figures: dict[str, Any] = {
            name: dataclasses.asdict(Spread.of([of(turn) for turn in turns])) for name, of in MEASURES.items()
        }
        both = [(entry[first], entry[system]) for entry in rounds if "failed" not in entry[first] and system != first]
        if both:
            figures["times_as_fast"] = {
                part: dataclasses.asdict(Spread.of([(MEASURES[m](a) / MEASURES[m](b)) ** sign for a, b in both]))
                for part, (m, sign) in _FASTER.items()
            }
        warmup, parts = value["warmup"][system], ("rollout", "update")
        figures |= {
            "rounds": len(turns),
            "tokens": turns[-1]["rollout"]["tokens"],
            "first_step_s": sum(warmup[part]["seconds"] for part in parts),
            "compile_s": sum(warmup[part]["compile_seconds"] for part in parts),
            "recompilations": _sum([turn[part]["compilations"] for turn in turns for part in parts]),
            "peak_mb": max(turn[part]["peak_mb"] for turn in turns for part in parts),
        }
        device = [turn[part]["peak_device_mb"] for turn in turns for part in parts if "peak_device_mb" in turn[part]]
        if device:
            figures["peak_device_mb"] = max(device)
        told = ("prefill_s", "scored_tokens", "drafts_accepted")
        figures |= {name: warmup["update"][name] for name in told if name in warmup["update"]}
        result[system] = figures
    return result


def _sum(counts: Sequence[int | None]) -> int | None:
    """None where nobody counts."""
    return None if None in counts else sum(counts)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join([_row(head), _row(["---"] * len(head)), *map(_row, rows)])


def race_table(figures: Mapping[str, Mapping[str, Any]], first: str) -> str:
    """Markdown table of a race; failed systems keep their row."""
    head = [
        "system", "rollout s", "tokens/s", f"{first} is faster by", "update s", f"{first} is faster by", "step s",
        f"{first} is faster by", "first step s", "recompilations", "tokens", "peak MB",
    ]  # fmt: skip
    rows = []
    for system, f in figures.items():
        if "failed" in f:
            rows.append([system, f"failed: {f['failed']}".replace("|", "/"), *[""] * (len(head) - 2)])
            continue
        show = lambda name, digits, f=f: Spread(**f[name]).show(digits)
        ratio = lambda part, f=f: Spread(**f["times_as_fast"][part]).show(2) if "times_as_fast" in f else ""
        peak = f"{f['peak_mb']:.0f}" + (f" + {f['peak_device_mb']:.0f}" if "peak_device_mb" in f else "")
        rows.append(
            [
                system, show("rollout_s", 2), show("tokens_per_s", 1), ratio("rollout"), show("update_s", 2),
                ratio("update"), show("step_s", 2), ratio("step"), f"{f['first_step_s']:.1f}",
                "-" if f["recompilations"] is None else str(f["recompilations"]), str(f["tokens"]), peak,
            ]
        )  # fmt: skip
    return _table(head, rows)


def floor_table(floors: Mapping[str, Mapping[str, float]], ours: Mapping[str, Any]) -> str:
    """Markdown table of floors beside what `ours` took; the floor is the longer of reading and multiplying."""
    rows = []
    rollout = ours["rollout_s"]["median"]
    taken = {"prefill": ours["prefill_s"], "decode": rollout - ours["prefill_s"], "update": ours["update_s"]["median"]}
    for part, f in floors.items():
        rows.append(
            [
                part, f"{f['bytes'] / 1e9:.2f}", f"{f['flops'] / 1e9:.1f}", f"{f['reading']:.3f}",
                f"{f['multiplying']:.3f}", f"{taken[part]:.3f}", f"{100 * f['seconds'] / taken[part]:.0f} %",
            ]
        )  # fmt: skip
    return _table(["part", "GB", "GFLOP", "reading s", "multiplying s", "ours s", "of the floor's speed"], rows)


def figures_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown table of records of the same fields: texts, numbers, and `Spread`s as dicts."""

    def show(value: str | float | Mapping[str, float]) -> str:
        if isinstance(value, Mapping):
            median, least, greatest = (f"{round(value[name], 4):.4g}" for name in ("median", "least", "greatest"))
            return f"{median} ({least}..{greatest})"
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    return _table(list(rows[0]), [[show(value) for value in row.values()] for row in rows])
