"""Rewrite code: `python launch/rewrite.py --workdir=runs/demo --directory=. --instruction="Use log.info, not print"`.

Shows the newest checkpoint's proposals, executed in the sandbox and ranked; writes nothing without --apply, and nothing
outside --directory ever. Exit code: 0 a usable proposal (with --apply: applied), 1 none or declined, 2 a mistake.
"""

import sys
from pathlib import Path

from absl import flags
from rich.console import Console

from srl_jax import cli, worktree
from srl_jax.config import NotARun, read_config
from srl_jax.trace import LANGUAGES

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run whose student is used.")
_DIRECTORY = flags.DEFINE_string("directory", None, "The code to rewrite.")
_INSTRUCTION = flags.DEFINE_string("instruction", None, "What to do, in words.")
_LANGUAGE = flags.DEFINE_enum("language", None, list(LANGUAGES), "Look at files of this language only.")
_TESTS = flags.DEFINE_enum("tests", None, ["unittest", "pytest", "node"], "Run the directory's tests with this runner.")
_PLACES = flags.DEFINE_integer("places", 1, "Files to consider, one prompt each.", lower_bound=1, upper_bound=16)
_CANDIDATES = flags.DEFINE_integer("candidates", 8, "Answers to each prompt.", lower_bound=1, upper_bound=64)
_SEED = flags.DEFINE_integer("seed", 0, "Of the sampled answers; the first one is greedy.", lower_bound=0)
_APPLY = flags.DEFINE_bool("apply", False, "Write the best proposal, after asking.")
_YES = flags.DEFINE_bool("yes", False, "With --apply: do not ask.")
_FORCE = flags.DEFINE_bool("force", False, "With --apply: also where git could not undo it.")
_JSON = flags.DEFINE_bool("json", False, "Print JSON for scripts.")
flags.mark_flags_as_required(["workdir", "directory", "instruction"])


def main() -> int:
    root, workdir = Path(_DIRECTORY.value), Path(_WORKDIR.value)
    config = read_config(workdir)
    if _APPLY.value and not _FORCE.value:
        worktree.check_writable(root)
    if _APPLY.value and not _YES.value and (_JSON.value or not sys.stdin.isatty()):
        raise worktree.DirectoryError("--apply asks on a terminal; add --yes to apply without being asked")
    files, state = worktree.read_directory(root), worktree.load_state(root)

    from srl_jax import rewrite, rewrite_view  # the accelerator stack, only once everything else is right

    languages = (_LANGUAGE.value,) if _LANGUAGE.value else ()
    options = {"places": _PLACES.value, "candidates": _CANDIDATES.value, "seed": _SEED.value}
    request = rewrite.Request(_INSTRUCTION.value, files, state, languages, _TESTS.value, **options)
    proposals = rewrite.propose(config, workdir, request)
    usable = bool(proposals) and proposals[0].usable
    if not _JSON.value:
        rewrite_view.show(Console(), proposals)
    applied = None
    if usable and _APPLY.value and (_YES.value or input("Apply this? [y/N] ").strip().lower() in ("y", "yes")):
        applied = worktree.write_edits(root, files, {**files, **proposals[0].result.files_after})
        worktree.save_state(root, proposals[0].trace.state)
    print(rewrite_view.as_json(proposals, applied) if _JSON.value else f"written: {', '.join(applied or ['nothing'])}")
    return 0 if usable and (applied or not _APPLY.value) else 1


if __name__ == "__main__":
    cli.run(main, worktree.DirectoryError, NotARun)
