"""The decoder: one Flax module for every family, its layers stacked and scanned.

Flax collections are the roles. `params` is the frozen base, `lora` the adapters, `cache` the KV cache of a decode
loop. The policy is `decoder.apply({"params": p, "lora": l}, ...)`; the reference is `decoder.apply({"params": p}, ...)`
on the same weights.
"""

from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from srl_jax.model.attention import ATTENDED, attend, attend_causal
from srl_jax.model.families import ModelConfig, RopeScaling
from srl_jax.model.flash import flash_attend
from srl_jax.model.kv import KV, KeyColumns, as_columns, empty, store, width, write
from srl_jax.model.quantize import QuantizedKernel, quantized_matmul

_ALL = np.iinfo(np.int32).max  # the window of a layer that sees everything
# What a linear map gives, and a rank-r product within it. Kept by name: a policy that keeps every product keeps two of
# the same size for each map with adapters, the base's and the adapter's, whose sum is all that anyone reads.
_MAPPED = "mapped"


class Prefix(NamedTuple):
    """Keys and values [L, P, K, Lp, H] of P prompts, and which of their positions are real: the first so many."""

    k: KV | KeyColumns  # columns for decode steps, which have no gradient
    v: KV
    mask: Bool[Array, "P Lp"]


class Packing(NamedTuple):
    """How packed rows are cut: a prompt of Lp tokens, the real ones by `mask`, then completions of `length` each."""

    mask: Bool[Array, "P Lp"]
    length: int


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Angular frequency of each rotated pair, float32 [H/2]. Llama 3.1's stretch as in its reference code."""
    inverse = 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is not None and scaling.kind == "linear":
        inverse = inverse / scaling.factor
    elif scaling is not None:
        wavelength = 2 * np.pi / inverse
        low = scaling.original_max_position / scaling.low_freq_factor
        high = scaling.original_max_position / scaling.high_freq_factor
        smooth = (scaling.original_max_position / wavelength - scaling.low_freq_factor) / (
            scaling.high_freq_factor - scaling.low_freq_factor
        )
        blended = (1 - smooth) * inverse / scaling.factor + smooth * inverse
        inverse = np.where(wavelength > low, inverse / scaling.factor, np.where(wavelength < high, inverse, blended))
    return inverse.astype(np.float32)


def rotate(x: Float[Array, "B T N H"], cos: Float[Array, "B T half"], sin: Float[Array, "B T half"]):
    """Rotary position embedding, half-split layout (the one Hugging Face weights are stored for)."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class LayerData(NamedTuple):
    """What differs between layers beside their weights; scanned with them."""

    index: Int[Array, "L"]
    window: Int[Array, "L"]  # how many positions a query sees, its own included
    rope: Int[Array, "L"]  # which of the `rope_tables`


def layer_data(config: ModelConfig) -> LayerData:
    windows = np.asarray(config.windows or [0] * config.n_layers, np.int32)
    local = (windows > 0) & (config.local_rope_theta is not None)
    return LayerData(
        jnp.arange(config.n_layers), jnp.asarray(np.where(windows > 0, windows, _ALL)), jnp.asarray(local, jnp.int32)
    )


def rope_tables(config: ModelConfig) -> np.ndarray:
    """Frequencies [R, H/2]: of most layers, and of windowed ones where they have a base of their own."""
    tables = [rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)]
    if config.local_rope_theta is not None:
        tables.append(rope_frequencies(config.head_dim, config.local_rope_theta, None))
    return np.stack(tables)


class Scene(NamedTuple):
    """What every layer is told alike. Distances are in positions, query minus key; negative is out of sight."""

    cos: Float[Array, "R B T half"]
    sin: Float[Array, "R B T half"]
    distance: Int[Array, "#B T S"]
    prefix_distance: Int[Array, "P #G #T Lp"] | None
    prefix_lengths: Int[Array, "P"] | None
    columns: Int[Array, "B T"] | None  # of the cache, where each token's keys and values are written
    prompt_distance: Int[Array, "1 Lp Lp"] | None  # within a packed row's prompt; `distance` is a completion's own


def _prefix_distance(
    config: ModelConfig, mask: Bool[Array, "P Lp"], positions: Int[Array, "P G T"]
) -> Int[Array, "P #G #T Lp"]:
    """How far back each prompt position lies. Without windows it is 0 for all: what is real is seen."""
    if not config.windows:
        return jnp.where(mask, 0, -1)[:, None, None, :]
    distance = positions[..., None] - jnp.arange(mask.shape[1])[None, None, None, :]
    return jnp.where(mask[:, None, None, :], distance, -1)


def _along_last(vector: Float[Array, "X"], like: Array) -> Array:
    """`vector` shaped to broadcast along the last axis of `like`, without implicit rank promotion."""
    return vector.reshape((1,) * (like.ndim - 1) + (-1,))


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, computed in float32."""

    eps: float

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.with_logical_partitioning(nn.initializers.ones, ("norm",)), (x.shape[-1],))
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * _along_last(scale.astype(jnp.float32), y)).astype(x.dtype)


