import socket
import threading

import numpy as np
import pytest
import torch

from srl_jax.embedding import MAX_CHARS, Embedder, EmbedderError, cosine, load_embedder

THINK = "Replace every print call with the module logger so that output can be filtered; keep the arguments."
PARAPHRASE = "Swap print statements for logger calls, leaving the arguments alone, to make the output filterable."
OFF_TOPIC = "Bananas ripen faster in a paper bag because they give off ethylene."


@pytest.fixture(scope="module")
def embedder():
    return load_embedder()


def likeness(embedder, a, b):
    return cosine(*embedder.embed([a, b]))


def test_rows_are_unit_float32(embedder):
    rows = embedder.embed([THINK, "", "  ", "x", "\U0001f600\0\u200b", "x" * 5000])
    assert (rows.shape, rows.dtype) == ((6, 384), np.float32)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1.0, atol=1e-6)
    assert embedder.embed([]).shape == (0, 384)


def test_vectors_are_the_models_own(embedder):
    """Against transformers' BERT, mean pooling over the attended pieces: the recipe of the model card."""
    from transformers import AutoModel, AutoTokenizer

    from srl_jax.assets import fetch

    folder = fetch("all-minilm-l6-v2")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    bert = AutoModel.from_pretrained(folder, local_files_only=True)
    inputs = tokenizer([THINK], return_tensors="pt")
    with torch.inference_mode():
        mean = bert(**inputs).last_hidden_state[0].mean(dim=0)
    expected = (mean / mean.norm()).numpy()
    np.testing.assert_allclose(embedder.embed([THINK])[0], expected, atol=1e-6)


def test_meaning_orders_the_cosines(embedder):
    same, paraphrase, other = (likeness(embedder, THINK, text) for text in (THINK, PARAPHRASE, OFF_TOPIC))
    assert same == pytest.approx(1.0, abs=1e-6)
    assert 0.6 < paraphrase < 0.99
    assert other < 0.2


def test_a_vector_does_not_depend_on_companions_or_order(embedder):
    texts = [THINK, PARAPHRASE, OFF_TOPIC, "short", THINK * 13, THINK]
    fresh = lambda: Embedder(embedder._model, cache_size=0)
    together = fresh().embed(texts)
    for i in (4, 2, 0, 5, 3, 1):
        np.testing.assert_array_equal(fresh().embed([texts[i]])[0], together[i])
    np.testing.assert_array_equal(fresh().embed(texts[::-1])[::-1], together)


def test_long_text_is_the_renormalised_mean_of_its_chunks(embedder):
    words = [f"word{i}" for i in range(170)]
    text = " ".join(words)
    chunks = embedder._chunks(text)
    assert len(chunks) > 1
    assert "".join(chunks) == text
    pieces = [len(embedder._model.tokenizer(chunk)["input_ids"]) for chunk in chunks]
    assert max(pieces) <= 256
    assert min(pieces[:-1]) > 240  # chunks are filled, not cut to bits
    whole = [len(embedder._model.tokenizer(part, add_special_tokens=False)["input_ids"]) for part in (text, *chunks)]
    assert whole[0] == sum(whole[1:])  # no word was torn
    mean = embedder.embed(chunks).mean(axis=0)
    np.testing.assert_allclose(embedder.embed([text])[0], mean / np.linalg.norm(mean), atol=1e-6)


def test_what_comes_after_the_first_256_pieces_counts(embedder):
    long = (THINK + " ") * 14
    assert likeness(embedder, long, long + OFF_TOPIC * 20) < 0.9


@pytest.mark.parametrize(
    "text", ["a" * 9000, "," * 3000, "\u4e2d" * 3000, "é\u0301 " * 1000, " " * 9000, "", "#" + "b" * 99]
)
def test_odd_texts_are_cut_into_chunks_that_fit(embedder, text):
    chunks = embedder._chunks(text)
    assert "".join(chunks) == text
    assert all(len(embedder._model.tokenizer(chunk, verbose=False)["input_ids"]) <= 256 for chunk in chunks)


def test_a_megabyte_is_read_only_up_to_the_limit(embedder):
    kept = THINK + " " * (MAX_CHARS - len(THINK))
    np.testing.assert_array_equal(embedder.embed([kept + OFF_TOPIC * 15_000])[0], embedder.embed([THINK])[0])


def test_cache_holds_the_most_recently_used(embedder, monkeypatch):
    small = Embedder(embedder._model, cache_size=2)
    asked, real = [], small._tokenize
    monkeypatch.setattr(small, "_tokenize", lambda chunk: asked.append(chunk) or real(chunk))
    small.embed(["a", "b", "a"])
    small.embed(["a"])
    assert asked == ["a", "b"]
    small.embed(["c"])  # drops b: a was used later
    small.embed(["a"])
    assert asked == ["a", "b", "c"]
    small.embed(["b"])
    assert asked == ["a", "b", "c", "b"]


def test_cached_rows_cannot_be_changed_from_outside(embedder):
    first = embedder.embed([THINK])
    first[:] = 0
    np.testing.assert_allclose(np.linalg.norm(embedder.embed([THINK])), 1.0, atol=1e-6)


def test_threads_get_the_same_vectors(embedder):
    shared = Embedder(embedder._model, cache_size=1)
    results = []
    threads = [threading.Thread(target=lambda: results.append(shared.embed([THINK, OFF_TOPIC]))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    for result in results:
        np.testing.assert_array_equal(result, results[0])


def test_the_callers_number_of_torch_threads_stays(embedder):
    before = torch.get_num_threads()
    Embedder(embedder._model, cache_size=0).embed([THINK, OFF_TOPIC])
    assert torch.get_num_threads() == before


def test_lone_surrogates_are_refused(embedder):
    with pytest.raises(ValueError, match="lone surrogate"):
        embedder.embed(["fine", "bad \ud800"])


def test_loading_needs_no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert load_embedder().embed(["x"]).shape == (1, 384)


@pytest.mark.parametrize("make", [lambda folder: folder / "absent", lambda folder: folder])
def test_a_folder_without_a_model_is_one_error(tmp_path, make):
    with pytest.raises(EmbedderError, match="holds no sentence-transformers model"):
        load_embedder(make(tmp_path))
