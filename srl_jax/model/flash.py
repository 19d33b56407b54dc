"""Attention by kernels that never hold the scores: cuDNN's on NVIDIA GPUs, splash on TPUs.

Both know one thing well, causal attention within a row, so rows are laid out for it: a prompt's real keys, right behind
them the completion's, padding last, where causality hides it. The prompt is computed once for its group all the same;
only its keys and values are copied, and its positions have queries of zeros whose results nobody reads. That costs
Lp^2 / (T^2 + 2 Lp T) more attention than is needed (a third at Lp = T). Merging two calls by their log-sum-exp would
cost nothing, but `jax.nn.dot_product_attention` rounds it to the output's 16 bits and drops its gradient (JAX 0.10.2
and 0.11.2).
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from srl_jax.model.families import ModelConfig

_LANES = 128  # splash works on blocks of so many positions, or multiples
_CUDNN_HEAD_DIM = 128  # before Hopper; Hopper and later go to 256


def choose(platform: str, config: ModelConfig, dtype: jnp.dtype) -> str:
    """The attention of a run, "cudnn", "splash" or "xla" (`attention.attend`): chosen once, from platform and shapes.

    `platform` is "cuda", "tpu" or another. Windows differ from layer to layer of one scan and the kernels want them
    fixed; soft caps are unknown to cuDNN: such models (Gemma) take the general form everywhere.
    """
    if config.windows or config.attention_softcap is not None:
        return "xla"
    if platform == "cuda" and dtype in (jnp.bfloat16, jnp.float16):
        return "cudnn" if config.head_dim % 8 == 0 and config.head_dim <= _CUDNN_HEAD_DIM else "xla"
    if platform == "tpu":
        return "splash"
    return "xla"


def flash_attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    prefix: tuple[Float[Array, "P K Lp H"], Float[Array, "P K Lp H"]] | None = None,
    prefix_lengths: Int[Array, "P"] | None = None,
    *,
    scale: float,
    kernel: str,
    mesh: Mesh | None = None,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Causal attention of rows to themselves and to all of the first `prefix_lengths` positions of their prompt.

    Equal to `attention.attend` with those masks. On a mesh of several devices each works on its own rows and heads.

    Args:
      q, k, v: the rows' own; row b belongs to prompt b // (B // P).
      kernel: "cudnn" or "splash"; "xla" is the same layout without a kernel, for tests.
      interpret: run splash without a TPU.
    """
    run = partial(_attend, scale=scale, kernel=kernel, interpret=interpret)
    if mesh is None or mesh.size == 1:
        return run(q, k, v, prefix, prefix_lengths)
    prompts = q.shape[0] if prefix is None else prefix[0].shape[0]
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = ("data", "fsdp") if prompts % shards == 0 else None  # a sampler's intake may be too few: each does them all
    heads = PartitionSpec(rows, "tensor")
    specs = (PartitionSpec(rows, None, "tensor"), heads, heads, heads, PartitionSpec(rows))
    # The kernels are opaque to XLA's partitioner.
    split = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False)
    return split(q, k, v, prefix, prefix_lengths)


def _attend(q, k, v, prefix, lengths, *, scale, kernel, interpret):
    q = q.transpose(0, 2, 1, 3)
    if prefix is None:
        return _causal(q, k, v, None, scale, kernel, interpret).transpose(0, 2, 1, 3)
    batch, _, t, _ = q.shape
    prompts, _, width, _ = prefix[0].shape
    starts = jnp.repeat(lengths, batch // prompts, total_repeat_length=batch)

    def place(row, own, start):
        return jax.lax.dynamic_update_slice(row, own, (0, start, 0))

    def rows(shared, own):
        row = jnp.repeat(shared, batch // prompts, axis=0, total_repeat_length=batch)
        return jax.vmap(place)(jnp.pad(row, ((0, 0), (0, 0), (0, t), (0, 0))), own, starts)

    no_queries = jnp.zeros((prompts, q.shape[1], width, q.shape[3]), q.dtype)
    out = _causal(rows(no_queries, q), rows(prefix[0], k), rows(prefix[1], v), starts + t, scale, kernel, interpret)
    take = lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, t, axis=1)
    return jax.vmap(take)(out, starts).transpose(0, 2, 1, 3)


def _causal(
    q: Float[Array, "B N W H"],
    k: Float[Array, "B K W H"],
    v: Float[Array, "B K W H"],
    lengths: Int[Array, "B"] | None,
    scale: float,
    kernel: str,
    interpret: bool,
) -> Float[Array, "B N W H"]:
    """Causal attention within rows; from `lengths` on a row holds nothing that is read."""
    if kernel == "splash":
        return _splash(q, k, v, scale, interpret)
    lengths = None if lengths is None else lengths.astype(jnp.int32)
    out = jax.nn.dot_product_attention(
        *(x.transpose(0, 2, 1, 3) for x in (q, k, v)),
        scale=scale,
        is_causal=True,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        implementation=kernel,
    )
    return out.transpose(0, 2, 1, 3)


def _splash(q, k, v, scale, interpret):
    width = q.shape[2]
    padded = -(-width // _LANES) * _LANES
    fill = ((0, 0), (0, 0), (0, padded - width), (0, 0))
    q, k, v = (jnp.pad(x, fill) for x in ((q * scale).astype(q.dtype), k, v))
    block = next(size for size in (512, 256, _LANES) if padded % size == 0)
    kernel = splash.make_splash_mha_single_device(
        splash_mask.MultiHeadMask([splash_mask.CausalMask((padded, padded))] * q.shape[1]),
        block_sizes=splash.BlockSizes(*(block,) * 8),
        interpret=interpret,
    )
    return jax.vmap(kernel)(q, k, v)[:, :, :width]
