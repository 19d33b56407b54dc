"""Log-probs of given tokens under the constrained policy, without ever holding `[N, V]`.

The policy is the model renormalised over the tokens the grammar allows, at the sampling temperature: every
log-prob in training (policy, old policy, reference) comes from here, so that a ratio compares like with like.

One pass over chunks of tokens. A token's log-prob depends on the loss through one scalar cotangent only
and the head is frozen, so the forward pass already knows d logprob / d hidden up to that scalar: it
multiplies by the head twice (logits, and coefficients back to `[N, D]`) and the backward pass is an
elementwise product. The usual chunked form (`checkpoint` in a `map`) multiplies three times.

Tokens whose answer is known need no product at all: padding, and what the grammar forced (log-prob 0, no gradient). The
others are gathered in front, and the loop ends behind the last of them, in one compiled program for any number.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Rows of the constraint pytree for some tokens -> which of the V tokens each may be.
AllowedFrom = Callable[[Any], Bool[Array, "n V"]]

# The log-prob reported for a target outside its allowed set (or of a row that allows nothing): exp of it
# is 0 in fp32, differences and products stay finite, and its gradient is zero. Log-probs of allowed
# targets are never clamped.
FORBIDDEN_LOGPROB = -1e4

# Measured 2026-11-23, 2-core Xeon (AVX-512), fp32, N 1024, D 576, V 49,158, values with gradient under a grammar-like
# mask, GFLOP/s of two head products and MiB of temporaries at chunk 32: 130, 17; 64: 140, 29; 128: 175, 53; 256: 196,
# 101; 512: 204, 197; 1024: 191, 384. The mask costs under 2 %. A head stored [D, V] makes the logits' product 70
# instead of 112 GFLOP/s, hence [V, D] for both products. Compiled for T 8192, D 896, V 151,936 in fp32 a gradient takes
# 353 MiB of temporaries, the full form 4,748.
DEFAULT_CHUNK_SIZE = 256


class TokenLogprobs(NamedTuple):
    """Per token, fp32. What was not asked for is None; tokens that were not wanted have 0 everywhere."""

    logprobs: Float[Array, "P N"]
    entropy: Float[Array, "P N"] | None  # nats, of the constrained distribution
    ref_logprobs: Float[Array, "P N"] | None
    kl: Float[Array, "P N"] | None  # exact KL(policy || reference) over the allowed set


@dataclass(frozen=True)
class _Spec:
    """The static part: what to compute, not on what."""

    allowed_from: AllowedFrom | None
    softcap: float | None
    chunk_size: int
    compute_entropy: bool
    compute_kl: bool
    entropy_gradient: bool
    kl_gradient: bool


def token_logprobs(
    hidden: Float[Array, "P N D"],
    head: Float[Array, "V D"],
    targets: Int[Array, "P N"],
    *,
    wanted: Bool[Array, "P N"] | None = None,
    allowed_from: AllowedFrom | None = None,
    constraint: Any = None,
    reference_hidden: Float[Array, "P N D"] | None = None,
    temperature: float | Float[Array, ""] = 1.0,
    softcap: float | None = None,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    compute_entropy: bool = True,
    compute_kl: bool = False,
    entropy_gradient: bool = False,
    kl_gradient: bool = False,
) -> TokenLogprobs:
    """log softmax over the allowed tokens of `softcap(hidden @ head.T) / temperature`, at `targets`.

    `hidden` is the decoder's output after its final norm, one row for each token to score (the position *before* it),
    `head` the unembedding, `targets` ids in [0, V), padding's too. `wanted` tells which tokens are to be computed, by
    default all; the others get zeros.
    `constraint` is a pytree of arrays with leading axes P, N (grammar states, budgets); `allowed_from` turns any rows
    of it, [n, ..], into a bool `[n, V]`. A forced token has log-prob, entropy and gradient exactly 0.
    `reference_hidden` is the same tokens' hidden rows of the frozen model: `ref_logprobs` then comes from the same
    chunk and mask, and `compute_kl` adds the exact divergence.
    `softcap` is Gemma's: logits become softcap * tanh(logits / softcap), before the temperature.
    `chunk_size` bounds the tokens in flight *over all devices*; temporaries are about 2 * chunk_size * V * 4 bytes.

    Gradients reach `hidden` only. `head`, `reference_hidden` and `temperature` get zero: the head is frozen under LoRA.
    `entropy` and `kl` are diagnostics with zero gradient unless `entropy_gradient` / `kl_gradient` ask for a further
    `[P, N, D]` residual each. Products run in the operands' dtype and accumulate in fp32; what "fp32" means to an
    accelerator's product (TF32?) is for `jax_default_matmul_precision` to say, as in the rest of the model.

    Every chunk has as many tokens of each of the P, so that with P sharded over a mesh axis every device has its share
    of every chunk, and its own tokens only.
    """
    if hidden.shape[-1] != head.shape[-1]:
        raise ValueError(f"hidden is {hidden.shape} but head is {head.shape}: both end in D")
    if (allowed_from is None) != (constraint is None):
        raise ValueError("allowed_from and constraint go together: give both or neither")
    if compute_kl and reference_hidden is None:
        raise ValueError("compute_kl needs reference_hidden")
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be at least 1")
    spec = _Spec(
        allowed_from=allowed_from,
        softcap=softcap,
        chunk_size=chunk_size,
        compute_entropy=compute_entropy or entropy_gradient,
        compute_kl=compute_kl,
        entropy_gradient=entropy_gradient,
        kl_gradient=kl_gradient and compute_kl,
    )
    # Everything the chunks see is constant: their derivative is computed, not traced. No custom_vjp
    # encloses `allowed_from`, which may therefore close over traced arrays (the automaton of a jitted
    # step, under grad, scan and remat alike).
    rows = jax.lax.stop_gradient((hidden, reference_hidden, targets, constraint))
    chunk = partial(_chunk, spec, jax.lax.stop_gradient(head), jax.lax.stop_gradient(jnp.float32(temperature)))
    values, jacobian = _map_chunks(chunk, rows, wanted, spec.chunk_size)
    return _with_jacobian(hidden, values, jacobian)


@jax.custom_vjp
def _with_jacobian(hidden: Float[Array, "P N D"], values: TokenLogprobs, jacobian: TokenLogprobs) -> TokenLogprobs:
    """`values`, whose derivatives by their own row of `hidden` are `jacobian`.

    Where nobody differentiates, `jacobian` is dead and the compiler drops its head product from the loop
    (a test counts the products).
    """
    return values


def _forward(hidden, values, jacobian):
    return values, jacobian


def _backward(jacobian: TokenLogprobs, cotangent: TokenLogprobs):
    d_hidden = sum(
        g[..., None] * jac.astype(jnp.float32) for g, jac in zip(cotangent, jacobian, strict=True) if jac is not None
    )
    return d_hidden.astype(jacobian.logprobs.dtype), None, None


_with_jacobian.defvjp(_forward, _backward)


def _map_chunks(chunk: Callable[[Any], Any], rows: Any, wanted: Bool[Array, "P N"] | None, chunk_size: int) -> Any:
    """`chunk` over the wanted rows of every leaf [P, N, ..] of `rows`, some of each P at a time; the others give 0."""
    p, n = jax.tree.leaves(rows)[0].shape[:2]
    count = -(-n // max(1, chunk_size // p))
    size = -(-n // count)  # equal chunks
    together = lambda x: x.reshape(p * size, *x.shape[2:])
    apart = lambda x: x.reshape(p, size, *x.shape[1:])
    if count == 1:
        out = jax.tree.map(apart, chunk(jax.tree.map(together, rows)))
    else:
        limit, order = count, None
        if wanted is not None:
            order = jnp.argsort(~wanted, axis=1, stable=True)
            limit = -(-wanted.sum(axis=1).max() // size)

        def arrange(x: Array) -> Array:
            x = x if order is None else _take(x, order)
            return jnp.pad(x, [(0, 0), (0, size * count - n)] + [(0, 0)] * (x.ndim - 2))

        arranged = jax.tree.map(arrange, rows)

        def body(index: Int[Array, ""], out: Any) -> Any:
            piece = jax.tree.map(lambda x: together(jax.lax.dynamic_slice_in_dim(x, index * size, size, 1)), arranged)
            put = lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, apart(new), index * size, 1)
            return jax.tree.map(put, out, chunk(piece))

        piece = jax.tree.map(lambda x: jax.ShapeDtypeStruct((p * size, *x.shape[2:]), x.dtype), arranged)
        empty = jax.tree.map(
            lambda x: jnp.zeros((p, size * count, *x.shape[1:]), x.dtype), jax.eval_shape(chunk, piece)
        )
        out = jax.tree.map(lambda x: x[:, :n], jax.lax.fori_loop(0, limit, body, empty))
        if order is not None:
            back = jnp.argsort(order, axis=1)
            out = jax.tree.map(lambda x: _take(x, back), out)
    if wanted is None:
        return out
    return jax.tree.map(lambda x: jnp.where(wanted.reshape(p, n, *[1] * (x.ndim - 2)), x, 0), out)


def _take(x: Array, order: Int[Array, "P N"]) -> Array:
    """Rows of `x` [P, N, ..] in another order, each P's among themselves."""
    return jax.vmap(lambda rows, at: rows[at])(x, order)


