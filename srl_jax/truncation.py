"""Top-k and top-p: which tokens the sampler kept, as the set that all later log-probs are renormalised over.

The set is part of what was sampled, like the grammar's mask: it belongs to the policy that sampled, at its temperature.
Found anew by the trainer it would drift with every update, and ratios would compare different supports; scored over the
whole softmax instead they are biased. So its ids are stored with each token drawn, and policy, old policy and reference
are all renormalised over them (as DeepSeek-V3.2 keeps its sampling mask, arXiv 2512.02556). That is why top-p works
within top-k: what is stored must have a bound.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

# Where fewer than k tokens were kept. Beyond any vocabulary, so that writes there are dropped.
NOTHING = np.iinfo(np.int32).max


def keep_likeliest(
    scores: Float[Array, "B V"], top_k: int, top_p: float
) -> tuple[Float[Array, "B k"], Int[Array, "B k"]]:
    """The scores and ids of the `top_k` likeliest tokens, of these the fewest whose probability reaches `top_p`.

    `scores` are logits at the sampling temperature, -inf where forbidden. Likeliest first, the lower id first among
    equals; what is not kept has score -inf and id `NOTHING`. As in transformers and vLLM, the probabilities that
    `top_p` counts are renormalised over the `top_k`.
    """
    kept, tokens = jax.lax.top_k(scores, top_k)
    inside = ~jnp.isneginf(kept)
    if top_p < 1.0:
        probs = jax.nn.softmax(kept, axis=-1)
        inside &= jnp.cumsum(probs, axis=-1) - probs < top_p
    return jnp.where(inside, kept, -jnp.inf), jnp.where(inside, tokens, NOTHING)


def restrict(allowed: Bool[Array, "n V"], kept: Int[Array, "n k"]) -> Bool[Array, "n V"]:
    """`allowed` without what was not kept. A row that kept nothing was never truncated: it stays as it is."""
    mark = jax.vmap(lambda row, tokens: row.at[tokens].set(True, mode="drop"))
    untouched = (kept == NOTHING).all(axis=-1, keepdims=True)
    return allowed & (mark(jnp.zeros_like(allowed), kept) | untouched)
