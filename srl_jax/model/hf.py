"""Weights in and out: Hugging Face directories (safetensors) and GGUF files to the decoder's stacked tree.

Each stacked leaf is assembled, quantised if it is to be, and placed before the next is read, so the host never holds a
second copy of the model.
"""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from srl_jax.model import quantize as quantization
from srl_jax.model.decoder import rope_frequencies
from srl_jax.model.families import ModelConfig, RopeScaling, UnsupportedModel, from_gguf, from_hf

NewRows = Mapping[int, Mapping[int, float]]  # id of a token that the tokenizer adds -> {source id: weight}

# Our leaf -> (Hugging Face name, GGUF name). {i} is the layer. Linear weights are stored [out, in] in both.
_LAYER_NAMES = {
    ("attention_norm", "scale"): ("model.layers.{i}.input_layernorm.weight", "blk.{i}.attn_norm.weight"),
    ("mlp_norm", "scale"): ("model.layers.{i}.post_attention_layernorm.weight", "blk.{i}.ffn_norm.weight"),
    ("q", "kernel"): ("model.layers.{i}.self_attn.q_proj.weight", "blk.{i}.attn_q.weight"),
    ("k", "kernel"): ("model.layers.{i}.self_attn.k_proj.weight", "blk.{i}.attn_k.weight"),
    ("v", "kernel"): ("model.layers.{i}.self_attn.v_proj.weight", "blk.{i}.attn_v.weight"),
    ("o", "kernel"): ("model.layers.{i}.self_attn.o_proj.weight", "blk.{i}.attn_output.weight"),
    ("gate", "kernel"): ("model.layers.{i}.mlp.gate_proj.weight", "blk.{i}.ffn_gate.weight"),
    ("up", "kernel"): ("model.layers.{i}.mlp.up_proj.weight", "blk.{i}.ffn_up.weight"),
    ("down", "kernel"): ("model.layers.{i}.mlp.down_proj.weight", "blk.{i}.ffn_down.weight"),
    ("q", "bias"): ("model.layers.{i}.self_attn.q_proj.bias", "blk.{i}.attn_q.bias"),
    ("k", "bias"): ("model.layers.{i}.self_attn.k_proj.bias", "blk.{i}.attn_k.bias"),
    ("v", "bias"): ("model.layers.{i}.self_attn.v_proj.bias", "blk.{i}.attn_v.bias"),
    ("q_norm", "scale"): ("model.layers.{i}.self_attn.q_norm.weight", "blk.{i}.attn_q_norm.weight"),
    ("k_norm", "scale"): ("model.layers.{i}.self_attn.k_norm.weight", "blk.{i}.attn_k_norm.weight"),
}
# With norms after each half (Gemma), Hugging Face's "post_attention_layernorm" is that norm, not the next half's own.
_POST_NORM_NAMES = {
    ("mlp_norm", "scale"): ("model.layers.{i}.pre_feedforward_layernorm.weight", "blk.{i}.ffn_norm.weight"),
    ("attention_post_norm", "scale"): (
        "model.layers.{i}.post_attention_layernorm.weight",
        "blk.{i}.post_attention_norm.weight",
    ),
    ("mlp_post_norm", "scale"): (
        "model.layers.{i}.post_feedforward_layernorm.weight",
        "blk.{i}.post_ffw_norm.weight",
    ),
}
_TOP_NAMES = {
    ("embedding",): ("model.embed_tokens.weight", "token_embd.weight"),
    ("final_norm", "scale"): ("model.norm.weight", "output_norm.weight"),
    ("head",): ("lm_head.weight", "output.weight"),
}


class BadWeights(ValueError):
    """A tensor is missing or has another shape than the model's configuration implies; the message names it."""


