"""Rewrite code: `python launch/rewrite.py --workdir=runs/demo --directory=. --instruction='Call `new`, not `old`'`.

Shows what a run's newest checkpoint (or --model, an export; or --teacher, an endpoint) proposes, executed and ranked;
none is usable without a name that the instruction marks by backquotes. Writes only with --apply, only in --directory.
Exit code: 0 a usable proposal (with --apply: applied), 1 none or declined, 2 a mistake.
"""

from pathlib import Path

from absl import flags

from data_pipeline.errors import DataError
from srl_jax import cli, worktree
from srl_jax.config import NotARun, read_config
from srl_jax.proposals import Proposal, Request
from srl_jax.rewrite_step import Writing, take_step
from srl_jax.trace import LANGUAGES

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run whose student is used.")
_MODEL = flags.DEFINE_string("model", None, "Directory that launch/export.py wrote, instead of a run.")
_TEACHER = flags.DEFINE_string("teacher", None, "A teacher.yaml whose endpoint is asked, instead of a student.")
_DIRECTORY = flags.DEFINE_string("directory", None, "The code to rewrite.")
_INSTRUCTION = flags.DEFINE_string("instruction", None, "What to do, in words.")
_LANGUAGE = flags.DEFINE_enum("language", None, list(LANGUAGES), "Look at files of this language only.")
_TESTS = flags.DEFINE_enum("tests", None, ["unittest", "pytest", "node"], "Run the directory's tests with this runner.")
_TEST_SECONDS = flags.DEFINE_float("test_seconds", 30.0, "What one run of the tests may take.", lower_bound=1.0)
_PLACES = flags.DEFINE_integer("places", 1, "Files to consider, one prompt each.", lower_bound=1, upper_bound=16)
_CANDIDATES = flags.DEFINE_integer("candidates", 8, "Answers to each prompt.", lower_bound=1, upper_bound=64)
_SEED = flags.DEFINE_integer("seed", 0, "Of the sampled answers; the first one is greedy.", lower_bound=0)
_APPLY = flags.DEFINE_bool("apply", False, "Write the best proposal, after asking.")
_YES = flags.DEFINE_bool("yes", False, "With --apply: do not ask.")
_FORCE = flags.DEFINE_bool("force", False, "With --apply: also where git could not undo it.")
_JSON = flags.DEFINE_bool("json", False, "Print JSON for scripts.")
flags.mark_flags_as_required(["directory", "instruction"])
flags.mark_flags_as_mutual_exclusive(["workdir", "model", "teacher"], required=True)


def main() -> int:
    languages = (_LANGUAGE.value,) if _LANGUAGE.value else ()
    options = {"places": _PLACES.value, "candidates": _CANDIDATES.value, "seed": _SEED.value}
    options["test_seconds"] = _TEST_SECONDS.value
    request = Request(_INSTRUCTION.value, {}, None, languages, _TESTS.value, **options)
    writing = Writing(_APPLY.value, _YES.value, _FORCE.value, _JSON.value)
    return take_step(Path(_DIRECTORY.value), request, _propose, writing)


def _propose(request: Request) -> list[Proposal]:
    if _TEACHER.value:
        from data_pipeline import propose as teacher  # an endpoint's client takes a second to import

        return teacher.propose(Path(_TEACHER.value), request)
    config = read_config(Path(_WORKDIR.value)) if _WORKDIR.value else None
    from srl_jax import rewrite  # the accelerator stack, only once everything else is right

    return rewrite.propose(config, Path(_WORKDIR.value or _MODEL.value), request)


if __name__ == "__main__":
    cli.run(main, worktree.DirectoryError, NotARun, DataError)
