"""Keys and values kept narrower than the model: what rounding costs, what it saves, and that training allows for it."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srl_jax import sharding
from srl_jax.model import hf, shapes
from srl_jax.model.attention import attend
from srl_jax.model.decoder import Decoder, encode_prompts, init_cache
from srl_jax.model.kv import QuantizedKV, mix, score, store, width
from srl_jax.sampling import SamplingConfig, decode, prefill, row_keys, sample
from srl_jax.student import load_student
from tests.fakes import tiny_config
from tests.sampling_test import _prompts, _sample
from tests.updates_test import rollout, scored


@pytest.fixture(scope="module", autouse=True)
def _as_users_run_it():
    """Sums in another order round to other codes, and without the compiler's optimisation more are in another order."""
    jax.clear_caches()
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
    jax.clear_caches()


def _numbers(kv):
    return np.asarray(kv.codes * kv.scale[..., None]) if isinstance(kv, QuantizedKV) else np.asarray(kv)


def _bytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def test_codes_by_hand():
    kept = store(jnp.asarray([[127.0, -31.6, 0.0], [0.0, 0.0, 0.0], [-2.54, 0.02, 1.0]]), jnp.int8)
    assert kept.codes.tolist() == [[127, -32, 0], [0, 0, 0], [-127, 1, 50]]
    np.testing.assert_allclose(kept.scale, [1.0, 0.0, 0.02], rtol=1e-6)
    assert width(kept) == 3 and kept.codes.dtype == jnp.int8


def test_every_vector_is_rounded_by_itself_to_half_a_step():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 5, 64)) * np.exp(rng.normal(size=(2, 3, 5, 1)) * 3)
    kept = store(jnp.asarray(x, jnp.float32), jnp.int8)
    steps = np.abs(x).max(-1, keepdims=True) / 127
    assert (np.abs(_numbers(kept) - x) <= steps * 0.5001).all()
    alone = store(jnp.asarray(x[1:, :, 3:4], jnp.float32), jnp.int8)
    np.testing.assert_array_equal(alone.codes, kept.codes[1:, :, 3:4])


