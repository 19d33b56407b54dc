"""What is timed: shapes, prompts and weights, the same for every system."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from srl_jax import assets
from srl_jax.model import export, families, hf
from srl_jax.model.decoder import Decoder
from srl_jax.student import tag_rows
from srl_jax.tokenizer import Tokenizer, load_tokenizer
from srl_jax.trace import TAGS

_TOKENIZER = "smollm2-135m-instruct"


@dataclasses.dataclass(frozen=True)
class Workload:
    """P prompts of exactly `prompt_tokens` tokens, G completions each of exactly `new_tokens`.

    `model` is `smollm2` (real weights) or a key of `SHAPES` (random weights of the true shape). LoRA on every linear
    layer, alpha = rank.
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


SHAPES = {
    "tiny": families.tiny(0),
    "0.5b": families.ModelConfig(
        "qwen2", 151_936, 896, 24, 14, 2, 64, 4864, rope_theta=1e6, norm_eps=1e-6, qkv_bias=True
    ),
    "8b": families.ModelConfig("llama", 128_256, 4096, 32, 32, 8, 128, 14_336, rope_theta=5e5, tie_embeddings=False),
}

WORKLOADS = {
    w.name: w
    for w in (
        Workload("w1", 4, 4, 256, 128),
        Workload("w2", 2, 8, 128, 64),
        Workload("w3", 2, 8, 1024, 96),
        Workload("tiny", 2, 2, 32, 64, model="tiny", lora_rank=4, micro_batch=2),
        Workload("gpu05b", 8, 8, 512, 512, model="0.5b", dtype="bfloat16"),
        Workload("gpu8b", 8, 8, 512, 256, model="8b", dtype="bfloat16"),
    )
}


def write_model(workload: Workload, directory: Path) -> None:
    """Writes what every system loads: config.json, tokenizer files and, where they are real, the weights.

    The row of `</think>` is zero there. Its logit is then 0, far below any likely token's, so that no completion ends
    its thought before the grammar makes it: with the mask on, every row lives to the last token of its budget, as the
    peers' rows do, which are told to sample exactly so many. Times depend on no weight.
    """
    source = assets.fetch(_TOKENIZER)
    tokenizer = load_tokenizer(source)
    if workload.model != "smollm2":
        config = dataclasses.replace(
            SHAPES[workload.model], vocab_size=max(SHAPES[workload.model].vocab_size, tokenizer.vocab_size)
        )
        directory.mkdir(parents=True)
        (directory / "config.json").write_text(json.dumps({**families.to_hf(config), "dtype": workload.dtype}))
        tokenizer.save(directory)
        return
    config, params = hf.load_params(source, new_rows=tag_rows(tokenizer))
    params["embedding"] = params["embedding"].at[_think_end(tokenizer)].set(0.0)
    export.export_merged(directory, Decoder(config), params, None, tokenizer)


def _think_end(tokenizer: Tokenizer) -> int:
    return tokenizer.tag_ids[TAGS.index("</think>")]


def load_model(workload: Workload, directory: Path) -> tuple[Tokenizer, families.ModelConfig, dict]:
    """Our own reading of `write_model`'s directory; random weights where it holds none."""
    tokenizer, config = load_tokenizer(directory), read_shape(directory)
    if has_weights(directory):
        _, params = hf.load_params(directory, dtype=workload.dtype)
        return tokenizer, config, params
    params = hf.random_params(config, seed=0, dtype=jnp.dtype(workload.dtype))
    table = "embedding" if config.tie_embeddings else "head"
    params[table] = params[table].at[_think_end(tokenizer)].set(0.0)
    return tokenizer, config, jax.block_until_ready(params)


def read_shape(directory: Path) -> families.ModelConfig:
    return families.from_hf(json.loads((directory / "config.json").read_text(encoding="utf-8")))


def has_weights(directory: Path) -> bool:
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
