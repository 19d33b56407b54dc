"""The update's invariants: on policy nothing moves by itself, and how work is split never changes the result."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from srl_jax import grpo, sharding
from srl_jax.model import hf
from srl_jax.rollout import make_batch
from srl_jax.sampling import sample
from srl_jax.student import pad_prompts
from srl_jax.train_step import (
    StepSettings,
    TrainState,
    make_optimizer,
    policy_logprobs,
    reference_logprobs,
    train_step,
)
from tests.fakes import perturbed, tiny_config, tiny_student

_P, _G = 8, 4


@pytest.fixture(scope="module")
def student():
    return tiny_student()


def _arrays(student, lora, key=0):
    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, 49152, 20 - 3 * (i % 4)).tolist() for i in range(_P)]
    tokens, lengths = pad_prompts(prompts, 20, 0)
    drawn = sample(
        student.decoder, student.sampling_variables(lora), student.automaton, jnp.asarray(tokens), jnp.asarray(lengths),
        jax.random.key(key), group_size=_G, settings=student.sampling, pad_id=student.tokenizer.pad_id,
    )  # fmt: skip
    arrays = {"prompt_tokens": tokens, "prompt_lengths": lengths}
    return arrays | {name: np.asarray(getattr(drawn, name)) for name in ("tokens", "mask", "logprobs")}


def _advantages(seed=0):
    return np.random.default_rng(seed).standard_normal((_P, _G)).astype(np.float32)


def _update(student, lora, arrays, advantages, **changes):
    optimizer, _ = make_optimizer(1e-2, steps=10, schedule="constant")
    lora = student.place_lora(jax.tree.map(np.asarray, lora))
    state = TrainState(jnp.int32(0), lora, optimizer.init(lora), jax.random.key_data(jax.random.key(0)))
    new, metrics = train_step(
        state, student.params, student.automaton, make_batch(student, arrays, advantages),
        decoder=student.decoder, optimizer=optimizer, settings=StepSettings(**{"micro_batch": _P, **changes}),
    )  # fmt: skip
    new = jax.block_until_ready(new)
    return jax.tree.map(np.asarray, new.lora), {name: float(value) for name, value in metrics.items()}


def _on_mesh(student, shape):
    mesh = sharding.make_mesh(*shape)
    placed = jax.device_put(student.params, sharding.variable_shardings(mesh, student.decoder)["params"])
    automaton = jax.device_put(student.automaton, sharding.replicated(mesh))
    return dataclasses.replace(student, mesh=mesh, params=placed, automaton=automaton)


def _close(one, other, atol):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, atol=atol)


def test_a_fresh_policy_has_ratio_one_and_no_kl(student):
    lora = student.fresh_lora(0)
    arrays = _arrays(student, lora)
    _, metrics = _update(student, lora, arrays, _advantages())
    assert abs(metrics["ratio_mean"] - 1) < 1e-5 and metrics["logprob_gap"] < 1e-5
    batch = make_batch(student, arrays, _advantages())
    ref = reference_logprobs(
        student.decoder, student.params, student.automaton, batch, settings=StepSettings(micro_batch=2)
    )
    kl = (np.asarray(ref) - arrays["logprobs"])[arrays["mask"]]
    assert np.abs(kl).mean() < 1e-5


def test_soft_caps_and_windows_are_the_same_in_sampling_and_training(student):
    model = dataclasses.replace(
        student.decoder.config, windows=(12, 0), final_softcap=1.5, attention_softcap=0.5, embed_scale=8.0
    )
    capped = dataclasses.replace(student, decoder=student.decoder.clone(config=model))
    lora = perturbed(student.fresh_lora(0))
    arrays = _arrays(capped, lora)
    _, metrics = _update(capped, lora, arrays, _advantages())
    assert metrics["logprob_gap"] < 1e-5
    _, uncapped = _update(student, lora, arrays, _advantages())
    assert uncapped["logprob_gap"] > 1e-3


def test_gradients_come_out_the_same_however_the_batch_is_cut(student):
    lora = perturbed(student.fresh_lora(0))
    arrays = _arrays(student, lora)
    whole, metrics = _update(student, lora, arrays, _advantages())
    for micro in (1, 2):
        cut, cut_metrics = _update(student, lora, arrays, _advantages(), micro_batch=micro)
        _close(whole, cut, 2e-5)
        for name in ("loss", "entropy", "grad_norm"):
            assert cut_metrics[name] == pytest.approx(metrics[name], abs=1e-5)


def test_a_prompt_shared_by_its_group_is_the_prompt_of_every_row(student):
    """Loss and gradients of the packed groups and of rows that have their prompt for themselves, prompts ragged."""
    lora = perturbed(student.fresh_lora(0))
    arrays, gains = _arrays(student, lora), _advantages()
    alone = {name: np.repeat(arrays[name], _G, axis=0) for name in ("prompt_tokens", "prompt_lengths")}
    alone |= {name: arrays[name].reshape(_P * _G, 1, -1) for name in ("tokens", "mask", "logprobs")}
    plain = optax.sgd(1.0)  # the step is the gradient
    results = []
    for of, advantages in ((arrays, gains), (alone, gains.reshape(-1, 1))):
        own = student.place_lora(jax.tree.map(np.asarray, lora))
        state = TrainState(jnp.int32(0), own, plain.init(own), jax.random.key_data(jax.random.key(0)))
        new, metrics = train_step(
            state, student.params, student.automaton, make_batch(student, of, advantages), decoder=student.decoder,
            optimizer=plain, settings=StepSettings(micro_batch=_P, entropy_coef=0.1),
        )  # fmt: skip
        gradient = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), lora, new.lora)
        results.append((gradient, float(metrics["loss"]), float(metrics["grad_norm"])))
    (shared, loss, norm), (unshared, other_loss, other_norm) = results
    assert abs(loss - other_loss) < 1e-5 and norm == pytest.approx(other_norm, rel=1e-5) and norm > 1e-2
    _close(shared, unshared, 1e-5)


def test_one_device_equals_eight(student):
    lora = jax.tree.map(np.asarray, perturbed(student.fresh_lora(0)))
    arrays = _arrays(student, lora)
    one, metrics = _update(student, lora, arrays, _advantages())
    config = tiny_config()
    config.grpo.micro_batch = 8
    wide = tiny_student(config, devices=8)
    eight, wide_metrics = _update(wide, lora, arrays, _advantages())
    _close(one, eight, 2e-5)
    for name in ("loss", "entropy", "grad_norm"):
        assert wide_metrics[name] == pytest.approx(metrics[name], abs=1e-5)


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 8, 1)])
def test_sharded_weights_give_the_same_update(student, shape):
    lora = jax.tree.map(np.asarray, perturbed(student.fresh_lora(0)))
    arrays = _arrays(student, lora)
    one, metrics = _update(student, lora, arrays, _advantages())
    many, many_metrics = _update(_on_mesh(student, shape), lora, arrays, _advantages())
    _close(one, many, 2e-5)
    for name in ("loss", "entropy", "grad_norm"):
        assert many_metrics[name] == pytest.approx(metrics[name], abs=1e-5)


def test_pmap_gives_the_same_gradients_as_the_mesh(student):
    """What the research notes call pmap: every device its own prompts, gradients summed over devices."""
    lora = jax.tree.map(np.asarray, perturbed(student.fresh_lora(0)))
    arrays = _arrays(student, lora)
    wide = _on_mesh(student, (8, 1, 1))
    batch = make_batch(wide, arrays, _advantages())
    placed = wide.place_lora(lora)
    optimizer = optax.sgd(1.0)  # the step is the gradient
    state = TrainState(jnp.int32(0), placed, optimizer.init(placed), jax.random.key_data(jax.random.key(0)))
    new, metrics = train_step(
        state, wide.params, wide.automaton, batch,
        decoder=student.decoder, optimizer=optimizer, settings=StepSettings(micro_batch=_P),
    )  # fmt: skip
    mesh_gradients = jax.tree.map(lambda a, b: a - np.asarray(b), lora, jax.block_until_ready(new.lora))

    denominator = float(arrays["mask"].sum())  # of all devices: each dividing by its own would be wrong

    def loss(lora, params, automaton, part):
        scored = policy_logprobs(
            student.decoder, {"params": params, "lora": lora}, automaton, part, temperature=1.0, chunk=256
        )
        rows = (-1, part.completions.shape[-1])
        return grpo.clipped_surrogate(
            scored.logprobs.reshape(rows), part.old_logprobs.reshape(rows), part.advantages.reshape(-1),
            part.completion_mask.reshape(rows), clip_epsilon_low=0.2, clip_epsilon_high=0.2, aggregation="token",
            denominator=denominator,
        )  # fmt: skip

    def step(lora, params, automaton, part):
        return jax.lax.psum(jax.value_and_grad(loss)(lora, params, automaton, part), "data")

    parts = jax.tree.map(lambda x: np.asarray(x).reshape(8, _P // 8, *x.shape[1:]), batch)
    whole = jax.tree.map(np.asarray, (lora, student.params, student.automaton))
    value, gradients = jax.pmap(step, axis_name="data", in_axes=(None, None, None, 0))(*whole, parts)
    assert float(value[0]) == pytest.approx(float(metrics["loss"]), abs=1e-6)
    _close(jax.tree.map(lambda x: x[0], gradients), mesh_gradients, 1e-5)


def test_a_tied_group_changes_nothing(student):
    lora = perturbed(student.fresh_lora(0))
    arrays = _arrays(student, lora)
    new, metrics = _update(student, lora, arrays, np.zeros((_P, _G), np.float32))
    assert metrics["grad_norm"] == 0.0 and metrics["loss"] == 0.0
    _close(new, lora, 0.0)


def test_an_empty_mask_is_no_row_at_all(student):
    lora = perturbed(student.fresh_lora(0))
    arrays = _arrays(student, lora)
    half = {**arrays, "mask": arrays["mask"].copy()}
    half["mask"][4:] = False
    poisoned = _advantages()
    poisoned[4:] = 1e6
    kept, _ = _update(student, lora, half, _advantages())
    same, _ = _update(student, lora, half, poisoned)
    _close(kept, same, 0.0)
    nothing, metrics = _update(student, lora, {**arrays, "mask": np.zeros_like(arrays["mask"])}, _advantages())
    assert metrics["loss"] == 0.0 and metrics["skipped"] == 0.0
    _close(nothing, lora, 0.0)


def test_a_poisoned_batch_is_skipped_and_said_so(student):
    lora = perturbed(student.fresh_lora(0))
    arrays = _arrays(student, lora)
    advantages = _advantages()
    advantages[0, 0] = np.nan
    new, metrics = _update(student, lora, arrays, advantages)
    assert metrics["skipped"] == 1.0
    _close(new, lora, 0.0)


def test_the_update_makes_good_tokens_likelier_and_leaves_the_base_alone(student):
    before = hf.weights_hash(student.params)
    lora = student.fresh_lora(0)
    arrays = _arrays(student, lora)
    advantages = np.tile(np.asarray([1.0, -1.0, 0.0, 0.0], np.float32), (_P, 1))
    new, _ = _update(student, lora, arrays, advantages)
    batch = make_batch(student, arrays, advantages)
    scored = policy_logprobs(
        student.decoder, {"params": student.params, "lora": new}, student.automaton, batch, temperature=1.0, chunk=256
    )
    change = np.where(arrays["mask"], np.asarray(scored.logprobs) - arrays["logprobs"], 0).sum(-1)
    assert (change[:, 0] > 0).mean() > 0.8 and (change[:, 1] < 0).mean() > 0.8
    assert hf.weights_hash(student.params) == before


@pytest.mark.parametrize(
    ("sizes", "message"),
    [((3, 1, 4), "needs 12 devices, 8"), ((-1, 3, 1), "8 devices do not divide by 3"), ((-1, -1, 1), "at most one")],
)
def test_a_mesh_that_does_not_fit_is_refused(sizes, message):
    with pytest.raises(sharding.BadMesh, match=message):
        sharding.make_mesh(*sizes)


def test_a_model_that_does_not_divide_is_refused(student):
    mesh = sharding.make_mesh(1, 1, 8)
    with pytest.raises(sharding.BadMesh, match="n_heads=4 does not divide by mesh tensor=8"):
        sharding.check_divisible(mesh, student.decoder, 8)
