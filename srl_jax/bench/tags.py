"""Whether an untrained model closes its thought as readily with atomic tags as with tags of plain text."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from srl_jax import assets
from srl_jax.model import hf
from srl_jax.model.decoder import Decoder, logits
from srl_jax.records import TeacherRecord
from srl_jax.student import tag_rows
from srl_jax.tokenizer import Tokenizer, load_tokenizer
from srl_jax.trace import TAGS, parse_trace

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


def _mean_rows(tokenizer: Tokenizer) -> hf.NewRows:
    """The usual start of a new token's row: the mean of the rows of the text it replaces."""
    return {
        tag: {piece: ids.count(piece) / len(ids) for piece in ids}
        for tag, ids in zip(tokenizer.tag_ids, tokenizer.tag_source_ids, strict=False)
        if tag in tokenizer.added_tag_ids
    }


def compare(records: Sequence[TeacherRecord], *, few_shot: int) -> list[dict[str, float | str]]:
    """Closing chances of the untrained SmolLM2 at the end of the teacher's thoughts, a record for each kind of tags."""
    path = assets.fetch("smollm2-135m-instruct")
    kinds = {"plain text": (False, None), "atomic": (True, tag_rows), "atomic, mean rows": (True, _mean_rows)}
    found = []
    for name, (atomic, rows) in kinds.items():
        tokenizer = load_tokenizer(path, atomic_tags=atomic)
        config, params = hf.load_params(path, new_rows=rows(tokenizer) if rows else {})
        cases = [
            (tokenizer.encode_prompt(record.task, few_shot=few_shot), parse_trace(record.trace).think)
            for record in records
        ]
        chances, greedy = closing_chance(Decoder(config), params, tokenizer, cases)
        found.append(
            {
                "tags": name,
                "thoughts": len(records),
                "mean chance": float(chances.mean()),
                "median chance": float(np.median(chances)),
                "closed by greedy decoding": f"{int(greedy.sum())} of {len(records)}",
            }
        )
    return found
