"""Attention of a completion to itself and to a prompt it shares with its group.

One function serves prefill (no prefix), the cached decode step (one query) and the training pass (many queries):
P prompts are held once, the B = P*G rows that continue them only point at them, so neither their keys nor their
values are ever copied G times. Softmax runs over both parts together, which is exact.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

# Finite, so that a row in which everything is masked gives a uniform softmax instead of NaN.
MASKED = -1e30


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    mask: Bool[Array, "#B T S"],
    prefix: tuple[Float[Array, "P K Lp H"], Float[Array, "P K Lp H"]] | None = None,
    prefix_mask: Bool[Array, "P Lp"] | None = None,
    *,
    scale: float,
) -> Float[Array, "B T N H"]:
    """Grouped-query attention over the row's own keys and, when given, its prompt's.

    Args:
      q: queries; row b belongs to prompt b // (B // P).
      k, v: the row's own keys and values, heads before positions so that each head's slab is contiguous.
      mask: True where a query may see an own key.
      prefix: keys and values of the P shared prompts.
      prefix_mask: True on a prompt's real positions. Every query of the group sees all of them.
      scale: multiplies the scores before the softmax.
    """
    batch, t, n, h = q.shape
    n_kv = k.shape[1]
    repeats = n // n_kv
    # [B, K, R*T, H]: the R query heads that share a KV head become rows of one matrix product.
    qh = (q * scale).reshape(batch, t, n_kv, repeats, h).transpose(0, 2, 3, 1, 4).reshape(batch, n_kv, repeats * t, h)
    f32 = jnp.float32
    own = jnp.einsum("bkqh,bksh->bkqs", qh, k, preferred_element_type=f32).reshape(batch, n_kv, repeats, t, -1)
    own = jnp.where(mask[:, None, None, :, :], own, MASKED)
    if prefix is None:
        probs = jax.nn.softmax(own, axis=-1).astype(v.dtype).reshape(batch, n_kv, repeats * t, -1)
        out = jnp.einsum("bkqs,bksh->bkqh", probs, v)
    else:
        prefix_k, prefix_v = prefix
        p = prefix_k.shape[0]
        g = batch // p
        rows = g * repeats * t
        # All G rows of a group read the prompt's keys in one product: prefix traffic is divided by G.
        qp = qh.reshape(p, g, n_kv, repeats * t, h).transpose(0, 2, 1, 3, 4).reshape(p, n_kv, rows, h)
        shared = jnp.einsum("pkqh,pksh->pkqs", qp, prefix_k, preferred_element_type=f32)
        shared = jnp.where(prefix_mask[:, None, None, :], shared, MASKED)
        own = own.reshape(p, g, n_kv, repeats * t, -1).transpose(0, 2, 1, 3, 4).reshape(p, n_kv, rows, -1)
        # Both parts relative to the joint maximum, each summed where it lies: no concatenated copy of the keys.
        top = jax.lax.stop_gradient(jnp.maximum(shared.max(-1, keepdims=True), own.max(-1, keepdims=True)))
        shared, own = jnp.exp(shared - top), jnp.exp(own - top)
        total = shared.sum(-1, keepdims=True) + own.sum(-1, keepdims=True)
        own_rows = (own / total).astype(v.dtype).reshape(p, n_kv, g, repeats * t, -1).transpose(0, 2, 1, 3, 4)
        out_own = jnp.einsum("bkqs,bksh->bkqh", own_rows.reshape(batch, n_kv, repeats * t, -1), v)
        out_shared = jnp.einsum("pkqs,pksh->pkqh", (shared / total).astype(v.dtype), prefix_v)
        out_shared = out_shared.reshape(p, n_kv, g, repeats * t, h).transpose(0, 2, 1, 3, 4)
        out = out_own + out_shared.reshape(batch, n_kv, repeats * t, h)
    return out.reshape(batch, n_kv, repeats, t, h).transpose(0, 3, 1, 2, 4).reshape(batch, t, n, h)
