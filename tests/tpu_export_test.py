"""The jitted functions of training and sampling lower for TPU and CUDA, from this CPU.

Lowering is where an operation without an implementation on the platform is refused. It is not the platform's compiler:
docs/tpu.md says what to run there.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from srl_jax import sharding
from srl_jax.rollout import _states, make_batch
from srl_jax.sampling import _refill, compact, completions, decode, prefill, row_keys
from srl_jax.sft import sft_step
from srl_jax.student import _merge, pad_prompts
from srl_jax.train_step import (
    StepSettings,
    TrainState,
    current_scores,
    make_optimizer,
    mini_batches,
    reference_logprobs,
    train_step,
)
from tests.fakes import tiny_config, tiny_student

_PLATFORMS = ["tpu", "cuda"]
_P, _G, _WIDTH = 8, 2, 16
_MESHES = {"one chip": (1, 1, 1), "a slice of eight, all axes": (2, 2, 2)}


@pytest.fixture(scope="module", params=_MESHES)
def student(request):
    made = tiny_student(tiny_config(dtype="bfloat16"))
    shape = _MESHES[request.param]
    mesh = sharding.make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])
    params = jax.device_put(made.params, sharding.variable_shardings(mesh, made.decoder)["params"])
    automaton = jax.device_put(made.automaton, sharding.replicated(mesh))
    return dataclasses.replace(made, mesh=mesh, params=params, automaton=automaton)


def _lowered(student, function, *args, **kwargs):
    """`function`, jitted, exported for every platform: its StableHLO."""
    exported = export.export(function, platforms=_PLATFORMS)(*args, **kwargs)
    assert exported.platforms == tuple(_PLATFORMS)
    assert exported.nr_devices == student.mesh.size
    return exported.mlir_module()


def _prompts(student):
    tokens, lengths = pad_prompts([[1, 2, 3]] * _P, _WIDTH, 0)
    return jax.device_put((tokens, lengths), sharding.batch_sharding(student.mesh))


def _batch(student):
    budget = student.sampling.max_new_tokens
    tokens, lengths = pad_prompts([[1, 2, 3]] * _P, _WIDTH, 0)
    arrays = {"prompt_tokens": tokens, "prompt_lengths": lengths, "tokens": np.ones((_P, _G, budget), np.int32)}
    arrays |= {"mask": np.ones((_P, _G, budget), bool), "logprobs": np.zeros((_P, _G, budget), np.float32)}
    return make_batch(student, arrays, np.zeros((_P, _G)))


@pytest.mark.parametrize("adapted", [False, True])
def test_the_sampler(student, adapted):
    variables = {"params": student.params} | ({"lora": student.fresh_lora(0)} if adapted else {})
    prompts = (student.decoder, variables, student.automaton, *_prompts(student), row_keys(jax.random.key(0), _P * _G))
    given = {"group_size": _G, "settings": student.sampling, "pad_id": 0, "sharding": prompts[3].sharding}
    _lowered(student, prefill, *prompts, **given)
    flight = prefill(*prompts, **given)
    text = _lowered(
        student, decode, student.decoder, variables, student.automaton, flight, 0, 0, settings=student.sampling
    )
    assert "stablehlo.while" in text  # the whole decode loop, not one step of it
    slots = np.arange(_P)
    _lowered(student, _refill, flight, flight, slots, sharding=given["sharding"])
    _lowered(student, compact, flight, slots, slots[:, None] * _G, sharding=given["sharding"])
    _lowered(student, completions, student.automaton, flight, _P)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_the_update(student, remat):
    optimizer, _ = make_optimizer(1e-3, steps=10)
    lora = student.fresh_lora(0)
    state = TrainState(jnp.int32(0), lora, optimizer.init(lora), jax.random.key_data(jax.random.key(0)))
    _lowered(
        student, train_step, state, student.params, student.automaton, _batch(student),
        decoder=student.decoder.clone(remat=remat), optimizer=optimizer, settings=StepSettings(micro_batch=_P),
    )  # fmt: skip


def test_the_reference(student):
    _lowered(
        student, reference_logprobs, student.decoder, student.params, student.automaton, _batch(student),
        settings=StepSettings(micro_batch=_P),
    )  # fmt: skip


def test_the_current_policy_and_mini_batches(student):
    _lowered(
        student, current_scores, student.decoder, student.params, student.fresh_lora(0), student.automaton,
        _batch(student), settings=StepSettings(micro_batch=_P),
    )  # fmt: skip
    _lowered(student, mini_batches, _batch(student), 1)


def test_fine_tuning(student):
    optimizer, _ = make_optimizer(1e-3, steps=10)
    lora = student.fresh_lora(0)
    state = TrainState(jnp.int32(0), lora, optimizer.init(lora), jax.random.key_data(jax.random.key(0)))
    _lowered(
        student, sft_step, state, student.params, student.automaton, _batch(student), decoder=student.decoder,
        optimizer=optimizer, settings=StepSettings(micro_batch=_P),
    )  # fmt: skip


def test_the_grammar_replay_and_the_merge(student):
    tokens = jax.device_put(np.ones((_P, _G, 72), np.int32), sharding.batch_sharding(student.mesh))
    _lowered(student, _states, student.automaton, tokens, max_new_tokens=72, max_think_tokens=8)
    full = jax.tree.map(lambda x: x.astype(jnp.float32), student.params)
    _lowered(student, _merge, full, student.fresh_lora(0), scale=1.0)


def test_what_a_platform_lacks_is_refused():
    """The lowering these tests rely on can fail: LAPACK's Schur decomposition exists on the CPU only."""
    with pytest.raises(NotImplementedError, match=r"schur.*tpu"):
        export.export(jax.jit(jax.scipy.linalg.schur), platforms=["tpu"])(jnp.eye(4))