class Linear(nn.Module):
    """`x W + b`, plus `(x A) B * alpha/rank` when the caller passes the `lora` collection. W may be quantised.

    A starts normal with variance 1/fan_in, B at zero (LoRA, arXiv 2106.09685), so a fresh adapter changes nothing.
    """

    features: int
    axes: tuple[str, str]  # logical names of (input, output), mapped to the mesh in sharding.py
    use_bias: bool = False
    lora_rank: int = 0
    lora_scale: float = 1.0

    @nn.compact
    def __call__(self, x):
        # Rows flattened: with two batch axes the adapters' gradients contract over both, which XLA:CPU does in a
        # plain loop (98 ms instead of 40 for one feed-forward layer of 1,024 tokens).
        fan_in, batch_shape = x.shape[-1], x.shape[:-1]
        x = x.reshape(-1, fan_in)
        init = nn.initializers.normal(fan_in**-0.5)
        kernel = self.get_variable("params", "kernel")
        if isinstance(kernel, QuantizedKernel):
            y = quantized_matmul(x, kernel)
        else:
            y = x @ self.param("kernel", nn.with_logical_partitioning(init, self.axes), (fan_in, self.features))
        if self.use_bias:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, (self.axes[1],))
            y = y + _along_last(self.param("bias", zeros, (self.features,)), y)
        if self.lora_rank and (self.is_initializing() or self.has_variable("lora", "a")):
            # Adapters and their products stay float32: bf16 would round away the small updates they exist to carry.
            a_init = nn.with_logical_partitioning(nn.initializers.normal(fan_in**-0.5), (self.axes[0], "rank"))
            b_init = nn.with_logical_partitioning(nn.initializers.zeros, ("rank", self.axes[1]))
            rng = self.make_rng("params") if self.is_initializing() else None
            a = self.variable("lora", "a", a_init, rng, (fan_in, self.lora_rank), jnp.float32).value
            b = self.variable("lora", "b", b_init, rng, (self.lora_rank, self.features), jnp.float32).value
            low = checkpoint_name(x.astype(jnp.float32) @ a, _MAPPED)
            y = y + (low @ b * self.lora_scale).astype(y.dtype)
        return checkpoint_name(y, _MAPPED).reshape(*batch_shape, self.features)


_ACTIVATIONS = {"silu": nn.silu, "gelu_tanh": partial(nn.gelu, approximate=True)}


