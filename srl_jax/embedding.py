"""Think text to unit vectors: all-MiniLM-L6-v2 through sentence-transformers, on the CPU, without network.

Each chunk of text is embedded in a forward pass of its own, on one thread, several at a time. Padding a text to its
neighbours' length changes the last bits of its vector, so in mixed batches a reward would depend on which completions
happened to be scored together, and a resumed run, whose cache is cold, would not repeat the original one bit for bit.
On a CPU this costs little (measured per text of 45 words: 18 ms of CPU time alone, 14 in padded batches of 8), and
single-threaded passes do not stall when other work holds the cores, as a parallel one waiting at a barrier does.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from srl_jax import assets
from srl_jax.records import EMBEDDING_DIM

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from transformers import BatchEncoding

ASSET = "all-minilm-l6-v2"

_MAX_THREADS = 8
_SPECIAL_PIECES = 2  # [CLS] and [SEP]

# About 8,000 tokens of English, 16 times the cap on <think>: what lies beyond is not read, so that a megabyte of
# think text cannot hold up the rewards of a whole batch.
MAX_CHARS = 32_768


class EmbedderError(RuntimeError):
    """An embedding model that cannot be loaded; the message says what to do."""


class Embedder:
    """Texts to vectors, with the most recently used ones kept. Safe to call from several threads."""

    def __init__(self, model: SentenceTransformer, cache_size: int = 16_384) -> None:
        """`model` must give 384 numbers a text; `cache_size` vectors (1.5 kB each, and their texts) are kept."""
        if model.get_embedding_dimension() != EMBEDDING_DIM:
            raise EmbedderError(
                f"the model gives {model.get_embedding_dimension()} numbers a text, records hold {EMBEDDING_DIM}; "
                f"use {ASSET}"
            )
        self._model = model
        self._max_pieces = model.max_seq_length
        self._cache: OrderedDict[str, np.ndarray] = OrderedDict()
        self._cache_size = cache_size
        self._lock = threading.Lock()

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors, float32 [n, 384], the same for a text whatever its companions.

        A text over 256 word pieces is embedded in chunks whose mean is scaled to length 1. Only the first
        `MAX_CHARS` characters are read. A text with lone surrogates raises `ValueError`.
        """
        texts = [text[:MAX_CHARS] for text in texts]
        found, inputs = self._look_up(texts)
        chunks = [chunk for parts in inputs.values() for chunk in parts]
        # A pool for this call alone: nothing to close, and nothing that a fork would leave without its threads.
        threads = max(1, min(_MAX_THREADS, len(os.sched_getaffinity(0)), len(chunks)))
        with ThreadPoolExecutor(threads, initializer=_compute_on_one_thread) as pool:
            vectors = pool.map(self._forward, chunks)
            for text, parts in inputs.items():
                found[text] = _unit_mean(list(itertools.islice(vectors, len(parts))))
        self._remember(found)
        return np.array([found[text] for text in texts], dtype=np.float32).reshape(len(texts), EMBEDDING_DIM)

    def _look_up(self, texts: Sequence[str]) -> tuple[dict[str, np.ndarray], dict[str, list[BatchEncoding]]]:
        """Vectors already known, and the model's inputs, chunk by chunk, for the other texts."""
        found, inputs = {}, {}
        with self._lock:  # the tokenizer, too, must not be used by two threads at once
            for text in dict.fromkeys(texts):
                if text in self._cache:
                    found[text] = self._cache[text]
                else:
                    inputs[text] = [self._tokenize(chunk) for chunk in self._chunks(text)]
        return found, inputs

    def _remember(self, found: dict[str, np.ndarray]) -> None:
        with self._lock:
            for text, vector in found.items():
                self._cache[text] = vector
                self._cache.move_to_end(text)
            while len(self._cache) > self._cache_size:
                self._cache.popitem(last=False)

    def _tokenize(self, chunk: str) -> BatchEncoding:
        return self._model.tokenizer([chunk], truncation=True, max_length=self._max_pieces, return_tensors="pt")

    def _forward(self, inputs: BatchEncoding) -> np.ndarray:
        import torch

        with torch.inference_mode():
            return self._model(dict(inputs))["sentence_embedding"][0].numpy()

    def _chunks(self, text: str) -> list[str]:
        """The text cut between words into parts of at most 256 word pieces."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError(f"a text to embed holds a lone surrogate: {text[:40]!r}") from None
        encoded = self._model.tokenizer(
            text, add_special_tokens=False, truncation=False, return_offsets_mapping=True, verbose=False
        )
        cuts, piece, filled = [0], 0, 0
        for _, word in itertools.groupby(encoded.word_ids()):
            size = len(list(word))
            if filled and filled + size > self._max_pieces - _SPECIAL_PIECES:
                cuts.append(encoded["offset_mapping"][piece][0])
                filled = 0
            filled += size
            piece += size
        return [text[start:end] for start, end in itertools.pairwise([*cuts, len(text)])]


def _compute_on_one_thread() -> None:
    import torch

    torch.set_num_threads(1)  # of this pool's thread; the caller's setting stays


def _unit_mean(vectors: list[np.ndarray]) -> np.ndarray:
    mean = np.mean(vectors, axis=0, dtype=np.float64)
    return (mean / np.linalg.norm(mean)).astype(np.float32)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine of two unit vectors, summed in double precision."""
    return float(np.dot(a.astype(np.float64), b.astype(np.float64)))


def load_embedder(path: Path | str | None = None, *, cache_size: int = 16_384) -> Embedder:
    """The embedder in folder `path`, by default the pinned asset (fetched on first use).

    Raises `EmbedderError`, or `AssetError` when the asset cannot be had.
    """
    # Imported here: it takes seconds and brings torch, which only those who embed need.
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging as transformers_logging

    folder = assets.fetch(ASSET) if path is None else Path(path)
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise EmbedderError(
            f"{folder} holds no sentence-transformers model: {error}. Give the folder of {ASSET}, or no path to have "
            "it fetched"
        ) from error
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
    return Embedder(model, cache_size)
