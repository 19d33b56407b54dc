"""Writes trl_losses.npz: losses and gradients of TRL's own `GRPOTrainer._compute_loss` on small random arrays.

TRL is no dependency of this project. To regenerate:

    python -m venv /tmp/trlvenv && /tmp/trlvenv/bin/pip install torch==2.13.0 trl==1.16.0
    /tmp/trlvenv/bin/python tests/golden/make_trl_losses.py

The trainer's method runs unchanged on an instance that skipped `__init__` (no model, no data): only the forward
pass is replaced, by leaf tensors whose gradients are then read. Arrays are drawn in fp32 and computed in fp64.
"""

from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import trl
from trl.trainer.grpo_trainer import GRPOTrainer

ROWS, TOKENS, MAX_LENGTH = 6, 7, 12
CLIP_LOW, CLIP_HIGH, BETA, ENTROPY_COEF = 0.2, 0.28, 0.3, 0.05
INPUTS = ("logprobs", "old_logprobs", "ref_logprobs", "sampler_ratio", "entropy", "advantages", "mask")


def draw_inputs() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(20251)
    old = -rng.exponential(1.5, (ROWS, TOKENS))
    lengths = np.array([7, 5, 3, 1, 6, 2])
    return {
        # Ratios spread far beyond both clip bounds, so that every branch of min and clip is taken.
        "logprobs": (old + rng.normal(0, 0.4, old.shape)).astype(np.float32),
        "old_logprobs": old.astype(np.float32),
        "ref_logprobs": (old + rng.normal(0, 0.7, old.shape)).astype(np.float32),
        "sampler_ratio": rng.uniform(0.3, 2.0, old.shape).astype(np.float32),
        "entropy": rng.exponential(1.0, old.shape).astype(np.float32),
        "advantages": rng.normal(0, 1, ROWS).astype(np.float32),
        "mask": (np.arange(TOKENS)[None, :] < lengths[:, None]).astype(np.int32),
    }


class _Trainer(GRPOTrainer):
    """TRL's loss without TRL's model: what `_compute_loss` reads, as an instance's attributes."""

    def __init__(
        self,
        logprobs,
        entropy,
        *,
        loss_type,
        level="token",
        beta=0.0,
        unbiased_kl=False,
        weights=False,
        entropy_bonus=False,
        accumulation=1,
    ):
        self._forward = (logprobs, entropy, None)
        self.loss_type, self.importance_sampling_level, self.beta = loss_type, level, beta
        self.epsilon_low, self.epsilon_high = CLIP_LOW, CLIP_HIGH
        self.max_completion_length = MAX_LENGTH
        self.args = SimpleNamespace(use_bias_correction_kl=unbiased_kl, delta=None, steps_per_generation=accumulation)
        self.model = SimpleNamespace(training=True)
        self.accelerator = SimpleNamespace(
            num_processes=1, sync_gradients=True, gather=lambda x: x, reduce=lambda x, reduction: x
        )
        self.current_gradient_accumulation_steps = accumulation
        self.use_vllm = self.vllm_importance_sampling_correction = weights
        self.top_entropy_quantile, self.off_policy_mask_threshold, self.aux_loss_enabled = 1.0, None, False
        self._entropy_bonus_enabled, self.use_adaptive_entropy = entropy_bonus, False
        self.entropy_coef = ENTROPY_COEF
        self._metrics = {"train": defaultdict(list)}

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        return self._forward


CASES = {
    "grpo": {"loss_type": "grpo"},
    "dapo": {"loss_type": "dapo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "gspo": {"loss_type": "grpo", "level": "sequence"},
    "grpo_k3": {"loss_type": "grpo", "beta": BETA},
    "dapo_k3_unbiased": {"loss_type": "dapo", "beta": BETA, "unbiased_kl": True},
    "dapo_weights": {"loss_type": "dapo", "weights": True},
    "dapo_entropy": {"loss_type": "dapo", "entropy_bonus": True},
    "dapo_accumulated": {"loss_type": "dapo", "accumulation": 3},
}


def run_case(inputs: dict[str, np.ndarray], *, accumulation: int = 1, **settings) -> dict[str, np.ndarray]:
    tensors = {name: torch.tensor(inputs[name].astype(np.float64)) for name in INPUTS}
    logprobs, entropy = (tensors[name].requires_grad_() for name in ("logprobs", "entropy"))
    total, metrics = 0.0, None
    for rows in torch.arange(ROWS).chunk(accumulation):
        trainer = _Trainer(logprobs[rows], entropy[rows], accumulation=accumulation, **settings)
        batch = {
            "prompt_ids": torch.zeros(len(rows), 1),
            "prompt_mask": torch.ones(len(rows), 1),
            "completion_ids": torch.zeros(len(rows), TOKENS),
            "completion_mask": tensors["mask"][rows],
            "advantages": tensors["advantages"][rows],
            "old_per_token_logps": tensors["old_logprobs"][rows],
            "ref_per_token_logps": tensors["ref_logprobs"][rows],
            "importance_sampling_ratio": tensors["sampler_ratio"][rows],
            "num_items_in_batch": tensors["mask"].sum(),
        }
        loss = trainer._compute_loss(None, batch)
        loss.backward()
        total, metrics = total + loss.item(), trainer._metrics["train"]
    arrays = {
        "loss": np.float64(total),
        "d_logprobs": logprobs.grad.numpy(),
        "d_entropy": np.zeros((ROWS, TOKENS)) if entropy.grad is None else entropy.grad.numpy(),
    }
    if accumulation == 1:  # TRL logs clip shares per micro-batch
        arrays["clip_low"] = np.float64(metrics["clip_ratio/low_mean"][0])
        arrays["clip_high"] = np.float64(metrics["clip_ratio/high_mean"][0])
    return arrays


def main() -> None:
    inputs = draw_inputs()
    arrays = {f"inputs/{name}": value for name, value in inputs.items()}
    for case, settings in CASES.items():
        arrays |= {f"{case}/{name}": value for name, value in run_case(inputs, **settings).items()}
    arrays["settings"] = np.array([CLIP_LOW, CLIP_HIGH, BETA, ENTROPY_COEF, MAX_LENGTH])
    arrays["versions"] = np.array([f"trl {trl.__version__}", f"torch {torch.__version__}"])
    np.savez_compressed(Path(__file__).with_name("trl_losses.npz"), **arrays)


if __name__ == "__main__":
    main()
