"""What a run really takes of a device: arrays held, and the high-water mark of a step. `memory.py` predicts the same.

On an accelerator its runtime's statistics are read. On a CPU the arrays live in this process, so its resident set is:
the kernel keeps a high-water mark (VmHWM) and lets it be reset.
"""

import dataclasses
import gc
from pathlib import Path

import jax
import numpy as np

from srl_jax.config import TrainConfig
from srl_jax.memory import Plan, device_bytes, lower
from srl_jax.student import load_student


@dataclasses.dataclass(frozen=True)
class Measured:
    """Bytes of the first device."""

    held: int  # base weights, adapters, optimiser and grammar, as the sum of the real buffers
    resident: int  # by how much making them raised the memory in use
    programs: dict[str, int]  # the mark's height above what was in use before each program

    def table(self) -> str:
        """One line for each part, in MiB."""
        parts = {"arrays held": self.held, "memory they took": self.resident}
        parts |= {f"while in {name}": size for name, size in self.programs.items()}
        return "\n".join(["measured, MiB", *(f"  {name:<24}{size / 2**20:>12,.1f}" for name, size in parts.items())])


def row(config: TrainConfig, plan: Plan, measured: Measured | None) -> str:
    """A row of reports/memory.md, in MiB: predicted arrays and programs, and in brackets what was measured."""
    precision = config.model.quantize if config.model.quantize != "none" else config.model.dtype
    context = config.data.max_prompt_tokens + config.sampling.max_new_tokens
    mib = lambda size: f"{size / 2**20:,.0f}"
    cells = [config.model.source.removeprefix("random:"), precision, f"{context:,}", mib(plan.resident["base weights"])]
    arrays = mib(sum(plan.resident.values()))
    cells.append(f"{arrays} [{mib(measured.resident)}]" if measured else arrays)
    for name, size in plan.programs.items():
        known = measured is not None and name in measured.programs
        cells.append(f"{mib(size)} [{mib(measured.programs[name])}]" if known else mib(size))
    return f"| {' | '.join([*cells, mib(plan.peak)])} |"


class _Meter:
    """Memory in use, and its peak since `reset`."""

    def __init__(self) -> None:
        self._device = jax.local_devices()[0]
        self._has_statistics = "peak_bytes_in_use" in (self._device.memory_stats() or {})

    def _read(self, statistic: str, status: str) -> int:
        if self._has_statistics:
            return self._device.memory_stats()[statistic]
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(status))
        return int(line.split()[1]) * 1024

    def in_use(self) -> int:
        gc.collect()
        return self._read("bytes_in_use", "VmRSS:")

    def peak(self) -> int:
        return self._read("peak_bytes_in_use", "VmHWM:")

    def reset(self) -> None:
        """On an accelerator the peak cannot be reset: it is that of the process, so run the greatest program last."""
        if not self._has_statistics:
            Path("/proc/self/clear_refs").write_text("5")


def measure(config: TrainConfig) -> Measured:
    """Makes a run's arrays and runs reference pass and update once, on zeros for a batch; both compiled beforehand.

    Raises what `memory.lower` and `load_student` raise.
    """
    planned = lower(config)
    compiled = {"reference": planned.reference.compile(), "update": planned.update.compile()}
    meter = _Meter()
    before = meter.in_use()
    student = load_student(config, planned.student.mesh)
    zeros = lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding)
    state = jax.block_until_ready(jax.tree.map(zeros, planned.state))
    held = device_bytes((student.params, state.lora, state.opt_state, student.automaton))
    resident = meter.in_use() - before
    batch = jax.block_until_ready(jax.tree.map(zeros, planned.batch))
    arguments = {
        "reference": (student.params, student.automaton, batch),
        "update": (state, student.params, student.automaton, batch),
    }
    del state  # the update is given it to overwrite
    heights = {}
    for name, program in compiled.items():
        base = meter.in_use()
        meter.reset()
        jax.block_until_ready(program(*arguments.pop(name)))
        heights[name] = meter.peak() - base
    return Measured(held, resident, heights)
