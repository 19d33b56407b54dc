"""What is timed: shapes and prompts, the same for every system. No JAX here, so that torch peers carry none."""

import dataclasses
from pathlib import Path

import numpy as np

from srl_jax.tokenizer import load_tokenizer


@dataclasses.dataclass(frozen=True)
class Workload:
    """P prompts of exactly `prompt_tokens` tokens, G completions each of exactly `new_tokens`.

    `model` is `smollm2` (real weights) or a key of `shapes.SHAPES` (random weights of the true shape). LoRA on every
    linear layer, alpha = rank.
    """

    name: str
    prompts: int
    group_size: int
    prompt_tokens: int
    new_tokens: int
    model: str = "smollm2"
    dtype: str = "float32"
    lora_rank: int = 16
    micro_batch: int = 4  # rows of one forward and backward pass of the peers' updates

    @property
    def rows(self) -> int:
        return self.prompts * self.group_size

    @property
    def tokens(self) -> int:
        """Completion tokens of one rollout."""
        return self.rows * self.new_tokens


WORKLOADS = {
    w.name: w
    for w in (
        Workload("w1", 4, 4, 256, 128),
        Workload("w2", 2, 8, 128, 64),
        Workload("w3", 2, 8, 1024, 96),
        Workload("tiny", 2, 2, 32, 64, model="tiny", lora_rank=4, micro_batch=2),
        Workload("gpu05b", 8, 8, 512, 512, model="qwen2.5-0.5b", dtype="bfloat16"),
        Workload("gpu8b", 8, 8, 512, 256, model="llama3.1-8b", dtype="bfloat16"),
    )
}


def has_weights(directory: Path) -> bool:
    """Whether the model of `directory` (weights.write_model) is real; otherwise each system makes random weights."""
    return (directory / "model.safetensors").exists()


def prompts(workload: Workload, directory: Path) -> np.ndarray:
    """Prompt ids [P, prompt_tokens], int32: this package's own source text, a different stretch for each prompt."""
    tokenizer = load_tokenizer(directory)
    package = Path(__file__).parents[1]
    ids: list[int] = []
    for path in sorted(package.glob("*.py")):
        ids += tokenizer.encode_text(path.read_text(encoding="utf-8"))
        if len(ids) >= workload.prompts * workload.prompt_tokens:
            break
    return np.asarray(ids[: workload.prompts * workload.prompt_tokens], np.int32).reshape(workload.prompts, -1)


def advantages(workload: Workload) -> np.ndarray:
    """Made-up advantages [P, G] of mean 0: what a reward function would have given, at no cost to anyone."""
    row = np.linspace(-1.0, 1.0, workload.group_size, dtype=np.float32)
    return np.tile(row, (workload.prompts, 1))
