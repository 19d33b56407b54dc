"""The model that every system loads, written once, and our own way of loading it."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp

from srl_jax import assets
from srl_jax.bench.workload import Workload, has_weights
from srl_jax.evaluation import write_json
from srl_jax.model import export, families, hf
from srl_jax.model.decoder import Decoder
from srl_jax.model.shapes import SHAPES
from srl_jax.student import tag_rows
from srl_jax.tokenizer import Tokenizer, load_tokenizer
from srl_jax.trace import TAGS

_TOKENIZER = "smollm2-135m-instruct"


def write_model(workload: Workload, directory: Path) -> None:
    """Writes what every system loads: config.json, tokenizer files and, where they are real, the weights.

    The row of `</think>` is zero there. Its logit is then 0, far below any likely token's, so that no completion ends
    its thought before the grammar makes it: with the mask on, every row lives to the last token of its budget, as the
    peers' rows do, which are told to sample exactly so many. Times depend on no weight.
    """
    source = assets.fetch(_TOKENIZER)
    tokenizer = load_tokenizer(source)
    if workload.model != "smollm2":
        shape = SHAPES[workload.model]
        config = dataclasses.replace(shape, vocab_size=max(shape.vocab_size, tokenizer.vocab_size))
        directory.mkdir(parents=True, exist_ok=True)
        tokenizer.save(directory)
        # Last, and at once: where it stands, the rest is there.
        write_json(directory / "config.json", {**families.to_hf(config), "dtype": workload.dtype})
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