class Block(nn.Module):
    """One transformer layer; the body of the scan over layers."""

    config: ModelConfig
    lora_rank: int
    lora_scale: float
    kv_dtype: jnp.dtype | None
    attention: str
    mesh: Mesh | None

    @nn.compact
    def __call__(self, carry, layer: LayerData, prefix_kv, scene: Scene):
        x = carry
        c = self.config
        batch, t, _ = x.shape

        def linear(name, features, axes, bias=False):
            return Linear(features, axes, bias, self.lora_rank, self.lora_scale, name=name)

        y = RMSNorm(c.norm_eps, name="attention_norm")(x)
        q = linear("q", c.n_heads * c.head_dim, ("embed", "heads"), c.qkv_bias)(y)
        k = linear("k", c.n_kv_heads * c.head_dim, ("embed", "kv_heads"), c.qkv_bias)(y)
        v = linear("v", c.n_kv_heads * c.head_dim, ("embed", "kv_heads"), c.qkv_bias)(y)
        q = q.reshape(batch, t, c.n_heads, c.head_dim)
        k = k.reshape(batch, t, c.n_kv_heads, c.head_dim)
        v = v.reshape(batch, t, c.n_kv_heads, c.head_dim)
        if c.qk_norm:
            q, k = RMSNorm(c.norm_eps, name="q_norm")(q), RMSNorm(c.norm_eps, name="k_norm")(k)
        cos, sin = scene.cos[layer.rope], scene.sin[layer.rope]
        q = rotate(q, cos, sin)
        k = rotate(k, cos, sin)
        if scene.prompt_distance is None:
            y, kv = self._attend(q, k, v, layer, scene, scene.distance, prefix_kv)
        else:
            prompt, length = scene.prompt_distance.shape[-1], scene.distance.shape[-1]
            first = lambda x: x[:, :prompt]
            rows = lambda x: x[:, prompt:].reshape(-1, length, *x.shape[2:])
            shared, prompt_kv = self._attend(*map(first, (q, k, v)), layer, scene, scene.prompt_distance)
            own, kv = self._attend(*map(rows, (q, k, v)), layer, scene, scene.distance, prompt_kv)
            y = jnp.concatenate([shared, own.reshape(batch, t - prompt, *own.shape[2:])], axis=1)
        y = linear("o", c.d_model, ("heads", "embed"))(y.reshape(batch, t, c.n_heads * c.head_dim))
        x = x + (RMSNorm(c.norm_eps, name="attention_post_norm")(y) if c.post_norms else y)

        y = RMSNorm(c.norm_eps, name="mlp_norm")(x)
        gate = linear("gate", c.d_ff, ("embed", "ff"))(y)
        up = linear("up", c.d_ff, ("embed", "ff"))(y)
        y = linear("down", c.d_model, ("ff", "embed"))(_ACTIVATIONS[c.activation](gate) * up)
        kv = None if self.kv_dtype is None else kv
        return x + (RMSNorm(c.norm_eps, name="mlp_post_norm")(y) if c.post_norms else y), kv

    def _attend(self, q, k, v, layer: LayerData, scene: Scene, distance, prefix=None):
        """What rows [B, T] attend to, [B, T, N, H], and their keys and values [B, K, T, H] as they are to be kept."""
        c, t = self.config, q.shape[1]
        k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
        kv = (k, v) if self.kv_dtype is None else (store(k, self.kv_dtype), store(v, self.kv_dtype))
        if self.has_variable("cache", "keys"):
            # The cache is the scan's carry, whole: as per-layer inputs and outputs XLA would copy it every step.
            cache_k = self.variable("cache", "keys", lambda: None)
            cache_v = self.variable("cache", "values", lambda: None)
            dtype = jax.tree.leaves(cache_k.value)[0].dtype
            cache_k.value = write(cache_k.value, layer.index, scene.columns, store(k, dtype))
            cache_v.value = write(cache_v.value, layer.index, scene.columns, store(v, dtype))
            of_layer = partial(jax.lax.dynamic_index_in_dim, index=layer.index, keepdims=False)
            k, v = jax.tree.map(of_layer, (cache_k.value, cache_v.value))

        def seen(distance):
            return (distance >= 0) & (distance < layer.window)

        # A decode step has no scores worth avoiding, and one token alone (variables being shaped) none at all.
        if self.attention != "xla" and scene.columns is None and t > 1:
            lengths = None if prefix is None else scene.prefix_lengths
            y = flash_attend(q, k, v, prefix, lengths, scale=c.attention_scale, kernel=self.attention, mesh=self.mesh)
        else:
            before = None if prefix is None else seen(scene.prefix_distance)
            masks = {"mask": seen(distance), "prefix": prefix, "prefix_mask": before}
            way = attend if scene.columns is not None else attend_causal
            y = way(q, k, v, **masks, scale=c.attention_scale, softcap=c.attention_softcap)
        return y, kv


_REMAT = {
    "full": None,
    "dots": jax.checkpoint_policies.save_only_these_names(ATTENDED, _MAPPED),
}


