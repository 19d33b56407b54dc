"""Keys and values as the sampler keeps them: of the model's own type, bfloat16, or eight bits.

In int8 every vector (one token's, one head's) has a scale of its own, so that it is rounded once, when it is written,
and neither a loud neighbour nor what comes later changes it. Products are taken with the codes, and scaled outside: the
scores by the keys' scales, the probabilities by the values'. So dequantised vectors are never held; what is held beside
the codes is at most one layer's as another type, where a backend converts them to multiply.
"""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

_LARGEST = 127  # of a code; -128 is not used, so that the range is symmetric


@flax.struct.dataclass
class QuantizedKV:
    """Vectors of H numbers in int8: `codes * scale`. Arrays of any leading shape."""

    codes: Int8[Array, "... H"]
    scale: Float[Array, "..."]


KV = Array | QuantizedKV


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


def score(q: Float[Array, "B K M H"], keys: KV) -> Float[Array, "B K M S"]:
    """`q` times each of `keys` [B, K, S, H], float32."""
    if not isinstance(keys, QuantizedKV):
        return _score(q, keys.astype(q.dtype))
    return _score(q, keys.codes.astype(q.dtype)) * keys.scale[:, :, None, :]


def mix(weights: Float[Array, "B K M S"], values: KV, dtype: jnp.dtype) -> Float[Array, "B K M H"]:
    """The sum of `values` [B, K, S, H] by `weights`, multiplied in `dtype`, float32."""
    if isinstance(values, QuantizedKV):
        weights, values = weights * values.scale[:, :, None, :], values.codes
    return jnp.einsum(
        "bkms,bksh->bkmh", weights.astype(dtype), values.astype(dtype), preferred_element_type=jnp.float32
    )


def _score(q, keys):
    return jnp.einsum("bkmh,bksh->bkms", q, keys, preferred_element_type=jnp.float32)


def width(kv: KV) -> int:
    """S of vectors [.., S, H]."""
    return (kv.codes if isinstance(kv, QuantizedKV) else kv).shape[-2]


def write(cache: KV, at: tuple, new: KV) -> KV:
    """The cache [L, B, K, S, H] with the vectors `new` [B, K, T, H] at layer, row and columns `at`; beyond: dropped."""

    def put(old: Array, x: Array) -> Array:
        return old.at[at].set(jnp.swapaxes(x, 1, 2).astype(old.dtype), mode="drop")

    return jax.tree.map(put, cache, new)