def test_products_with_codes_are_those_of_the_numbers_they_stand_for():
    rng = np.random.default_rng(1)
    q = jnp.asarray(rng.standard_normal((2, 3, 4, 16)), jnp.float32)
    weights = jnp.asarray(rng.random((2, 3, 4, 9)), jnp.float32)
    kept = store(jnp.asarray(rng.standard_normal((2, 3, 9, 16)), jnp.float32), jnp.int8)
    plain = jnp.asarray(_numbers(kept))
    np.testing.assert_allclose(score(q, kept), score(q, plain), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(mix(weights, kept, q.dtype), mix(weights, plain, q.dtype), rtol=1e-5, atol=1e-5)


def _scene():
    rng = np.random.default_rng(2)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    q, k, v = draw(4, 1, 6, 64), draw(4, 2, 12, 64), draw(4, 2, 12, 64)
    prefix = draw(2, 2, 40, 64), draw(2, 2, 40, 64)
    masks = jnp.ones((4, 1, 12), bool), jnp.ones((2, 1, 1, 40), bool)
    return q, k, v, prefix, masks


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_attention_over_codes_is_attention_over_their_numbers_and_near_the_exact_one(softcap):
    q, k, v, prefix, (mask, prefix_mask) = _scene()
    run = jax.jit(lambda k, v, *prefix: attend(q, k, v, mask, prefix, prefix_mask, scale=64**-0.5, softcap=softcap))
    kept = [store(x, jnp.int8) for x in (k, v, *prefix)]
    rounded = run(*kept)
    np.testing.assert_allclose(rounded, run(*(jnp.asarray(_numbers(x)) for x in kept)), atol=1e-5)
    exact = np.asarray(run(k, v, *prefix))
    error = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    assert 1e-4 < error < 0.02  # 0.009 when written


@pytest.fixture(scope="module")
def model():
    """Eight layers and long rows, so that one layer is little beside the cache, and the cache much beside the rest."""
    config = dataclasses.replace(shapes.tiny(97), n_layers=8, head_dim=64)
    return Decoder(config), {"params": hf.random_params(config, 0, dtype=jnp.float32)}


@partial(jax.jit, static_argnums=(0, 2))
def _decoded(decoder, variables, dtype):
    """Final hidden states [B, T, D] of 20 tokens taken one at a time behind shared prompts; their prefix and cache."""
    rng = np.random.default_rng(3)
    tokens = jnp.asarray(rng.integers(0, 97, (2, 24)))
    lengths, rows = jnp.asarray([24, 17]), jnp.asarray(rng.integers(0, 97, (4, 20)))
    prefix = encode_prompts(decoder, variables, tokens, lengths, dtype)

    def step(cache, inputs):
        token, age = inputs
        positions = (jnp.repeat(lengths - 1, 2) + age)[:, None]
        ages = jnp.full((4,), age)
        (hidden, _), new = decoder.apply(
            {**variables, "cache": cache}, token[:, None], positions, prefix, ages, mutable=["cache"]
        )
        return new["cache"], hidden[:, 0]

    cache, hidden = jax.lax.scan(step, init_cache(decoder.config, 4, 20, dtype), (rows.T, jnp.arange(20)))
    return jnp.swapaxes(hidden, 0, 1), prefix, cache


def test_hidden_states_stay_near_and_bytes_are_those_of_the_shapes(model):
    exact, whole_prefix, whole_cache = _decoded(*model, jnp.float32)
    for dtype, most in ((jnp.bfloat16, 0.005), (jnp.int8, 0.015)):  # 0.002 and 0.007 when written
        rounded, prefix, cache = _decoded(*model, dtype)
        error = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
        assert 1e-5 < error < most
        # int8: 64 codes of a byte and a scale of four, where float32 takes 256 bytes and bfloat16 128.
        share = {jnp.bfloat16: 128 / 256, jnp.int8: 68 / 256}[dtype]
        assert _bytes(prefix[:2]) == share * _bytes(whole_prefix[:2])
        assert _bytes(cache) == share * _bytes(whole_cache)


def test_the_compiled_sampler_holds_a_quarter_and_no_second_cache(model, student):
    """By XLA's own analysis of prefill and decode: prefix and cache are codes throughout."""
    decoder, variables = model
    decoder = Decoder(dataclasses.replace(decoder.config, vocab_size=student.automaton.kind_of_token.shape[0]))
    variables = jax.eval_shape(lambda: {"params": hf.random_params(decoder.config, 0, dtype=jnp.float32)})
    prompts, lengths = jax.ShapeDtypeStruct((4, 1024), jnp.int32), jax.ShapeDtypeStruct((4,), jnp.int32)
    keys = jax.eval_shape(lambda: row_keys(jax.random.key(0), 16))
    lowered = {
        kind: prefill.lower(
            decoder, variables, student.automaton, prompts, lengths, keys,
            group_size=4, settings=SamplingConfig(512, 8, cache_dtype=kind), pad_id=0,
        )
        for kind in ("model", "int8")
    }  # fmt: skip
    exact, rounded = (lowered[kind].compile().memory_analysis() for kind in ("model", "int8"))
    flight = lowered["int8"].out_info
    codes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((flight.prefix[:2], flight.cache)))
    vectors = 2 * decoder.config.n_layers * decoder.config.n_kv_heads * (4 * 1024 + 16 * 512)
    whole = 256 * vectors
    assert codes == 68 * vectors
    # But for the addresses of some more outputs prefill gives that much less, nor does it hold the prompts' numbers of
    # all layers until they are rounded.
    assert exact.output_size_in_bytes - rounded.output_size_in_bytes == pytest.approx(whole - codes, abs=1024)
    assert rounded.temp_size_in_bytes < exact.temp_size_in_bytes + whole / decoder.config.n_layers
    settings = SamplingConfig(512, 8, cache_dtype="int8")
    turns = decode.lower(decoder, variables, student.automaton, flight, 0, 0, settings=settings)
    beside = turns.compile().memory_analysis()
    assert beside.temp_size_in_bytes < whole / 4  # the logits, the masks, and at most one layer as float32
    assert beside.alias_size_in_bytes >= codes  # written in place


