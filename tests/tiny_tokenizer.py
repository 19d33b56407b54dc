"""Small byte-level BPE tokenizers for tests: the real class on a vocabulary of hundreds, built in milliseconds."""

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from srl_jax.tokenizer import Tokenizer

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

# Trained on text with JSON around code, so that tokens span the boundaries the grammar cares about (`","`, `"}`).
_CORPUS = [
    '{"language":"python","pattern":"print($X)","replacement":"","files":["src/app.py","src/db.py"]}',
    '{"language":"javascript","pattern":"$OBJ.save($$$ARGS)","replacement":"$OBJ.store($$$ARGS)","files":["a.js"]}',
    '"],"constraints":{"X":{"regex":"^[a-z]+$"},"OBJ":{"kind":"identifier"}}}',
    '{"decisions":["a"],"constraints":[],"open_issues":["b","c"],"next_focus":["run tests"]}',
    '</a></b> <i> </think> ((()))[[{{}}]] \\n\\n\\t\\" . .. ... ../ ../.. $$ $$$ $A$B $X, $Y naïve – 日本語 🙂🙂',
] * 20


def tiny_tokenizer(vocab_size: int = 600, *, atomic_tags: bool = True) -> Tokenizer:
    """Byte-level BPE; `vocab_size` 0 gives one token per byte and no merges."""
    backend = tokenizers.Tokenizer(models.BPE())
    # No pattern splits words here: merges across punctuation are what the grammar must survive.
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=max(vocab_size, 256 + len(SPECIALS)),
        special_tokens=SPECIALS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
        max_token_length=12,
    )
    backend.train_from_iterator(_CORPUS, trainer)
    return Tokenizer(
        backend,
        eos_id=backend.token_to_id("<|im_end|>"),
        pad_id=backend.token_to_id("<|endoftext|>"),
        atomic_tags=atomic_tags,
    )