class Decoder(nn.Module):
    """Tokens in, final hidden states out; the head is applied by whoever needs logits (`head`, `logits`).

    Attributes:
      config: the model's shapes.
      lora_rank, lora_alpha: adapters on all seven linear maps of a layer; 0 builds none.
      remat: what the backward pass recomputes: "none"; "dots" (everything but attention and what linear maps give);
        "full" (each layer from its input alone).
      quantize: how the base's linear weights are stored: "none", or a scheme of model/quantize.py. The layers take
        them as they come; who makes or places weights asks here.
      attention: "xla", or the kernel of model/flash.py that passes over whole rows take.
      mesh: where such a kernel runs; needed on several devices.
    """

    config: ModelConfig
    lora_rank: int = 0
    lora_alpha: float = 1.0
    remat: str = "none"
    quantize: str = "none"
    attention: str = "xla"
    mesh: Mesh | None = None

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        prefix: Prefix | None = None,
        age: Int[Array, "B"] | None = None,
        kv_dtype: jnp.dtype | None = None,
        packing: Packing | None = None,
    ) -> tuple[Float[Array, "B T D"], tuple[KV, KV] | None]:
        """Final-norm hidden states of `tokens`; with `kv_dtype` every layer's keys and values [L, B, K, T, H] in it.

        Without `cache`, query i of a row sees its own keys 0..i, so right padding is harmless. With the `cache`
        collection (`init_cache`), which holds the first `age` tokens of each row, the T that follow are added behind
        them; a column beyond the cache's end is dropped.
        In both cases it sees all real positions of its row's prompt in `prefix`. Windowed layers see the nearest of
        these only, by position: a row's own positions are consecutive, a prompt's start at 0.
        With `packing` a row is a prompt and its G completions behind it, T = Lp + G * length: the prompt sees itself, a
        completion the prompt and itself. There is no `prefix` then, nor a `cache`.
        """
        c = self.config
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("vocab", "embed"))
        embedding = self.param("embedding", init, (c.vocab_size, c.d_model))
        if not c.tie_embeddings:
            self.param("head", init, (c.vocab_size, c.d_model))
        x = embedding[tokens]
        if c.embed_scale != 1.0:
            x = x * jnp.asarray(c.embed_scale, x.dtype)
        frequencies = jnp.asarray(rope_tables(c))[:, None, None, :]
        angles = positions[None, :, :, None].astype(jnp.float32) * frequencies
        columns = jnp.arange(tokens.shape[1] if packing is None else packing.length)[None, :]
        keys = columns
        if age is not None:
            columns = age[:, None] + columns
            keys = jnp.arange(width(self.variables["cache"]["layers"]["values"]))[None, :]
        distance = columns[:, :, None] - keys[:, None, :]
        # prevent_cse guards against a problem that a scan body does not have, and it costs fusion.
        block = Block if self.remat == "none" else nn.remat(Block, prevent_cse=False, policy=_REMAT[self.remat])
        layers = nn.scan(
            block,
            variable_axes={"params": 0, "lora": 0},
            variable_carry="cache",
            split_rngs={"params": True},
            in_axes=(0, 0, nn.broadcast),
            length=c.n_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(
            c, self.lora_rank, self.lora_alpha / max(self.lora_rank, 1), kv_dtype, self.attention, self.mesh,
            name="layers",
        )  # fmt: skip
        prefix_kv = None if prefix is None else (prefix.k, prefix.v)
        prefix_distance = prefix_lengths = prompt_distance = None
        if packing is not None:
            places = jnp.arange(packing.mask.shape[1])
            prompt_distance = (places[:, None] - places[None, :])[None]
            positions = positions[:, len(places) :]
        shared = packing or prefix
        if shared is not None:
            positions = positions.reshape(shared.mask.shape[0], -1, distance.shape[1])
            prefix_distance, prefix_lengths = _prefix_distance(c, shared.mask, positions), shared.mask.sum(-1)
        columns = None if age is None else columns
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        scene = Scene(cos, sin, distance, prefix_distance, prefix_lengths, columns, prompt_distance)
        x, kv = layers(x, layer_data(c), prefix_kv, scene)
        return RMSNorm(c.norm_eps, name="final_norm")(x), kv


def head(params) -> Float[Array, "V D"]:
    """The output projection: the untied head, or the embedding itself."""
    return params.get("head", params["embedding"])


def logits(config: ModelConfig, params, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
    """Float32 logits of hidden states. Holds [..., V]: for tests and single decode steps only."""
    scores = jnp.einsum("...d,vd->...v", hidden, head(params), preferred_element_type=jnp.float32)
    cap = config.final_softcap
    return scores if cap is None else cap * jnp.tanh(scores / cap)


def init_cache(config: ModelConfig, batch: int, length: int, dtype) -> dict:
    """An empty KV cache collection for `batch` rows of at most `length` tokens; int8 is model/kv.py's."""
    shape = (config.n_layers, batch, config.n_kv_heads, length, config.head_dim)
    return {"layers": {"keys": as_columns(empty(shape, dtype)), "values": empty(shape, dtype)}}


def encode_prompts(
    decoder: Decoder, variables: dict, tokens: Int[Array, "P Lp"], lengths: Int[Array, "P"], dtype=None
) -> Prefix:
    """Keys and values of the first `lengths - 1` tokens of each prompt, in `dtype` (None: the model's own).

    The last prompt token is left to the completions: each row's first input, whose output predicts its first
    completion token. So no logits are computed for prompts, and prefix and rows never overlap.
    """
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None, :], tokens.shape)
    dtype = jnp.dtype(dtype or variables["params"]["embedding"].dtype)
    _, (k, v) = decoder.apply(variables, tokens, positions, kv_dtype=dtype)
    return Prefix(k, v, positions < lengths[:, None] - 1)


