"""One step of the rewrite tool: read, propose, show, and write only when asked to."""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from srl_jax import rewrite_view, worktree
from srl_jax.proposals import Proposal, Request


@dataclasses.dataclass(frozen=True)
class Writing:
    """What may be done with the best proposal. `force`: also where git could not undo it."""

    apply: bool = False
    yes: bool = False  # without being asked
    force: bool = False
    json: bool = False  # print JSON for scripts


def take_step(root: Path, request: Request, propose: Callable[[Request], Sequence[Proposal]], writing: Writing) -> int:
    """Fills in `request` the files and the state of the directory and goes through with it; returns the exit code.

    0: there is a usable proposal, and where it was to be applied it is. 1: there is none, or it was declined. Raises
    `DirectoryError`, before anything is proposed, for a directory that cannot be read or must not be written.
    """
    files, state = worktree.read_directory(root), worktree.load_state(root)
    if writing.apply and not writing.force:
        worktree.check_writable(root)
    if writing.apply and not writing.yes and (writing.json or not sys.stdin.isatty()):
        raise worktree.DirectoryError("--apply asks on a terminal; add --yes to apply without being asked")
    proposals = propose(dataclasses.replace(request, files=files, state=state))
    usable = bool(proposals) and proposals[0].usable
    if not writing.json:
        rewrite_view.show(Console(), proposals)
    applied = None
    if usable and writing.apply and (writing.yes or _agreed()):
        applied = worktree.write_edits(root, files, {**files, **proposals[0].result.files_after})
        worktree.save_state(root, proposals[0].trace.state)
    if writing.json:
        print(rewrite_view.as_json(proposals, applied))
    else:
        nothing = "nothing" if writing.apply or not usable else "nothing (--apply writes the first)"
        print(f"written: {', '.join(applied or [nothing])}")
    return 0 if usable and (applied or not writing.apply) else 1


def _agreed() -> bool:
    try:
        return input("Apply this? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:  # the terminal was closed, or Ctrl-D
        return False
