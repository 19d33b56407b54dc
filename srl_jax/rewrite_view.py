"""Proposals on a terminal: the action, its matches, a coloured diff. Model and repository text cannot steer it."""

import json
from collections.abc import Sequence

from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from srl_jax.proposals import Proposal
from srl_jax.trace import render_action, render_state

_SHOWN = 60  # characters of a pattern in the table; the first proposal follows in full


def printable(text: str) -> str:
    """`text` with every control character but tab and newline shown as an escape, so that none reaches a terminal."""
    return "".join(c if c.isprintable() or c in "\t\n" else c.encode("unicode_escape").decode() for c in text)


def show(console: Console, proposals: Sequence[Proposal]) -> None:
    """The ranking as a table, then the first proposal in full."""
    table = Table("", "matches", "status", "tests", "log-prob", "pattern", "replacement", title="Proposals")
    for number, proposal in enumerate(proposals, start=1):
        action, result = proposal.trace.action, proposal.result
        table.add_row(
            f"{number}{' *' if proposal.usable else ''}",
            str(sum(result.matches.values())),
            result.status.value if proposal.on_topic else f"{result.status.value}, off topic",
            _tests(proposal),
            "-" if proposal.logprob is None else f"{proposal.logprob:.3f}",
            Text(_short(action.pattern)),
            Text(_short(action.replacement)),
        )
    if not proposals:
        console.print("No answer was a trace, so there is nothing to execute.")
        return
    console.print(table)
    best = proposals[0]
    console.print(Text(printable(best.trace.think)), style="italic")
    console.print(Text(printable(render_action(best.trace.action))))
    for path, count in sorted(best.result.matches.items()):
        console.print(Text(f"{printable(path)}: {count} match{'' if count == 1 else 'es'}"))
    if best.result.diff:
        console.print(Syntax(printable(best.result.diff), "diff", background_color="default", word_wrap=True))
    else:
        console.print(Text(f"{best.result.status.value}: {printable(best.result.detail)}"), style="yellow")
    if not best.on_topic:
        console.print("edits none of the names that the instruction marks", style="red")
    for test in best.broken_tests:
        console.print(Text(f"breaks {printable(test)}"), style="red")
    console.print(Text(f"state after it: {printable(render_state(best.trace.state))}"), style="dim")


def as_json(proposals: Sequence[Proposal], applied: Sequence[str] | None) -> str:
    """For scripts: proposals, best first, and the files written (null: nothing was applied)."""
    value = {"proposals": [proposal.to_dict() for proposal in proposals], "applied": applied}
    return json.dumps(value, ensure_ascii=False, indent=1)


def _short(text: str) -> str:
    shown = printable(" ".join(text.split()))
    return shown if len(shown) <= _SHOWN else shown[: _SHOWN - 1] + "…"


def _tests(proposal: Proposal) -> str:
    if proposal.tests is None:
        return "not run"
    if proposal.broken_tests:
        return f"breaks {len(proposal.broken_tests)}"
    return f"{len(proposal.tests.passed)} pass" if proposal.tests.ended == "finished" else proposal.tests.ended
