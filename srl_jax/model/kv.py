"""Keys and values as the sampler keeps them: of the model's own type, bfloat16, or eight bits.

In int8 every vector (one token's, one head's) has a scale of its own, so that it is rounded once, when it is written,
and neither a loud neighbour nor what comes later changes it. Products are taken with the codes, and scaled outside: the
scores by the keys' scales, the probabilities by the values'. So dequantised vectors are never held; what is held beside
the codes is at most one layer's as another type, where a backend converts them to multiply.
"""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8

_LARGEST = 127  # of a code; -128 is not used, so that the range is symmetric


@flax.struct.dataclass
class QuantizedKV:
    """Vectors of H numbers in int8: `codes * scale`. Arrays of any leading shape."""

    codes: Int8[Array, "... H"]
    scale: Float[Array, "..."]


KV = Array | QuantizedKV


@flax.struct.dataclass
class KeyColumns:
    """Keys as a decode step reads them: vectors (or their codes) [.., H, S], each a column; scales [.., S] as ever.

    A product of few queries with keys stored as rows transposes them first, which on a CPU takes as long again.
    """

    kv: KV


def as_columns(keys: KV) -> KeyColumns:
    """`keys` [.., S, H] as columns."""
    if isinstance(keys, QuantizedKV):
        return KeyColumns(QuantizedKV(jnp.swapaxes(keys.codes, -1, -2), keys.scale))
    return KeyColumns(jnp.swapaxes(keys, -1, -2))


def store(x: Float[Array, "... H"], dtype: jnp.dtype) -> KV:
    """`x` as it is kept: in `dtype`, int8 being codes with a scale for each vector."""
    if dtype != jnp.int8:
        return x.astype(dtype)
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1) / _LARGEST
    # A vector of zeros has codes of zero, whatever it is divided by.
    codes = jnp.round(x / jnp.where(scale == 0, 1, scale)[..., None])
    return QuantizedKV(codes.astype(jnp.int8), scale)


def empty(shape: tuple[int, ...], dtype: jnp.dtype) -> KV:
    """Room for vectors: `shape` with H last."""
    if dtype != jnp.int8:
        return jnp.zeros(shape, dtype)
    return QuantizedKV(jnp.zeros(shape, jnp.int8), jnp.zeros(shape[:-1], jnp.float32))


def score(q: Float[Array, "B K M H"], keys: KV | KeyColumns) -> Float[Array, "B K M S"]:
    """`q` times each of `keys` [B, K, S, H], float32."""
    product, keys = ("bkmh,bkhs->bkms", keys.kv) if isinstance(keys, KeyColumns) else ("bkmh,bksh->bkms", keys)
    numbers = keys.codes if isinstance(keys, QuantizedKV) else keys
    scores = jnp.einsum(product, q, numbers.astype(q.dtype), preferred_element_type=jnp.float32)
    return scores * keys.scale[:, :, None, :] if isinstance(keys, QuantizedKV) else scores


def mix(weights: Float[Array, "B K M S"], values: KV, dtype: jnp.dtype) -> Float[Array, "B K M H"]:
    """The sum of `values` [B, K, S, H] by `weights`, multiplied in `dtype`, float32."""
    if isinstance(values, QuantizedKV):
        weights, values = weights * values.scale[:, :, None, :], values.codes
    return jnp.einsum(
        "bkms,bksh->bkmh", weights.astype(dtype), values.astype(dtype), preferred_element_type=jnp.float32
    )


def width(kv: KV) -> int:
    """S of vectors [.., S, H]."""
    return (kv.codes if isinstance(kv, QuantizedKV) else kv).shape[-2]


def write(cache: KV | KeyColumns, layer: Int[Array, ""], columns: Int[Array, "B T"], new: KV) -> KV | KeyColumns:
    """The cache [L, B, K, S, H] with `new` vectors [B, K, T, H] of one layer; those beyond its end are dropped."""
    rows, every = jnp.arange(columns.shape[0])[:, None], slice(None)
    vectors = (layer, rows, every, every, columns) if isinstance(cache, KeyColumns) else (layer, rows, every, columns)

    def put(old: Array, x: Array) -> Array:
        at = vectors if x.ndim == 4 else (layer, rows, every, columns)  # scales have no H
        return old.at[at].set(jnp.swapaxes(x, 1, 2).astype(old.dtype), mode="drop")

    if isinstance(cache, KeyColumns):
        return KeyColumns(jax.tree.map(put, cache.kv, new))
    return jax.tree.map(put, cache, new)