class _GgufSource:
    """Tensors of a GGUF file, dequantized to float32, under GGUF names."""

    column = 1
    norm_offset = 0.0  # llama.cpp adds it when it converts

    def __init__(self, path: Path):
        import gguf

        reader = gguf.GGUFReader(path)
        self._tensors = {t.name: t for t in reader.tensors}
        # The tokenizer's fields hold 10^5 strings that cost seconds to decode and say nothing about shapes.
        fields = {n: f.contents() for n, f in reader.fields.items() if not n.startswith("tokenizer.")}
        shapes = {name: tuple(int(n) for n in reversed(t.shape)) for name, t in self._tensors.items()}
        self.config = from_gguf(fields, shapes)
        if (factors := self.get("rope_freqs.weight")) is not None:
            self.config = dataclasses.replace(self.config, rope_scaling=_llama3_scaling(self.config, factors))

    def get(self, name: str) -> np.ndarray | None:
        import gguf

        tensor = self._tensors.get(name)
        if tensor is None:
            return None
        array = gguf.dequantize(tensor.data, tensor.tensor_type)
        if self.config.family == "llama" and name.endswith(("attn_q.weight", "attn_k.weight")):
            # llama.cpp stores Llama's q and k rows interleaved for its own RoPE; undo its permutation.
            heads = self.config.n_heads if "attn_q" in name else self.config.n_kv_heads
            array = array.reshape(heads, self.config.head_dim // 2, 2, -1).swapaxes(1, 2).reshape(array.shape)
        return array


def _llama3_scaling(config: ModelConfig, factors: np.ndarray) -> RopeScaling:
    """What a GGUF file of Llama 3.1 and later says by divisors of the rotary frequencies, the largest its factor."""
    scaling = RopeScaling("llama3", float(factors.max()))
    plain, stretched = (rope_frequencies(config.head_dim, config.rope_theta, kind) for kind in (None, scaling))
    if factors.shape != plain.shape or not np.allclose(plain / stretched, factors, rtol=1e-3):
        raise UnsupportedModel("GGUF: rope_freqs.weight is not Llama 3's scaling; load the safetensors instead")
    return scaling


def _read_hf_config(path: Path) -> ModelConfig:
    try:
        return from_hf(json.loads(path.read_text(encoding="utf-8")))
    except json.JSONDecodeError as error:
        raise BadWeights(f"{path} is not JSON ({error}); download the model again") from None
    except KeyError as error:
        raise UnsupportedModel(f"{path}: field {error} is missing") from None


class _SafetensorsSource:
    """Tensors of a Hugging Face directory (one file or a sharded index), under Hugging Face names."""

    column = 0

    def __init__(self, directory: Path, stack: contextlib.ExitStack):
        from safetensors import SafetensorError, safe_open

        self.config = _read_hf_config(directory / "config.json")
        self.norm_offset = self.config.norm_offset
        index = directory / "model.safetensors.index.json"
        if index.exists():
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        else:
            files = ["model.safetensors"]
        self._by_name = {}
        for file in files:
            if not (directory / file).exists():
                raise BadWeights(f"{directory}: {file} is missing; download the model again")
            # framework "flax" reads bfloat16, which numpy alone does not know.
            try:
                handle = stack.enter_context(safe_open(directory / file, framework="flax"))
            except SafetensorError as error:
                raise BadWeights(f"{directory / file} cannot be read ({error}); download the model again") from None
            self._by_name.update(dict.fromkeys(handle.keys(), handle))

    def get(self, name: str) -> np.ndarray | None:
        handle = self._by_name.get(name)
        return None if handle is None else np.asarray(handle.get_tensor(name).astype(jnp.float32))


@contextlib.contextmanager
def _open(path: Path) -> Iterator[_GgufSource | _SafetensorsSource]:
    if path.is_file() and path.suffix == ".gguf":
        yield _GgufSource(path)
    elif (path / "config.json").is_file():
        with contextlib.ExitStack() as stack:
            yield _SafetensorsSource(path, stack)
    else:
        raise FileNotFoundError(
            f"model {path}: neither a .gguf file nor a directory with config.json and model.safetensors; "
            "give one of these or asset:NAME from third_party/manifest.toml"
        )


def tensor_names(config: ModelConfig, leaf: tuple[str, ...]) -> tuple[str, str]:
    """(Hugging Face, GGUF) names of a leaf's tensor, or of each layer's with `{i}` for the layer."""
    if leaf[0] != "layers":
        return _TOP_NAMES[leaf]
    names = _LAYER_NAMES | _POST_NORM_NAMES if config.post_norms else _LAYER_NAMES
    return names[leaf[1:]]


def leaf_dtype(leaf: tuple[str, ...], dtype):
    """Norm scales are always float32: they are few, and 1 + w in bfloat16 would round most of a Gemma's w away."""
    return jnp.float32 if leaf[-1] == "scale" else dtype


def read_config(path: str | Path, *, new_rows: NewRows | None = None) -> ModelConfig:
    """The configuration that `load_params` would return, without the weights."""
    with _open(Path(path)) as source:
        config = source.config
    return dataclasses.replace(config, vocab_size=_rows_after(config.vocab_size, new_rows or {}))


def expected_shapes(config: ModelConfig) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Shape of every leaf of the parameter tree, layers stacked in front."""
    d, n, k, h, f = config.d_model, config.n_heads, config.n_kv_heads, config.head_dim, config.d_ff
    layer = {("attention_norm", "scale"): (d,), ("mlp_norm", "scale"): (d,), ("q", "kernel"): (d, n * h)}
    layer |= {("k", "kernel"): (d, k * h), ("v", "kernel"): (d, k * h), ("o", "kernel"): (n * h, d)}
    layer |= {("gate", "kernel"): (d, f), ("up", "kernel"): (d, f), ("down", "kernel"): (f, d)}
    if config.qkv_bias:
        layer |= {("q", "bias"): (n * h,), ("k", "bias"): (k * h,), ("v", "bias"): (k * h,)}
    if config.qk_norm:
        layer |= {("q_norm", "scale"): (h,), ("k_norm", "scale"): (h,)}
    if config.post_norms:
        layer |= {("attention_post_norm", "scale"): (d,), ("mlp_post_norm", "scale"): (d,)}
    shapes = {("layers", *leaf): (config.n_layers, *shape) for leaf, shape in layer.items()}
    shapes |= {("embedding",): (config.vocab_size, d), ("final_norm", "scale"): (d,)}
    if not config.tie_embeddings:
        shapes |= {("head",): (config.vocab_size, d)}
    return shapes


def _fetch(source, names: tuple[str, str], shape: tuple[int, ...], transpose: bool, **fields) -> np.ndarray:
    name = names[source.column].format(**fields)
    array = source.get(name)
    if array is None:
        raise BadWeights(f"tensor {name!r} is missing; the file is not a complete {source.config.family} model")
    if name.endswith("norm.weight") and source.norm_offset:
        array = array + source.norm_offset
    array = array.T if transpose else array
    if array.shape != shape:
        raise BadWeights(f"tensor {name!r} gives shape {array.shape}, the configuration implies {shape}")
    return array


def _set_rows(table: np.ndarray, new_rows: NewRows) -> np.ndarray:
    rows = {
        i: np.einsum("s,sd->d", np.asarray([*mix.values()], np.float32), table[[*mix]].astype(np.float32))
        for i, mix in new_rows.items()
    }
    fresh = _rows_after(table.shape[0], new_rows) - table.shape[0]
    grown = np.concatenate([table, np.zeros((fresh, table.shape[1]), table.dtype)])
    for i, row in rows.items():
        grown[i] = row
    return grown


def _rows_after(rows: int, new_rows: NewRows) -> int:
    beyond = sorted(i for i in new_rows if i >= rows)
    if beyond != list(range(rows, rows + len(beyond))):
        raise BadWeights(
            f"the embedding has {rows} rows and the tokenizer adds ids {beyond}; "
            "model and tokenizer do not belong together"
        )
    return rows + len(beyond)


# Puts one host array (a `QuantizedKernel` of them where the leaf is quantised), by its path, where it will live.
Place = Callable[[tuple[str, ...], Any], Any]


def _assemble(
    config: ModelConfig,
    tensor: Callable[[tuple[str, ...], int | None], np.ndarray],
    dtype,
    quantize: str,
    place: Place | None,
) -> dict:
    """The `params` tree, leaf by leaf; `tensor(leaf, layer)` gives one layer's matrix or vector of it."""
    quantization.check(config, quantize)
    place = place or (lambda _, array: jax.tree.map(jnp.asarray, array))

    def stored(leaf: tuple[str, ...], layer: int | None) -> Any:
        array, kind = tensor(leaf, layer), leaf_dtype(leaf, dtype)
        if quantize == "none" or leaf[-1] != "kernel":
            return array.astype(kind)
        return jax.tree.map(np.asarray, quantization.quantize(array, quantize, jnp.dtype(kind)))

    params: dict = {}
    for leaf in expected_shapes(config):
        layered = leaf[0] == "layers"
        array = _stack(config.n_layers, partial(stored, leaf)) if layered else stored(leaf, None)
        node = params
        for key in leaf[:-1]:
            node = node.setdefault(key, {})
        node[leaf[-1]] = place(leaf, array)
    return params


def _stack(count: int, make: Callable[[int], Any]) -> Any:
    """`make(0)` to `make(count - 1)`, trees of arrays alike, along a new leading axis; one at a time in memory."""
    stacked = None
    for i in range(count):
        one = make(i)
        if stacked is None:
            stacked = jax.tree.map(lambda x: np.empty((count, *x.shape), x.dtype), one)
        for whole, part in zip(jax.tree.leaves(stacked), jax.tree.leaves(one), strict=True):
            whole[i] = part
    return stacked


def load_params(
    path: str | Path,
    *,
    dtype=jnp.float32,
    quantize: str = "none",
    new_rows: NewRows | None = None,
    place: Place | None = None,
) -> tuple[ModelConfig, dict]:
    """Reads a model: its configuration and its `params` tree.

    Args:
      path: a `.gguf` file or a Hugging Face directory.
      dtype: of the weights in memory, norm scales apart (see `leaf_dtype`).
      quantize: "none", or how the layers' linear weights are stored (model/quantize.py).
      new_rows: id of each token that the tokenizer adds -> {source id: weight}; its embedding (and head) row becomes
        that mix of the sources' rows. Some tables have spare rows at the end for it; where they have not, they grow.
      place: default: onto the default device.

    Raises:
      FileNotFoundError, UnsupportedModel, BadWeights: each naming the file, field or tensor.
    """
    new_rows = new_rows or {}
    with _open(Path(path)) as source:
        config = source.config
        shapes = expected_shapes(config)

        def tensor(leaf: tuple[str, ...], layer: int | None) -> np.ndarray:
            shape = shapes[leaf] if layer is None else shapes[leaf][1:]
            array = _fetch(source, tensor_names(config, leaf), shape, leaf[-1] == "kernel", i=layer)
            return _set_rows(array, new_rows) if leaf[0] in ("embedding", "head") else array

        params = _assemble(config, tensor, dtype, quantize, place)
    return dataclasses.replace(config, vocab_size=_rows_after(config.vocab_size, new_rows)), params


def random_params(
    config: ModelConfig, seed: int, dtype=jnp.float32, quantize: str = "none", place: Place | None = None
) -> dict:
    """Random weights of the true shapes, from host numpy: for tests, timings and the tiny recipe."""
    rng = np.random.default_rng(seed)
    shapes = expected_shapes(config)

    def tensor(leaf: tuple[str, ...], layer: int | None) -> np.ndarray:
        shape = shapes[leaf] if layer is None else shapes[leaf][1:]
        if leaf[-1] == "scale":
            return np.ones(shape, np.float32)
        if leaf[-1] == "bias":
            return 0.02 * rng.standard_normal(shape, np.float32)
        return rng.standard_normal(shape, np.float32) * shape[-2 if leaf[-1] == "kernel" else -1] ** -0.5

    return _assemble(config, tensor, dtype, quantize, place)


def weights_hash(params: dict) -> str:
    """SHA-256 over every leaf's path, type, shape and bytes: what a checkpoint's adapters belong to."""
    digest = hashlib.sha256()
    for path, leaf in sorted(jax.tree_util.tree_leaves_with_path(params), key=lambda item: str(item[0])):
        array = np.asarray(leaf if leaf.is_fully_addressable else process_allgather(leaf, tiled=True))
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


__all__ = [
    "BadWeights",
    "UnsupportedModel",
    "expected_shapes",
    "load_params",
    "random_params",
    "read_config",
    "weights_hash",
]
