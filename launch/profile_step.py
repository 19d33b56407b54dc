"""Where a step's time goes: `python launch/profile_step.py --config=configs/smollm2_cpu.py --out=runs/profile`.

Runs --steps real steps and prints what prefill, decode, reward wait, log-probs, forward, backward, optimiser,
collectives and the host took of them; the trace for xprof lies in --out.

--dry_run runs nothing: it prints, without reading a weight, what the arrays and each compiled step take of a device,
and refuses (exit code 2) what cannot fit. For a machine that is not at hand give --devices and --device_gib; the steps
are then compiled for this CPU, and another compiler's temporaries differ. --measure makes the arrays, runs the
reference pass and one update, and prints what they took beside it. --row prints a row of reports/memory.md.
"""

import os
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from data_pipeline.load import DataError, make_stream
from srl_jax import cli

_CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe: a file in configs/ with get_config().")
_OUT = flags.DEFINE_string("out", "runs/profile", "Where the trace and the run's files go.")
_STEPS = flags.DEFINE_integer("steps", 3, "Steps to time, after one that compiles.", lower_bound=1)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Predict memory.")
_MEASURE = flags.DEFINE_bool("measure", False, "Measure it too, by running a step.")
_ROW = flags.DEFINE_bool("row", False, "Print Markdown instead, and refuse nothing.")
_DEVICES = flags.DEFINE_integer("devices", None, "Pretend to have so many devices (CPU only).", lower_bound=1)
_GIB = flags.DEFINE_float("device_gib", None, "Memory of one device in GiB; default: what is here.", lower_bound=0)
flags.mark_flags_as_required(["config"])


def main() -> None:
    config, out = _CONFIG.value, Path(_OUT.value)
    if _DEVICES.value:
        os.environ["JAX_PLATFORMS"] = "cpu"
        count = f"--xla_force_host_platform_device_count={_DEVICES.value}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {count}"
    if not (_DRY_RUN.value or _MEASURE.value or _ROW.value):
        stream = make_stream(config.data.dir, "train", seed=config.seed)
        from srl_jax.step_profile import profile  # the accelerator stack, only once everything else is right

        print(profile(config, stream, out, _STEPS.value).table())
        return
    from srl_jax import memory, memory_measure

    plan = memory.plan(config, None if _GIB.value is None else int(_GIB.value * 2**30))
    if not _ROW.value:
        print(plan.table())
        plan.check()
    measured = memory_measure.measure(config) if _MEASURE.value else None
    if _ROW.value:
        print(memory_measure.row(config, plan, measured))
    elif measured:
        print(measured.table())


if __name__ == "__main__":
    cli.run(main, DataError)
