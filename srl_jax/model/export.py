"""Ways out: a trained student as the files that peft and transformers load.

Sums of base and adapter are made in float32, tensor by tensor; the host never holds a second model.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.flax import save_file

from srl_jax.model.decoder import Decoder
from srl_jax.model.families import to_hf
from srl_jax.model.hf import expected_shapes, tensor_names
from srl_jax.model.quantize import QuantizedKernel, dequantize
from srl_jax.tokenizer import Tokenizer
from srl_jax.trace import STOP, TAGS

SETTINGS_FILE = "srl_jax.json"  # the run's configuration, for whoever prompts and samples the student as it was trained
_MAX_SHARD = 4 * 2**30  # bytes of one safetensors file


class ExportError(ValueError):
    """The export cannot be written there; the message says why."""


@contextmanager
def _new_directory(out: Path) -> Iterator[Path]:
    """A directory that appears under its name when it is complete, or not at all."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ExportError(f"{out}: exists and is not an empty directory; name a new one")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield temporary
        for path in temporary.iterdir():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        temporary.chmod(0o755)
        temporary.replace(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def module_name(decoder: Decoder, name: str) -> str:
    """transformers' name of one of a layer's linear maps, `{i}` standing for the layer."""
    return tensor_names(decoder.config, ("layers", name, "kernel"))[0].removesuffix(".weight")


def export_adapter(
    out: Path,
    decoder: Decoder,
    params: dict,
    lora: dict,
    tokenizer: Tokenizer,
    *,
    base: str,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Writes a PEFT adapter directory; `peft.AutoPeftModelForCausalLM.from_pretrained(out)` loads it.

    The rows of tags that the base model lacks travel in it as `trainable_token_indices`. `base` is the path or name
    by which peft finds the base model; `settings` go into `SETTINGS_FILE`.

    Raises `ExportError` when `out` is not empty.
    """
    tensors: dict[str, jnp.ndarray] = {}
    for name, adapter in lora["layers"].items():
        for i in range(decoder.config.n_layers):
            module = f"base_model.model.{module_name(decoder, name).format(i=i)}"
            tensors[f"{module}.lora_A.weight"] = jnp.asarray(adapter["a"][i].T)
            tensors[f"{module}.lora_B.weight"] = jnp.asarray(adapter["b"][i].T)
    tables = {"embed_tokens": ("embedding", "model.embed_tokens")}
    if not decoder.config.tie_embeddings:
        tables["lm_head"] = ("head", "lm_head")
    new = sorted(tokenizer.added_tag_ids)
    for leaf, module in tables.values() if new else ():
        name = f"base_model.model.{module}.token_adapter.trainable_tokens_delta"
        tensors[name] = jnp.asarray(params[leaf][jnp.asarray(new)], jnp.float32)
    peft = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": decoder.lora_rank,
        "lora_alpha": decoder.lora_alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(module_name(decoder, name).rpartition(".")[2] for name in lora["layers"]),
        "trainable_token_indices": dict.fromkeys(tables, new) if new else None,
    }
    with _new_directory(out) as directory:
        save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
        _write_json(directory / "adapter_config.json", peft)
        if settings is not None:
            _write_json(directory / SETTINGS_FILE, dict(settings))
        tokenizer.save(directory)


def export_merged(
    out: Path,
    decoder: Decoder,
    params: dict,
    lora: dict | None,
    tokenizer: Tokenizer,
    *,
    dtype: str = "float32",
    max_shard: int = _MAX_SHARD,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Writes base and adapters as one model, tag rows and tokenizer included; transformers loads `out` as any other.

    A quantised base goes out as the numbers it stands for, which are what was trained. Each sum is made in float32 and
    then stored as `dtype`. In "bfloat16" much of a small adapter rounds away: measure what that costs before serving
    it. `generate` stops at the end of a trace. `settings` go into `SETTINGS_FILE`.

    Raises `ExportError` when `out` is not empty.
    """
    tensors = _merged_tensors(decoder, params, lora)
    width = jnp.dtype(dtype).itemsize
    shards: list[list[str]] = [[]]
    used = 0
    for name, (shape, _) in tensors.items():
        size = int(np.prod(shape)) * width
        if shards[-1] and used + size > max_shard:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    stop = [tokenizer.eos_id]
    if tokenizer.tag_ids:
        stop.insert(0, tokenizer.tag_ids[TAGS.index(STOP)])
    with _new_directory(out) as directory:
        files = {}
        for number, names in enumerate(shards, 1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
            made = {name: jnp.asarray(tensors[name][1](), dtype) for name in names}
            save_file(made, directory / file, metadata={"format": "pt"})
            files |= dict.fromkeys(names, file)
        if len(shards) > 1:
            total = sum(int(np.prod(shape)) for shape, _ in tensors.values()) * width
            index = {"metadata": {"total_size": total}, "weight_map": files}
            _write_json(directory / "model.safetensors.index.json", index)
        special = {"eos_token_id": stop, "pad_token_id": tokenizer.pad_id, "bos_token_id": None}
        _write_json(directory / "config.json", {**to_hf(decoder.config), **special, "dtype": dtype})
        _write_json(directory / "generation_config.json", special)
        if settings is not None:
            _write_json(directory / SETTINGS_FILE, dict(settings))
        tokenizer.save(directory)


def _merged_tensors(
    decoder: Decoder, params: dict, lora: dict | None
) -> dict[str, tuple[tuple[int, ...], Callable[[], np.ndarray]]]:
    """transformers' name of every tensor -> its shape and how to make it, float32."""
    config = decoder.config
    scale = decoder.lora_alpha / max(decoder.lora_rank, 1)

    def leaf_of(leaf: tuple[str, ...]) -> jnp.ndarray:
        node = params
        for key in leaf:
            node = node[key]
        return node

    def make(leaf: tuple[str, ...], layer: int | None) -> np.ndarray:
        array = leaf_of(leaf)
        if layer is not None:
            array = jax.tree.map(lambda x: x[layer], array)
        if isinstance(array, QuantizedKernel):
            array = dequantize(array)
        array = np.asarray(array, np.float32)
        if leaf[-1] == "scale":
            return array - np.float32(config.norm_offset)
        if leaf[-1] != "kernel":
            return array
        adapter = None if lora is None else lora["layers"].get(leaf[1])
        if adapter is not None:
            array = array + np.asarray(adapter["a"][layer]) @ np.asarray(adapter["b"][layer]) * np.float32(scale)
        return np.ascontiguousarray(array.T)

    tensors: dict[str, tuple[tuple[int, ...], Callable[[], np.ndarray]]] = {}
    for leaf, shape in expected_shapes(config).items():
        name = tensor_names(config, leaf)[0]
        if leaf[0] != "layers":
            tensors[name] = shape, lambda leaf=leaf: make(leaf, None)
            continue
        one = shape[:0:-1] if leaf[-1] == "kernel" else shape[1:]
        for i in range(config.n_layers):
            tensors[name.format(i=i)] = one, lambda leaf=leaf, i=i: make(leaf, i)
    return tensors
