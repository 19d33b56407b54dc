"""Evaluate a run's base and student: `python launch/evaluate.py --workdir=runs/demo --split=test`.

Reads the run's own configuration and newest checkpoint; writes eval_*.json (teacher, floors, base, student) and
report.md with its plots and page.html into --out (default: the run's directory).
Exit code: 0 done, 2 a mistake in flags, data or run.
"""

from pathlib import Path

from absl import flags

from data_pipeline.load import DataError, read_sample, read_split
from srl_jax import cli
from srl_jax.config import NotARun, read_config, validate
from srl_jax.floors import COMMON_TRACE_SAMPLE

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.")
_OUT = flags.DEFINE_string("out", None, "Where the evaluation goes; default: the run's directory.")
_SPLIT = flags.DEFINE_enum("split", None, ["test", "dev"], "Which held-out tasks; default: the run's own choice.")
_TASKS = flags.DEFINE_integer("max_tasks", None, "At most so many tasks; default: the run's own choice.")
flags.mark_flag_as_required("workdir")


def main() -> int:
    workdir = Path(_WORKDIR.value)
    config = read_config(workdir)
    config.eval.split = _SPLIT.value or config.eval.split
    config.eval.max_tasks = config.eval.max_tasks if _TASKS.value is None else _TASKS.value
    validate(config)
    held_out = read_split(config.data.dir, config.eval.split)

    corpus = read_sample(config.data.dir, "train", COMMON_TRACE_SAMPLE)

    from srl_jax.evaluate import evaluate_run  # the accelerator stack, only once everything else is right

    print(evaluate_run(config, workdir, Path(_OUT.value or workdir), held_out, corpus))
    return 0


if __name__ == "__main__":
    cli.run(main, DataError, NotARun)
