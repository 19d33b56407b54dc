"""Attention of a completion to itself and to a prompt it shares with its group, in general: any platform, any mask.

flash.py has kernels for the plain causal case on GPUs and TPUs.

One function serves prefill (no prefix), the cached decode step (one query) and the training pass (many queries):
P prompts are held once, the B = P*G rows that continue them only point at them, so neither their keys nor their
values are ever copied G times. Softmax runs over both parts together, which is exact.

The backward pass is written out, as in FlashAttention (arXiv 2205.14135): it keeps the output and one normaliser per
query and computes the probabilities again. Derived by JAX it took 10 times the forward pass on a CPU, not 2.5.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from srl_jax.model.kv import KV, KeyColumns, mix, score

# Finite, so that a row in which everything is masked gives a uniform softmax instead of NaN.
MASKED = -1e30
# What a rematerialised layer had better keep: the output and its normaliser. Without them the backward pass would run
# the forward pass once more, only to compute the probabilities yet again.
ATTENDED = "attended"

_BLOCKS, _LEAST_BLOCK = 4, 128  # of queries in `attend_causal`

_Prefix = tuple[KV | KeyColumns, KV]  # [P, K, Lp, H] each


def attend(
    q: Float[Array, "B T N H"],
    k: KV | KeyColumns,
    v: KV,
    mask: Bool[Array, "#B T S"],
    prefix: _Prefix | None = None,
    prefix_mask: Bool[Array, "P #G #T Lp"] | None = None,
    *,
    scale: float,
    softcap: float | None = None,
) -> Float[Array, "B T N H"]:
    """Grouped-query attention over the row's own keys and, when given, its prompt's.

    Args:
      q: queries; row b belongs to prompt b // (B // P).
      k, v: the row's own keys and values [B, K, S, H], heads before positions so that each head's slab is contiguous.
        In the types that only a cache has (model/kv.py) these and the prefix have no gradient.
      mask: True where a query may see an own key.
      prefix: keys and values of the P shared prompts.
      prefix_mask: True where a query of the group may see a prompt position.
      scale: multiplies the scores before the softmax.
      softcap: squashes the scaled scores to (-softcap, softcap).
    """
    batch, t, n, h = q.shape
    n_kv = jax.tree.leaves(k)[0].shape[1]
    repeats = n // n_kv
    # The query heads that share a KV head become rows of one matrix product: [B, K, R*T, H].
    rows = (q * scale).reshape(batch, t, n_kv, repeats, h).transpose(0, 2, 3, 1, 4)
    rows = rows.reshape(batch, n_kv, repeats * t, h)
    out = _attend(softcap, rows, k, v, prefix, mask, prefix_mask)
    return out.reshape(batch, n_kv, repeats, t, h).transpose(0, 3, 1, 2, 4).reshape(batch, t, n, h)


def attend_causal(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    mask: Bool[Array, "#B T T"],
    prefix: _Prefix | None = None,
    prefix_mask: Bool[Array, "P #G #T Lp"] | None = None,
    *,
    scale: float,
    softcap: float | None = None,
) -> Float[Array, "B T N H"]:
    """`attend` for a `mask` that shows query i no key behind i: a block of queries at a time, such keys not computed.

    Four blocks spare three eighths of the scores, and hold a quarter of them at once; more would spare an eighth at
    most.
    """
    t = q.shape[1]
    block = max(_LEAST_BLOCK, -(-t // _BLOCKS))
    out = []
    for start in range(0, t, block):
        stop = min(start + block, t)
        before = prefix_mask
        if prefix_mask is not None and prefix_mask.shape[2] > 1:
            before = prefix_mask[:, :, start:stop]
        out.append(
            attend(
                q[:, start:stop], k[:, :, :stop], v[:, :, :stop], mask[:, start:stop, :stop], prefix, before,
                scale=scale, softcap=softcap,
            )
        )  # fmt: skip
    return out[0] if len(out) == 1 else jnp.concatenate(out, axis=1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(softcap, q, k, v, prefix, mask, prefix_mask):
    return _forward(softcap, q, k, v, prefix, mask, prefix_mask)[0]


def _group(x: Float[Array, "B K M H"], prompts: int) -> Float[Array, "P K GM H"]:
    """Rows of a group side by side, so that all of them meet their prompt's keys in one product."""
    batch, heads, rows, last = x.shape
    x = x.reshape(prompts, batch // prompts, heads, rows, last).transpose(0, 2, 1, 3, 4)
    return x.reshape(prompts, heads, -1, last)


def _ungroup(x: Float[Array, "P K GM H"], batch: int) -> Float[Array, "B K M H"]:
    prompts, heads, _, last = x.shape
    x = x.reshape(prompts, heads, batch // prompts, -1, last).transpose(0, 2, 1, 3, 4)
    return x.reshape(batch, heads, -1, last)


def _capped(scores: Float[Array, "..."], softcap: float | None) -> Float[Array, "..."]:
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def _own_scores(q, k, mask, softcap):
    scores = _capped(score(q, k), softcap)
    batch, heads, _, s = scores.shape
    t = mask.shape[1]
    scores = jnp.where(mask[:, None, None], scores.reshape(batch, heads, -1, t, s), MASKED)
    return scores.reshape(batch, heads, -1, s)


def _prefix_scores(q, prefix_k, prefix_mask, softcap):
    scores = _capped(score(q, prefix_k), softcap)
    p, heads, _, s = scores.shape
    # Rows come as [G, R, T]; where the mask is the same for all of G or T, these fold into R.
    folded = scores.reshape(p, heads, prefix_mask.shape[1], -1, prefix_mask.shape[2], s)
    return jnp.where(prefix_mask[:, None, :, None, :, :], folded, MASKED).reshape(p, heads, -1, s)


def _forward(softcap, q, k, v, prefix, mask, prefix_mask):
    own = _own_scores(q, k, mask, softcap)
    top = own.max(-1, keepdims=True)
    if prefix is None:
        own = jnp.exp(own - top)
        total = own.sum(-1, keepdims=True)
        out = mix(own, v, q.dtype)
    else:
        prefix_k, prefix_v = prefix
        prompts, batch = prefix_mask.shape[0], q.shape[0]
        shared = _prefix_scores(_group(q, prompts), prefix_k, prefix_mask, softcap)
        top = jnp.maximum(top, _ungroup(shared.max(-1, keepdims=True), batch))
        own, shared = jnp.exp(own - top), jnp.exp(shared - _group(top, prompts))
        total = own.sum(-1, keepdims=True) + _ungroup(shared.sum(-1, keepdims=True), batch)
        out = mix(own, v, q.dtype) + _ungroup(mix(shared, prefix_v, q.dtype), batch)
    out = checkpoint_name((out / total).astype(q.dtype), ATTENDED)
    return out, (q, k, v, prefix, mask, prefix_mask, out, checkpoint_name(top + jnp.log(total), ATTENDED))


def _through_softmax(scores, normaliser, d_out, values, delta, softcap):
    """(probabilities, d loss / d scores before the cap) of one part, from its scores and the joint normaliser."""
    probs = jnp.exp(scores - normaliser)
    d_probs = jnp.einsum("bkmh,bksh->bkms", d_out, values, preferred_element_type=jnp.float32)
    d_scores = probs * (d_probs - delta)
    if softcap is not None:
        # 1 - tanh^2; a masked score is far below -softcap and gets slope 0.
        d_scores = d_scores * (1.0 - jnp.square(jnp.maximum(scores / softcap, -1.0)))
    return probs.astype(values.dtype), d_scores.astype(values.dtype)


def _backward(softcap, residuals, d_out):
    q, k, v, prefix, mask, prefix_mask, out, normaliser = residuals
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), -1, keepdims=True)
    probs, d_scores = _through_softmax(_own_scores(q, k, mask, softcap), normaliser, d_out, v, delta, softcap)
    d_q = jnp.einsum("bkms,bksh->bkmh", d_scores, k)
    d_k = jnp.einsum("bkms,bkmh->bksh", d_scores, q)
    d_v = jnp.einsum("bkms,bkmh->bksh", probs, d_out)
    if prefix is None:
        return d_q, d_k, d_v, None, None, None
    prefix_k, prefix_v = prefix
    prompts = prefix_k.shape[0]
    q, d_out, normaliser, delta = (_group(x, prompts) for x in (q, d_out, normaliser, delta))
    scores = _prefix_scores(q, prefix_k, prefix_mask, softcap)
    probs, d_scores = _through_softmax(scores, normaliser, d_out, prefix_v, delta, softcap)
    d_q = d_q + _ungroup(jnp.einsum("pkms,pksh->pkmh", d_scores, prefix_k), d_q.shape[0])
    d_prefix = jnp.einsum("pkms,pkmh->pksh", d_scores, q), jnp.einsum("pkms,pkmh->pksh", probs, d_out)
    return d_q, d_k, d_v, d_prefix, None, None


_attend.defvjp(_forward, _backward)