def completion_hidden(
    decoder: Decoder,
    variables: dict,
    prompt_tokens: Int[Array, "P Lp"],
    prompt_lengths: Int[Array, "P"],
    completions: Int[Array, "P G T"],
) -> Float[Array, "P G T D"]:
    """Hidden states that predict every completion token, each prompt computed once for its G completions.

    Equal to running each prompt + completion as a row of its own, in values and in gradients.
    """
    p, g, t = completions.shape
    places = jnp.broadcast_to(jnp.arange(prompt_tokens.shape[1])[None, :], prompt_tokens.shape)
    last = jnp.take_along_axis(prompt_tokens, prompt_lengths[:, None] - 1, axis=1)
    inputs = jnp.concatenate([jnp.broadcast_to(last[:, :, None], (p, g, 1)), completions[:, :, :-1]], axis=-1)
    after = (prompt_lengths[:, None, None] - 1) + jnp.broadcast_to(jnp.arange(t)[None, None, :], (p, g, t))
    pack = lambda prompt, rows: jnp.concatenate([prompt, rows.reshape(p, g * t)], axis=1)
    # As in `encode_prompts` the last prompt token is the first input of the rows instead.
    packing = Packing(places < prompt_lengths[:, None] - 1, t)
    hidden, _ = decoder.apply(variables, pack(prompt_tokens, inputs), pack(places, after), packing=packing)
    return hidden[:, prompt_tokens.shape[1] :].reshape(p, g, t, -1)


def mergeable(params: dict) -> bool:
    """Whether adapters can be added into the weights without rounding them away: nothing narrower than float32."""
    return all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))


def merge_lora(params: dict, lora: dict, scale: float) -> dict:
    """Base weights with the adapters added in, for sampling.

    Only sound when the base is float32 (see `mergeable`): in bfloat16 the sum rounds away most of a small adapter.
    """
    if not mergeable(params):
        kinds = {str(leaf.dtype) for leaf in jax.tree.leaves(params)}
        raise ValueError(f"merge_lora needs float32 base weights, not {', '.join(sorted(kinds))}")
    layers = dict(params["layers"])
    for name, adapter in lora["layers"].items():
        kernel = layers[name]["kernel"]
        delta = jnp.einsum("lir,lro->lio", adapter["a"], adapter["b"]) * scale
        layers[name] = {**layers[name], "kernel": kernel + delta}
    return {**params, "layers": layers}


def abstract_variables(decoder: Decoder) -> dict:
    """Shapes and logical axes (boxed) of the `params` and `lora` collections, computed without making them.

    In float32; of quantised kernels, those of the numbers they stand for.
    """
    token = jnp.zeros((1, 1), jnp.int32)
    return jax.eval_shape(decoder.init, jax.random.key(0), token, token)


def init_lora(decoder: Decoder, key: Array) -> dict:
    """A fresh `lora` collection: A normal with variance 1/fan_in, B zero. Base weights are never made."""
    abstract = nn.unbox(abstract_variables(decoder)["lora"])
    leaves = jax.tree_util.tree_leaves_with_path(abstract)
    structure = jax.tree_util.tree_structure(abstract)
    made = []
    for index, (path, leaf) in enumerate(leaves):
        if path[-1].key == "b":
            made.append(jnp.zeros(leaf.shape, leaf.dtype))
        else:
            noise = jax.random.normal(jax.random.fold_in(key, index), leaf.shape, leaf.dtype)
            made.append(noise * leaf.shape[-2] ** -0.5)
    return jax.tree_util.tree_unflatten(structure, made)
