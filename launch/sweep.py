"""Train every cell of a sweep: `python launch/sweep.py --config=configs/sweep_ablations.py --out=runs/ablations`.

With `--seeds=0 --override=steps=10 --override=eval.max_tasks=24` it is a smaller one. The same command again goes on
where it was; cells that failed are tried again and until then shown as failed in <out>/sweep.md. Exit code: 0 every
cell is done, 1 some failed, 2 a mistake in flags or sweep, 3 stopped by a signal.
"""

import sys
from pathlib import Path

from absl import flags

from srl_jax import cli
from srl_jax.report import ReportError
from srl_jax.sweep import SweepError, load_recipe, plan, run_jobs
from srl_jax.sweep_report import write_sweep_report

_CONFIG = flags.DEFINE_string("config", None, "Sweep: a file in configs/ whose get_config() returns a Sweep.")
_OUT = flags.DEFINE_string("out", None, "Where the cells' runs and the table go.")
_SEEDS = flags.DEFINE_list("seeds", [], "Seeds to train under instead of the sweep's own, such as 0,1.")
_CELLS = flags.DEFINE_list("cells", [], "Cells to train instead of all, the first as the reference, such as srl,sft.")
_OVERRIDES = flags.DEFINE_multi_string("override", [], "field=value in every cell, such as steps=10; may be repeated.")
_PARALLEL = flags.DEFINE_integer("parallel", 1, "Runs at a time.", lower_bound=1, upper_bound=64)
_DEVICES = flags.DEFINE_list(
    "devices", [], "GPUs (CUDA_VISIBLE_DEVICES values), one a run in turn; default: all of them."
)
_REPORT_ONLY = flags.DEFINE_bool("report_only", False, "Train nothing, write the table of what there is.")
flags.register_validator("seeds", lambda given: all(one.isdecimal() for one in given), "seeds are whole numbers")
flags.mark_flags_as_required(["config", "out"])


def main() -> int:
    out = Path(_OUT.value)
    sweep, seeds = load_recipe(Path(_CONFIG.value)), [int(seed) for seed in _SEEDS.value]
    jobs = plan(sweep, out, seeds, _OVERRIDES.value, cells=_CELLS.value)
    out.mkdir(parents=True, exist_ok=True)
    finished = True
    if not _REPORT_ONLY.value:
        command = [sys.executable, str(Path(__file__).with_name("train.py"))]
        finished = run_jobs(jobs, command, parallel=_PARALLEL.value, devices=_DEVICES.value, note=_note)
    print(f"table: {write_sweep_report(jobs, out)}")
    if not finished:
        return 3
    return 0 if all(job.status["state"] == "done" for job in jobs) else 1


def _note(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    cli.run(main, SweepError, ReportError)
