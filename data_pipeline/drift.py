"""Where steps are lost: counts by slice, teacher and reason, and what changed since the run before.

A new pattern of errors means that a teacher, its server or a source of tasks has changed; the answer to it is another
prompt or another source, never a laxer validator.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# A share must move by so much, and so surely, all comparisons of a run together, before it is called drift.
MIN_CHANGE = 0.02
SIGNIFICANCE = 0.01


class Tally:
    """How many steps were judged and why they were dropped, by (slice, teacher)."""

    def __init__(self) -> None:
        self._judged: Counter[tuple[str, str]] = Counter()
        self._dropped: Counter[tuple[str, str, str]] = Counter()

    def add(self, slice_name: str, teacher: str, reason: str | None) -> None:
        """Counts one step; `reason` is None for a step that was kept."""
        self._judged[slice_name, teacher] += 1
        if reason is not None:
            self._dropped[slice_name, teacher, reason] += 1

    @property
    def judged(self) -> int:
        return sum(self._judged.values())

    @property
    def kept(self) -> int:
        return self.judged - sum(self._dropped.values())

    def groups(self) -> dict[str, tuple[int, Counter[str]]]:
        """ "slice <name>" and "teacher <name>" -> (steps judged, reason -> dropped)."""
        found: dict[str, tuple[int, Counter[str]]] = {}
        for (slice_name, teacher), judged in sorted(self._judged.items()):
            for name in (f"slice {slice_name}", f"teacher {teacher}"):
                total, reasons = found.get(name, (0, Counter()))
                found[name] = total + judged, reasons
        for (slice_name, teacher, reason), dropped in sorted(self._dropped.items()):
            for name in (f"slice {slice_name}", f"teacher {teacher}"):
                found[name][1][reason] += dropped
        return dict(sorted(found.items()))

    def to_list(self) -> list[dict[str, Any]]:
        """Plain JSON data, in a fixed order; `from_list` is the inverse."""
        rows = []
        for (slice_name, teacher), judged in sorted(self._judged.items()):
            reasons = {
                reason: count
                for (where, who, reason), count in sorted(self._dropped.items())
                if (where, who) == (slice_name, teacher)
            }
            rows.append({"slice": slice_name, "teacher": teacher, "judged": judged, "dropped": reasons})
        return rows

    @classmethod
    def from_list(cls, rows: list[Mapping[str, Any]]) -> "Tally":
        tally = cls()
        for row in rows:
            tally._judged[row["slice"], row["teacher"]] += row["judged"]
            for reason, count in row["dropped"].items():
                tally._dropped[row["slice"], row["teacher"], reason] += count
        return tally


@dataclass(frozen=True)
class Drift:
    """A reason whose share among the steps of a slice or a teacher has moved."""

    where: str
    reason: str
    before: float
    after: float

    def __str__(self) -> str:
        verb = "rose" if self.after > self.before else "fell"
        return f"drift: {self.where}: {self.reason} {verb} from {self.before:.1%} to {self.after:.1%} of its steps"


def compare(before: Tally, after: Tally) -> list[Drift]:
    """What has moved between two runs, the largest change first; only what both have judged is compared.

    A change counts when its share moved by `MIN_CHANGE` or more and Fisher's exact test gives it less than
    `SIGNIFICANCE` divided by the number of comparisons (Bonferroni).
    """
    from scipy.stats import fisher_exact  # here: it takes a second, and most builds have nothing to compare with

    old, new = before.groups(), after.groups()
    pairs = [
        (where, reason)
        for where in sorted(old.keys() & new.keys())
        for reason in sorted(old[where][1].keys() | new[where][1].keys())
    ]
    found = []
    for where, reason in pairs:
        (judged_then, dropped_then), (judged_now, dropped_now) = old[where], new[where]
        then, now = dropped_then[reason], dropped_now[reason]
        drift = Drift(where, reason, then / judged_then, now / judged_now)
        if abs(drift.after - drift.before) < MIN_CHANGE:
            continue
        table = [[then, judged_then - then], [now, judged_now - now]]
        if fisher_exact(table).pvalue < SIGNIFICANCE / len(pairs):
            found.append(drift)
    return sorted(found, key=lambda drift: (-abs(drift.after - drift.before), drift.where, drift.reason))


def report(tally: Tally) -> list[str]:
    """Lines for a terminal or a report: every slice and teacher with its reasons, the most frequent first."""
    lines = [f"{tally.kept} of {tally.judged} steps kept"]
    for where, (judged, reasons) in tally.groups().items():
        lines.append(f"{where}: {judged - reasons.total()} of {judged} kept")
        for reason, count in sorted(reasons.items(), key=lambda item: (-item[1], item[0])):
            lines.append(f"  {count:6d}  {count / judged:6.1%}  {reason}")
    return lines
