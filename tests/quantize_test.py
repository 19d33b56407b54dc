"""The quantised base against the numbers it stands for, and against full precision."""

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import qwix
from safetensors.numpy import save_file

from srl_jax import sharding
from srl_jax.config import ConfigError, validate
from srl_jax.model import families, hf, shapes
from srl_jax.model.decoder import Decoder, abstract_variables, completion_hidden, init_lora, merge_lora
from srl_jax.model.export import _merged_tensors
from srl_jax.model.quantize import TILE, QuantizedKernel, abstract, dequantize, quantize, quantized_matmul
from srl_jax.rollout import make_batch
from srl_jax.sampling import sample
from srl_jax.student import load_student, pad_prompts
from srl_jax.train_step import StepSettings, TrainState, train_step
from tests.fakes import perturbed, tiny_config

SCHEMES = ["int8", "nf4"]
ALL_SCHEMES = ["bfloat16", *SCHEMES]
_F32 = jnp.dtype("float32")
# Norm of the error over norm of the weights, normal weights. Measured .0082 and .092; QLoRA's table has the like.
_ERROR = {"int8": 0.0095, "nf4": 0.1}
_BYTES = {"int8": 1.02, "nf4": 0.57}  # a weight, float32 scales of 256 inputs' columns included


def _weights(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_error_and_bytes_a_weight(scheme):
    weights = _weights((3, 256, 40))
    made = quantize(weights, scheme, _F32)
    error = np.linalg.norm(dequantize(made) - weights) / np.linalg.norm(weights)
    assert _ERROR[scheme] / 2 < error < _ERROR[scheme]
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(made)) < _BYTES[scheme] * weights.size
    again = quantize(dequantize(made), scheme, _F32)  # what is stored stays as it is
    np.testing.assert_allclose(dequantize(again), dequantize(made), atol=1e-6 if scheme == "nf4" else 0.02)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_numbers_are_those_of_qwix(scheme):
    weights = _weights((2, 192, 24))
    tiles = {1: TILE} if scheme == "nf4" else {}
    theirs = qwix.quantize(
        jnp.asarray(weights), "nf4" if scheme == "nf4" else jnp.int8, channelwise_axes=(0, 2), tiled_axes=tiles
    )
    np.testing.assert_array_equal(dequantize(quantize(weights, scheme, _F32)), qwix.dequantize(theirs))


