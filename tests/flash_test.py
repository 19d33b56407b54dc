"""Kernels' layout of rows against the general attention; splash itself, interpreted; what lowers for GPU and TPU."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from srl_jax import sharding
from srl_jax.model import decoder as decoder_module
from srl_jax.model import flash, hf, shapes
from srl_jax.model.attention import attend
from srl_jax.model.decoder import Decoder, completion_hidden, init_lora
from tests.fakes import perturbed

P, G, T, LP, N, K, H = 2, 3, 9, 12, 4, 2, 16
_LENGTHS = np.asarray([12, 5], np.int32)
_SCALE = 0.3


def _problem(prefix=True, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
    own = draw(P * G, T, N, H), draw(P * G, K, T, H), draw(P * G, K, T, H)
    return (*own, (draw(P, K, LP, H), draw(P, K, LP, H)) if prefix else None), draw(P * G, T, N, H)


def _general(q, k, v, prefix):
    mask = np.tril(np.ones((1, T, T), bool))
    seen = (np.arange(LP)[None] < _LENGTHS[:, None])[:, None, None]
    return attend(q, k, v, mask, prefix, None if prefix is None else seen, scale=_SCALE)


def _flash(q, k, v, prefix, **how):
    return flash.flash_attend(q, k, v, prefix, None if prefix is None else jnp.asarray(_LENGTHS), scale=_SCALE, **how)


@pytest.mark.parametrize("prefix", [True, False], ids=["prompt", "alone"])
@pytest.mark.parametrize("how", [{"kernel": "xla"}, {"kernel": "splash", "interpret": True}], ids=["layout", "splash"])
def test_values_and_gradients_are_those_of_the_general_form(how, prefix):
    arguments, weights = _problem(prefix)
    results = []
    for form in (_general, partial(_flash, **how)):
        values, pull = jax.vjp(form, *arguments)
        results.append((values, pull(weights)))
    for one, other in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)
    if prefix:  # what lies behind a prompt's end has no part in it
        d_keys = results[1][1][3][0]
        assert not np.any(d_keys[1, :, 5:]) and np.all(np.any(d_keys[1, :, :5], axis=-1))


def test_rows_do_not_see_each_other_nor_padding():
    (q, k, v, prefix), _ = _problem()
    before = _flash(q, k, v, prefix, kernel="xla")
    changed = [x.at[1, :, 5:].set(99.0) for x in prefix]  # behind the second prompt's end
    k, v = k.at[4].set(-7.0), v.at[4].set(-7.0)  # a sibling in the second group
    after = _flash(q, k, v, tuple(changed), kernel="xla")
    others = np.asarray([0, 1, 2, 3, 5])
    np.testing.assert_array_equal(before[others], after[others])
    assert np.any(before[4] != after[4])


def _on_mesh(axes):
    """Gradients without a mesh and on one of `axes`, and the compiled forward and backward passes there."""
    mesh = sharding.make_mesh(*axes, devices=jax.devices()[: int(np.prod(axes))])
    arguments, weights = _problem()
    results, texts = [], []
    for mesh_or_none in (None, mesh):
        form = partial(_flash, kernel="xla", mesh=mesh_or_none)
        run = jax.jit(lambda arguments, form=form: jax.vjp(form, *arguments)[1](weights))
        results.append(jax.block_until_ready(run(arguments)))
        forward = jax.jit(lambda arguments, form=form: form(*arguments))
        texts = [jitted.lower(arguments).compile().as_text() for jitted in (forward, run)]
    return results, texts


def _assert_same(results):
    for one, other in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("axes", [(2, 1, 1), (1, 2, 2)], ids=["data", "fsdp x tensor"])
def test_devices_work_on_their_own_rows_and_heads(axes):
    results, texts = _on_mesh(axes)
    assert not [text for text in texts if re.findall(r"all-reduce\(", text)]
    _assert_same(results)


def test_prompts_that_are_too_few_for_the_devices_are_done_by_each():
    results, (forward, _) = _on_mesh((4, 1, 1))
    assert not re.findall(r"all-reduce\(", forward)
    _assert_same(results)


def test_the_decoder_gives_kernels_what_they_need(monkeypatch):
    """Shared prompts of unequal lengths, values and adapter gradients, with the kernels' layout in every layer."""
    general = Decoder(shapes.tiny(101), lora_rank=4, lora_alpha=8.0)
    params, lora = hf.random_params(general.config, 1), perturbed(init_lora(general, jax.random.key(2)))
    rng = np.random.default_rng(0)
    prompts, rows = (jnp.asarray(rng.integers(0, 101, shape)) for shape in ((2, 12), (2, 3, 9)))
    calls = []

    def layout(*args, kernel, **settings):
        calls.append(kernel)
        return flash.flash_attend(*args, kernel="xla", **settings)

    monkeypatch.setattr(decoder_module, "flash_attend", layout)
    results = []
    for decoder in (general, general.clone(attention="splash")):
        hidden = lambda lora, decoder=decoder: completion_hidden(
            decoder, {"params": params, "lora": lora}, prompts, jnp.asarray([12, 7]), rows
        )
        values, pull = jax.vjp(jax.jit(hidden), lora)
        results.append((values, pull(jnp.cos(values))))
    assert set(calls) == {"splash"}
    for one, other in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4 * float(jnp.abs(other).max()))