class _Distribution(NamedTuple):
    """The constrained distribution of n tokens; `-inf` and 0 outside the allowed set."""

    logprobs: Float[Array, "n V"]
    probs: Float[Array, "n V"]
    slope: Float[Array, "n V"] | Float[Array, ""]  # d (scaled logit) / d (head product)


def _distribution(
    spec: _Spec,
    head: Float[Array, "V D"],
    temperature: Float[Array, ""],
    hidden: Float[Array, "n D"],
    allowed: Bool[Array, "n V"] | None,
) -> _Distribution:
    logits = jnp.einsum("nd,vd->nv", hidden, head, preferred_element_type=jnp.float32)
    slope = 1.0 / temperature
    if spec.softcap is not None:
        squashed = jnp.tanh(logits / spec.softcap)
        logits = spec.softcap * squashed
        slope = slope * (1.0 - jnp.square(squashed))
    logits = logits / temperature
    if allowed is not None:
        logits = jnp.where(allowed, logits, -jnp.inf)
    top = jnp.max(logits, axis=-1, keepdims=True)
    shifted = logits - jnp.where(jnp.isneginf(top), 0.0, top)
    weights = jnp.exp(shifted)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    total = jnp.where(total == 0, 1.0, total)
    return _Distribution(shifted - jnp.log(total), weights / total, slope)


