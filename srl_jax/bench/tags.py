"""Whether an untrained model closes its thought as readily with atomic tags as with tags of plain text."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from srl_jax.model.decoder import Decoder, logits
from srl_jax.tokenizer import Tokenizer
from srl_jax.trace import TAGS

_BUCKET = 128  # tokens; lengths are padded to a multiple, so that few shapes are compiled


def closing_chance(
    decoder: Decoder, params: dict, tokenizer: Tokenizer, cases: Sequence[tuple[list[int], str]]
) -> tuple[np.ndarray, np.ndarray]:
    """How likely the model ends a given thought where it ends, and whether greedy decoding would close there.

    The thought's last character counts with the tag: a tokenizer may join it with plain text that follows, so that only
    the two together are one event under both kinds of tags.

    Args:
      cases: prompt ids, up to where the trace starts, and the thought that follows `<think>`.

    Returns:
      [N] probability of the last character and `</think>` after the rest, other tags excluded, which the grammar
      forbids inside a thought; [N] bool, whether the likeliest token after the whole thought starts `</think>`.
    """
    hidden_of = jax.jit(lambda params, tokens, positions: decoder.apply({"params": params}, tokens, positions)[0])
    forbidden = [tag for text, tag in zip(TAGS, tokenizer.tag_ids, strict=False) if text != TAGS[1]]
    chances, greedy = [], []
    for prompt, thought in cases:
        whole = prompt + tokenizer.encode(TAGS[0] + thought + TAGS[1])
        stem = prompt + tokenizer.encode(TAGS[0] + thought[:-1])
        same = [a == b for a, b in zip(whole, stem, strict=False)]
        shared = same.index(False) if False in same else len(same)
        length = -(-len(whole) // _BUCKET) * _BUCKET
        tokens = np.zeros((1, length), np.int32)
        tokens[0, : len(whole)] = whole
        hidden = hidden_of(params, jnp.asarray(tokens), jnp.arange(length)[None])[0, shared - 1 : len(whole) - 1]
        scores = np.array(logits(decoder.config, params, hidden))
        scores[:, forbidden] = -np.inf
        logprobs = np.asarray(jax.nn.log_softmax(scores))
        chances.append(np.exp(sum(logprobs[i, token] for i, token in enumerate(whole[shared:]))))
        closing = tokenizer.encode(TAGS[1])
        greedy.append(scores[len(whole) - len(closing) - shared].argmax() == closing[0])
    return np.asarray(chances), np.asarray(greedy)