def test_the_choice():
    llama, bf16 = shapes.SHAPES["llama3.1-8b"], jnp.dtype("bfloat16")
    wide = dataclasses.replace(llama, head_dim=256)
    windowed = dataclasses.replace(llama, windows=(4,) * 32)
    capped = dataclasses.replace(llama, attention_softcap=50.0)
    for platform, config, dtype, expected in (
        ("cuda", llama, bf16, "cudnn"),
        ("cuda", llama, jnp.dtype("float32"), "xla"),
        ("cuda", wide, bf16, "xla"),
        ("tpu", llama, bf16, "splash"),
        ("tpu", wide, jnp.dtype("float32"), "splash"),
        ("cpu", llama, bf16, "xla"),
        ("rocm", llama, bf16, "xla"),
        ("cuda", windowed, bf16, "xla"),
        ("tpu", capped, bf16, "xla"),
    ):
        assert flash.choose(platform, config, dtype) == expected, (platform, dtype)


# Forward and backward, by the names under which the platforms' compilers know them.
_CALLS = {
    "cudnn": ("cuda", ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]),
    "splash": ("tpu", ["splash_mha_fwd", "splash_mha_dkv", "splash_mha_dq"]),
}


@pytest.mark.parametrize("kernel", _CALLS)
def test_a_step_lowers_to_the_kernel(kernel, monkeypatch):
    """Forward and backward, on one device and split over four: the kernels are in what the platform's compiler gets."""
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91_000)  # no GPU here to ask
    decoder = Decoder(dataclasses.replace(shapes.tiny(101), head_dim=64), lora_rank=4, remat="full", attention=kernel)
    params = hf.random_params(decoder.config, 1, dtype=jnp.bfloat16)
    lora = init_lora(decoder, jax.random.key(2))
    prompts, rows, lengths = np.ones((2, 16), np.int32), np.ones((2, 2, 16), np.int32), np.asarray([16, 7], np.int32)

    def loss(lora, params, decoder):
        variables = {"params": params, "lora": lora}
        return completion_hidden(decoder, variables, prompts, lengths, rows).astype(jnp.float32).sum()

    platform, calls = _CALLS[kernel]
    for axes in ((1, 1, 1), (2, 1, 2)):
        mesh = sharding.make_mesh(*axes, devices=jax.devices()[: int(np.prod(axes))])
        step = jax.jit(jax.grad(partial(loss, decoder=decoder.clone(mesh=mesh))))
        where = sharding.variable_shardings(mesh, decoder)
        placed = jax.device_put((lora, params), (where["lora"], where["params"]))
        # cuDNN's calls have no guarantee to mean the same in a later JAX, which matters to files only.
        unguarded = [export.DisabledSafetyCheck.custom_call(call) for call in calls]
        text = export.export(step, platforms=[platform], disabled_checks=unguarded)(*placed).mlir_module()
        assert all(call in text for call in calls), axes
