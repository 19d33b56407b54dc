"""What a step costs in floating-point operations, counted from shapes, and how fast that was.

`compiled.cost_analysis()` counts a loop's body once, so it cannot be asked. Counted is what the algorithm needs:
2 operations for each weight and token forward, 2 more for LoRA's backward pass (a frozen base has no weight gradients),
and attention. Recomputation (`model.remat`) is no use, so it is not counted.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from srl_jax import hosts
from srl_jax.student import Student
from srl_jax.train_step import TrainBatch

# Dense bfloat16 operations a second of one device, as their makers give them; `device_kind` contains the name.
_PEAKS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "RTX 5090": 209.5e12,
    "RTX 4090": 165.2e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v4": 275e12,
    "TPU v6 lite": 918e12,
}


@dataclass
class Positions:
    """Tokens a pass computes and the pairs of positions its attention compares."""

    tokens: float = 0.0
    heads: float = 0.0  # of these, those that need logits
    pairs: float = 0.0

    def __add__(self, other: "Positions") -> "Positions":
        return Positions(self.tokens + other.tokens, self.heads + other.heads, self.pairs + other.pairs)

    def __mul__(self, times: float) -> "Positions":
        return Positions(self.tokens * times, self.heads * times, self.pairs * times)

    __rmul__ = __mul__


@dataclass
class Work:
    """One step's passes: sampling (prompts and tokens), scoring under fixed weights, and training."""

    sampled: Positions = field(default_factory=Positions)
    scored: Positions = field(default_factory=Positions)
    trained: Positions = field(default_factory=Positions)


def sampled_positions(arrays: Mapping[str, np.ndarray]) -> Positions:
    """Of groups of completions, each prompt computed once for its group, or for each where `prompt_lengths` is [P, G];
    padding is no work.
    """
    prompts = np.asarray(arrays["prompt_lengths"], np.float64)
    lengths = np.asarray(arrays["mask"]).sum(-1).astype(np.float64)
    pairs = (prompts**2 / 2).sum() + (lengths * prompts.reshape(len(lengths), -1) + lengths**2 / 2).sum()
    return Positions(prompts.sum() + lengths.sum(), lengths.sum(), pairs)


def positions(batch: TrainBatch) -> Positions:
    """The same of a batch: what its empty mask leaves out is no work either."""
    mask, prompts = hosts.gather((batch.completion_mask, batch.prompt_lengths))
    lengths = np.where(mask.any(axis=(1, 2)), prompts, 0)
    return sampled_positions({"prompt_lengths": lengths, "mask": mask})


def forward_flops(student: Student, work: Positions) -> float:
    """Operations of one forward pass."""
    c = student.decoder.config
    heads = (2 * c.n_heads + 2 * c.n_kv_heads) * c.head_dim  # query and output, key and value
    kernels = c.n_layers * c.d_model * (heads + 3 * c.d_ff)
    attention = 4.0 * c.n_layers * c.n_heads * c.head_dim  # scores and weighted values, for each pair
    return 2.0 * kernels * work.tokens + 2.0 * c.vocab_size * c.d_model * work.heads + attention * work.pairs


def speed(student: Student, work: Work, seconds: float) -> dict[str, float | None]:
    """`model_tflops`: useful operations a second, in 10^12, over all devices; `mfu`: their share of the devices' peak.

    `mfu` is None for a device whose peak is not known here, such as any CPU.
    """
    done = forward_flops(student, work.sampled) + forward_flops(student, work.scored)
    done += 2.0 * forward_flops(student, work.trained)
    rate = done / max(seconds, 1e-9)
    devices = student.mesh.devices.flatten()
    peak = next((value for name, value in _PEAKS.items() if name in devices[0].device_kind), None)
    return {"model_tflops": rate / 1e12, "mfu": None if peak is None else rate / (peak * len(devices))}