def test_greedy_answers_are_mostly_the_same(student, lora):
    """The tiny model's logits are nearly flat, so that it changes its mind more easily than a trained one."""
    prompts = _prompts(16)
    exact, rounded = (
        np.asarray(_sample(student, lora, prompts, group_size=1, temperature=0.0, cache_dtype=kind).tokens)
        for kind in ("model", "int8")
    )
    same = (exact == rounded).all(axis=(1, 2)).mean()
    assert same >= 0.7  # 13 of 16 when written


@pytest.fixture(scope="module")
def drawn(student, lora):
    return _sample(student, lora, _prompts(4), key=3, group_size=2, cache_dtype="int8")


def test_neither_waiting_nor_compaction_nor_speculation_changes_a_token(student, lora, drawn):
    taken = _sample(student, lora, _prompts(4), key=3, group_size=2, cache_dtype="int8", slots=2, drafts=3)
    np.testing.assert_array_equal(drawn.tokens, taken.tokens)
    np.testing.assert_allclose(drawn.logprobs, taken.logprobs, atol=1e-4)


def test_eight_devices_are_one(lora, drawn):
    config = tiny_config()
    config.grpo.micro_batch, config.sampling.cache_dtype = 4, "int8"
    mesh = sharding.make_mesh(2, 2, 2)
    student = load_student(config, mesh)
    assert student.cache_is_rounded
    variables = student.sampling_variables(student.place_lora(jax.tree.map(np.asarray, lora)))
    tokens, lengths = (jax.device_put(x, sharding.batch_sharding(mesh)) for x in _prompts(4))
    eight = sample(
        student.decoder, variables, student.automaton, tokens, lengths, jax.random.key(3),
        group_size=2, settings=student.sampling, pad_id=student.tokenizer.pad_id,
    )  # fmt: skip
    np.testing.assert_array_equal(drawn.tokens, eight.tokens)
    # Sums in another order are 1e-7 apart, which takes a number that lies between two codes to the other one: a few
    # log-probs are then as far apart as one code is.
    apart = np.abs(np.asarray(drawn.logprobs) - np.asarray(eight.logprobs))
    assert (apart > 1e-5).mean() < 0.01 and apart.max() < 1e-3


@pytest.mark.parametrize("cap", [0.0, 1.01])
def test_old_log_probs_are_the_trainers_and_the_gap_is_told(student, lora, cap):
    narrow = dataclasses.replace(student, sampling=dataclasses.replace(student.sampling, cache_dtype="int8"))
    assert narrow.cache_is_rounded and not student.cache_is_rounded
    _, collected = rollout(narrow, lora, importance_cap=cap)
    batch, mask = collected.batch, np.asarray(collected.batch.completion_mask)
    trainers = np.asarray(scored(narrow, lora, batch).logprobs)
    np.testing.assert_allclose(batch.old_logprobs[mask], trainers[mask], atol=1e-5)
    sampled = collected.used.arrays["logprobs"]
    gap = np.abs(trainers - sampled)[mask].mean()
    assert collected.metrics["logprob_gap"] == pytest.approx(gap, rel=1e-3)
    assert 1e-5 < gap < 0.005  # 0.0026 when written; control.gap_stop is ten times as wide
    if cap:
        weights = np.minimum(np.exp(trainers - sampled), cap)
        np.testing.assert_allclose(batch.token_weights[mask], weights[mask], atol=1e-4)
        assert (weights[mask] == cap).any()
    else:
        assert batch.token_weights is None
