"""What a run takes of each device: `python launch/profile_step.py --config=configs/smollm2_cpu.py --dry_run`.

--dry_run prints, before anything runs and without reading a weight, what the arrays and each compiled step take of a
device, and refuses (exit code 2) what cannot fit. For a machine that is not at hand give --devices and --device_gib;
the steps are then compiled for this CPU, and another compiler's temporaries differ. --measure makes the arrays, runs
the reference pass and one update, and prints what they took beside it. --row prints a row of reports/memory.md.
"""

import os

from absl import flags
from ml_collections import config_flags

from srl_jax import cli
from srl_jax.config import ConfigError

_CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe: a file in configs/ with get_config().")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Predict memory.")
_MEASURE = flags.DEFINE_bool("measure", False, "Measure it too, by running a step.")
_ROW = flags.DEFINE_bool("row", False, "Print Markdown instead, and refuse nothing.")
_DEVICES = flags.DEFINE_integer("devices", None, "Pretend to have so many devices (CPU only).", lower_bound=1)
_GIB = flags.DEFINE_float("device_gib", None, "Memory of one device in GiB; default: what is here.", lower_bound=0)
flags.mark_flags_as_required(["config"])


def main() -> int:
    if not (_DRY_RUN.value or _MEASURE.value):
        raise ConfigError("", "profile_step", "give --dry_run, --measure or both")
    if _DEVICES.value:
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ["XLA_FLAGS"] = (
            f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={_DEVICES.value}"
        )

    from srl_jax import memory, memory_measure  # the accelerator stack, only once flags and environment are right

    plan = memory.plan(_CONFIG.value, None if _GIB.value is None else int(_GIB.value * 2**30))
    if not _ROW.value:
        print(plan.table())
        plan.check()
    measured = memory_measure.measure(_CONFIG.value) if _MEASURE.value else None
    if _ROW.value:
        print(memory_measure.row(_CONFIG.value, plan, measured))
    elif measured:
        print(measured.table())
    return 0


if __name__ == "__main__":
    cli.run(main)
