"""Evaluate a run's base and student: `python launch/evaluate.py --workdir=runs/demo --split=test`.

Reads the run's own configuration and newest checkpoint; writes eval_*.json (teacher, floors, base, student) and
report.md with its plots and page.html into --out (default: the run's directory). The same command again goes on where
it was stopped. Exit code: 0 done, 2 a mistake in flags, data or run.
"""

from pathlib import Path

from absl import flags

from data_pipeline.load import DataError, read_sample, read_split, split_rules
from srl_jax import cli
from srl_jax.config import NotARun, read_config, validate
from srl_jax.floors import COMMON_TRACE_SAMPLE

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.")
_OUT = flags.DEFINE_string("out", None, "Where the evaluation goes; default: the run's directory.")
_DATA = flags.DEFINE_string("data", None, "Data set whose tasks are asked; default: the run's own.")
_SPLIT = flags.DEFINE_enum("split", None, ["test", "dev"], "Which held-out tasks; default: the run's own choice.")
_TASKS = flags.DEFINE_integer("max_tasks", None, "At most so many tasks; default: the run's own choice.")
_SAMPLES = flags.DEFINE_integer("samples", 8, "Answers sampled to each task, for pass@k; 0: none.", lower_bound=0)
_FREE = flags.DEFINE_integer("free", 4, "Answers sampled without the grammar; 0: none.", lower_bound=0)
_EPISODES = flags.DEFINE_integer("episodes", 32, "Episodes on one's own state; 0: none.", lower_bound=0)
_SEEN = flags.DEFINE_integer("seen", 32, "Training tasks, to compare seen rules with held-out ones.", lower_bound=0)
flags.mark_flag_as_required("workdir")


def main() -> int:
    workdir = Path(_WORKDIR.value)
    config = read_config(workdir)
    config.eval.split = _SPLIT.value or config.eval.split
    config.eval.max_tasks = config.eval.max_tasks if _TASKS.value is None else _TASKS.value
    validate(config)
    held_out = read_split(_DATA.value or config.data.dir, config.eval.split)
    corpus = read_sample(config.data.dir, "train", COMMON_TRACE_SAMPLE)
    rules = split_rules(config.data.dir, "train")

    from srl_jax.evaluate_run import evaluate_run  # the accelerator stack, only once everything else is right
    from srl_jax.passes import Passes

    passes = Passes(_SAMPLES.value, _FREE.value, _EPISODES.value, _SEEN.value)
    out = Path(_OUT.value or workdir)
    print(evaluate_run(config, workdir, out, held_out, corpus, passes=passes, training_rules=rules))
    return 0


if __name__ == "__main__":
    cli.run(main, DataError, NotARun)