def test_codes_by_hand():
    """int8: absmax 127.5 makes the scale 1. nf4: absmax 2 in one tile and 3 in the next, codes -1, 0 and 1 exact."""
    column = np.zeros((2 * TILE, 1), np.float32)
    column[:3, 0] = 127.5, -3, 4
    made = quantize(column, "int8", _F32)
    assert made.scale.tolist() == [[1.0]] and made.codes[:4, 0].tolist() == [127, -3, 4, 0]
    column[:4, 0], column[TILE + TILE // 2, 0] = (-2, 0, 2, 2 * 0.33791524171829224), 3
    made = quantize(column, "nf4", _F32)
    assert made.scale.tolist() == [[2.0], [3.0]]
    # Row 32 of a tile sits in the high half of the byte of row 0; code 7 is zero.
    assert [divmod(int(byte), 16)[::-1] for byte in made.codes[:4, 0]] == [(0, 7), (7, 7), (15, 7), (11, 7)]
    assert divmod(int(made.codes[TILE // 2, 0]), 16) == (15, 7)
    np.testing.assert_allclose(dequantize(made), column, atol=1e-6)


def _rounded(array):
    return np.asarray(array).astype(jnp.bfloat16).astype(np.float32)


def test_bfloat16_rounds_both_factors_and_sums_in_float32():
    """1 + 2^-8 rounds to 1 (to even) and 1 + 3 * 2^-9 to 1 + 2^-7; the sum of 301 ones has no bfloat16."""
    kernel = quantize(np.asarray([[1 + 2**-8], [1 + 3 * 2**-9]], np.float32), "bfloat16", _F32)
    assert dequantize(kernel).tolist() == [[1.0], [1 + 2**-7]] and kernel.codes.nbytes == 4
    assert quantized_matmul(jnp.asarray([[1 + 2**-8, 2.0]]), kernel).tolist() == [[1 + 2 + 2**-6]]
    ones = quantize(np.ones((301, 2), np.float32), "bfloat16", _F32)
    assert quantized_matmul(jnp.ones((1, 301)), ones).tolist() == [[301.0, 301.0]]
    # Value and gradient against the same products of rounded numbers in float64.
    x, weights, d_out = _weights((33, 70), 1), _weights((70, 24), 2), _weights((33, 24), 3)
    made = quantize(weights, "bfloat16", _F32)
    y, back = jax.vjp(lambda x: quantized_matmul(x, made), x)
    assert y.dtype == jnp.float32
    exact = [_rounded(a).astype(np.float64) for a in (x, weights, d_out)]
    np.testing.assert_allclose(y, exact[0] @ exact[1], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(back(d_out)[0], exact[2] @ exact[1].T, rtol=1e-5, atol=1e-5)
    assert quantized_matmul(x.astype(jnp.bfloat16), made).dtype == jnp.bfloat16


def _small(**extra):
    config = dataclasses.replace(shapes.tiny(101), **extra)
    decoder = Decoder(config, lora_rank=4, lora_alpha=8.0)
    return decoder, perturbed(init_lora(decoder, jax.random.key(2)))


def _stands_for(params):
    quantised = lambda x: isinstance(x, QuantizedKernel)
    return jax.tree.map(lambda x: dequantize(x) if quantised(x) else x, params, is_leaf=quantised)


def _hidden(decoder, params, lora):
    rng = np.random.default_rng(0)
    prompts, rows = (jnp.asarray(rng.integers(0, 101, shape)) for shape in ((2, 12), (2, 3, 9)))
    variables = {"params": params, "lora": lora}
    return completion_hidden(decoder, variables, prompts, jnp.asarray([12, 7]), rows)


@pytest.mark.parametrize("scheme, remat", [("int8", "none"), ("nf4", "full")])
def test_hidden_states_and_adapter_gradients_are_those_of_the_numbers_it_stands_for(scheme, remat):
    decoder, lora = _small(qkv_bias=True, qk_norm=True)
    decoder = decoder.clone(remat=remat)
    full, stored = (hf.random_params(decoder.config, 1, quantize=kind) for kind in ("none", scheme))
    weights = _weights((2, 3, 9, 64), 5)

    @jax.jit
    def run(lora, params):
        def loss(lora):
            hidden = _hidden(decoder, params, lora)
            return jnp.sum(hidden * weights), hidden

        return jax.grad(loss, has_aux=True)(lora)

    ours, theirs, exact = (run(lora, params) for params in (stored, _stands_for(stored), full))
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5 * float(jnp.abs(other).max()))
    # And as near to full precision as eight or four bits allow.
    norm = lambda tree: float(optax.tree.norm(tree))
    apart = [norm(jax.tree.map(jnp.subtract, a, b)) / norm(b) for a, b in zip(ours, exact, strict=True)]
    assert max(apart) < {"int8": 0.05, "nf4": 0.5}[scheme] and min(apart) > 1e-3, apart


def test_the_base_has_no_gradient_and_integers_are_no_obstacle():
    kernel = quantize(_weights((64, 8)), "nf4", _F32)
    d_x, d_kernel = jax.grad(lambda x, k: quantized_matmul(x, k).sum(), argnums=(0, 1), allow_int=True)(
        jnp.ones((2, 64)), kernel
    )
    np.testing.assert_allclose(d_x[0], dequantize(kernel).sum(1), rtol=1e-6)
    assert not np.any(d_kernel.scale)


@pytest.mark.parametrize("scheme", ALL_SCHEMES)
def test_a_gradient_never_holds_the_base_in_full_precision(scheme):
    """Compiled, not run: no temporaries beyond those of a float32 base, whose kernels are there anyway."""
    config = families.ModelConfig("llama", 128, 256, 16, 4, 2, 64, 1024)
    tokens = jax.ShapeDtypeStruct((1, 32), jnp.int32)

    def temporaries(kind):
        decoder = Decoder(config, 4, 4.0)
        params = nn.unbox(abstract_variables(decoder)["params"])
        for weights in params["layers"].values() if kind != "none" else ():
            if "kernel" in weights:
                weights["kernel"] = abstract(weights["kernel"], kind, _F32)
        lora = jax.eval_shape(lambda: init_lora(decoder, jax.random.key(0)))
        loss = lambda lora, params, x: decoder.apply({"params": params, "lora": lora}, x, x)[0].sum()
        return jax.jit(jax.grad(loss)).lower(lora, params, tokens).compile().memory_analysis().temp_size_in_bytes

    kernels = 4 * 16 * (256 * 256 * 3 + 3 * 256 * 1024)
    assert temporaries(scheme) < temporaries("none") + 0.1 * kernels


@pytest.mark.parametrize("scheme", ALL_SCHEMES)
def test_loading_quantises_each_tensor_as_it_comes(scheme, tmp_path):
    config = shapes.tiny(64)
    full = hf.random_params(config, seed=3)
    tensors = {}
    for leaf in hf.expected_shapes(config):
        name, value = hf.tensor_names(config, leaf)[0], full
        for key in leaf:
            value = value[key]
        parts = enumerate(value) if leaf[0] == "layers" else [(None, value)]
        for i, part in parts:
            part = np.asarray(part)
            tensors[name.format(i=i)] = np.ascontiguousarray(part.T) if leaf[-1] == "kernel" else part
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(families.to_hf(config)))
    placed = []
    place = lambda leaf, array: placed.append(leaf) or jax.tree.map(jnp.asarray, array)
    _, params = hf.load_params(tmp_path, dtype=jnp.bfloat16, quantize=scheme, place=place)
    assert placed == list(hf.expected_shapes(config))
    kernel = params["layers"]["down"]["kernel"]
    expected = quantize(full["layers"]["down"]["kernel"], scheme, jnp.dtype("bfloat16"))
    for one, other in zip(jax.tree.leaves(kernel), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)
    assert params["embedding"].dtype == jnp.bfloat16 and params["layers"]["mlp_norm"]["scale"].dtype == jnp.float32


@pytest.mark.parametrize("scheme, gap", [("nf4", 1e-5), ("bfloat16", 1e-2)])
def test_sampler_and_trainer_agree_and_eight_devices_are_one(scheme, gap):
    """What the sampler drew has, in the update, the log-probs it was drawn with, whatever the mesh."""
    config = tiny_config(quantize=scheme)
    config.grpo.micro_batch = config.data.prompts_per_step = 4
    config.sampling.max_new_tokens = 64
    results = []
    for axes in ((1, 1, 1), (2, 2, 2)):
        mesh = sharding.make_mesh(*axes, devices=jax.devices()[: int(np.prod(axes))])
        student = load_student(config, mesh)
        kernel = student.params["layers"]["gate"]["kernel"]
        assert isinstance(kernel, QuantizedKernel)
        shard = kernel.codes.addressable_shards[0].data
        assert shard.size * axes[1] * axes[2] == kernel.codes.size
        lora = student.place_lora(jax.tree.map(np.asarray, perturbed(student.fresh_lora(0))))
        variables = student.sampling_variables(lora)
        assert variables["params"] is student.params  # no second base, no merged copy
        tokens, lengths = pad_prompts([[5 + i, 7, 11 * i, 13][: 2 + i % 3] for i in range(4)], 8, 0)
        put = lambda x, mesh=mesh: jax.device_put(x, sharding.batch_sharding(mesh))
        drawn = sample(
            student.decoder, variables, student.automaton, put(tokens), put(lengths), jax.random.key(3),
            group_size=2, settings=student.sampling, pad_id=student.tokenizer.pad_id,
        )  # fmt: skip
        arrays = {"prompt_tokens": tokens, "prompt_lengths": lengths, "tokens": np.asarray(drawn.tokens)}
        arrays |= {"mask": np.asarray(drawn.mask), "logprobs": np.asarray(drawn.logprobs)}
        optimizer = optax.sgd(1.0)
        state = TrainState(jnp.int32(0), lora, optimizer.init(lora), jax.random.key_data(jax.random.key(0)))
        _, metrics = train_step(
            state, student.params, student.automaton, make_batch(student, arrays, _weights((4, 2))),
            decoder=student.decoder, optimizer=optimizer, settings=StepSettings(micro_batch=4),
        )  # fmt: skip
        results.append((student.base_hash, np.asarray(drawn.tokens), jax.tree.map(float, metrics)))
        assert results[-1][2]["logprob_gap"] < gap and results[-1][2]["grad_norm"] > 1e-4
    (one_hash, one, metrics), (eight_hash, eight, others) = results
    assert one_hash == eight_hash
    np.testing.assert_array_equal(one, eight)
    for name in ("loss", "entropy", "grad_norm"):
        assert metrics[name] == pytest.approx(others[name], abs=gap), name


def test_what_cannot_be_is_refused_by_name():
    with pytest.raises(families.UnsupportedModel, match=r"nf4.*d_ff = 96.*int8"):
        hf.random_params(dataclasses.replace(shapes.tiny(101), d_ff=96), 0, quantize="nf4")
    with pytest.raises(ConfigError, match=r"model\.quantize.*int4.*did you mean"):
        validate(tiny_config(quantize="int4"))
    decoder, lora = _small()
    with pytest.raises(ValueError, match="float32"):
        merge_lora(hf.random_params(decoder.config, 1, quantize="int8"), lora, 1.0)


@pytest.mark.parametrize("scheme", ALL_SCHEMES)
def test_the_merged_export_is_what_was_trained(scheme):
    decoder, lora = _small()
    params = hf.random_params(decoder.config, 1, quantize=scheme)
    ours = _merged_tensors(decoder, params, lora)
    theirs = _merged_tensors(decoder, _stands_for(params), lora)
    for name, (shape, make) in ours.items():
        assert make().shape == shape
        np.testing.assert_array_equal(make(), theirs[name][1](), err_msg=name)