def _statistics(
    spec: _Spec, policy: _Distribution, reference: _Distribution | None, targets: Int[Array, "n"]
) -> TokenLogprobs:
    return TokenLogprobs(
        logprobs=_at_targets(policy, targets),
        entropy=-_expect(policy, policy.logprobs) if spec.compute_entropy else None,
        ref_logprobs=None if reference is None else _at_targets(reference, targets),
        kl=_expect(policy, policy.logprobs - reference.logprobs) if spec.compute_kl else None,
    )


def _at_targets(distribution: _Distribution, targets: Int[Array, "n"]) -> Float[Array, "n"]:
    picked = jnp.take_along_axis(distribution.logprobs, targets[:, None], axis=-1)[:, 0]
    # Only -inf is replaced: a NaN out of a broken model must be seen, not turned into an ordinary number.
    return jnp.where(jnp.isneginf(picked), FORBIDDEN_LOGPROB, picked)


def _expect(distribution: _Distribution, values: Float[Array, "n V"]) -> Float[Array, "n"]:
    """E_p[values]; where p is 0 the values (-inf, or inf - inf) do not matter."""
    return jnp.sum(jnp.where(distribution.probs == 0, 0.0, distribution.probs * values), axis=-1)


def _chunk(spec: _Spec, head, temperature, rows) -> tuple[TokenLogprobs, TokenLogprobs]:
    """Values, and for each differentiable one its derivative by the hidden row, `[n, D]`, in `hidden`'s
    dtype."""
    hidden, reference_hidden, targets, constraint = rows
    allowed = None if spec.allowed_from is None else spec.allowed_from(constraint)
    policy = _distribution(spec, head, temperature, hidden, allowed)
    reference = None
    if reference_hidden is not None:
        reference = _distribution(spec, head, temperature, reference_hidden, allowed)
    values = _statistics(spec, policy, reference, targets)
    probs, logprobs = policy.probs, policy.logprobs

    def to_hidden(coefficients: Float[Array, "n V"]) -> Float[Array, "n D"]:
        coefficients = (coefficients * policy.slope).astype(jnp.promote_types(hidden.dtype, head.dtype))
        product = jnp.einsum("nv,vd->nd", coefficients, head, preferred_element_type=jnp.float32)
        return product.astype(hidden.dtype)

    # One-hot minus p, in one product: for a forced token 1 - 1 cancels exactly, before any rounding.
    is_target = jnp.arange(head.shape[0], dtype=targets.dtype)[None, :] == targets[:, None]
    reachable = values.logprobs != FORBIDDEN_LOGPROB
    d_logprobs = jnp.where(reachable[:, None], is_target.astype(jnp.float32) - probs, 0.0)
    d_entropy = d_kl = None
    if spec.entropy_gradient:
        d_entropy = to_hidden(jnp.where(probs == 0, 0.0, -probs * (logprobs + values.entropy[:, None])))
    if spec.kl_gradient:
        excess = logprobs - reference.logprobs - values.kl[:, None]
        d_kl = to_hidden(jnp.where(probs == 0, 0.0, probs * excess))
    return values, TokenLogprobs(to_hidden(d_logprobs), d_entropy, None, d_kl)
