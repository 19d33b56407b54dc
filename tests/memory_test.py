"""Predicted bytes against those of real arrays, and refusals before anything runs."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from srl_jax import memory, sharding
from srl_jax.student import load_student, plan_student
from srl_jax.train_step import make_optimizer
from tests.fakes import tiny_config

ROOT = Path(__file__).parents[1]
_GIB = 2**30


def _bytes_on_one_device(tree) -> int:
    """What device 0 really holds of a tree of arrays."""
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


_CASES = {
    "data": ({"dtype": "float32"}, (8, 1, 1)),
    "all axes": ({"dtype": "bfloat16"}, (2, 2, 2)),
    "nf4": ({"dtype": "bfloat16", "quantize": "nf4"}, (2, 2, 2)),
}


@pytest.fixture(scope="module", params=_CASES)
def planned(request):
    model, shape = _CASES[request.param]
    config = tiny_config(**model)
    config.data.prompts_per_step = config.grpo.micro_batch = 8
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = shape
    return config, memory.plan(config)


def test_resident_bytes_are_those_of_the_real_arrays(planned):
    config, plan = planned
    student = load_student(config, sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor))
    lora = student.fresh_lora(0)
    optimizer, _ = make_optimizer(steps=config.steps, **dataclasses.asdict(config.optim))
    real = {"base weights": student.params, "adapters": lora, "grammar": student.automaton}
    for name, tree in real.items():
        assert plan.resident[name] == _bytes_on_one_device(tree), name
    # Scalars aside, whose placement is left to JAX.
    moments = [leaf for leaf in jax.tree.leaves(optimizer.init(lora)) if leaf.ndim]
    assert plan.resident["optimiser"] == pytest.approx(_bytes_on_one_device(moments), abs=16)


def test_shapes_are_planned_as_they_are_loaded(planned):
    config, _ = planned
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    shapes, arrays = plan_student(config, mesh).params, load_student(config, mesh).params
    for one, other in zip(jax.tree.leaves(shapes), jax.tree.leaves(arrays), strict=True):
        assert (one.shape, one.dtype, one.sharding) == (other.shape, other.dtype, other.sharding)


def test_programs_count_what_must_be_there(planned):
    config, plan = planned
    t, g, p = config.sampling.max_new_tokens, config.grpo.group_size, config.data.prompts_per_step
    # The sampler holds at least its device's share of the KV cache: 2 layers, K and V, 2 heads of 16.
    width = np.dtype(np.float32).itemsize if config.model.dtype == "float32" else 2
    rows = p * g // (config.mesh.data * config.mesh.fsdp)
    assert plan.programs["sample"] > 2 * 2 * rows * 2 * t * 16 * width // config.mesh.tensor
    assert plan.programs["update"] > plan.resident["adapters"]  # the gradients


def test_what_cannot_fit_is_refused_with_a_remedy(planned):
    _, plan = planned
    plan.check()
    with pytest.raises(memory.DoesNotFit, match=r"GiB.*(micro_batch|max_new_tokens|fsdp)"):
        dataclasses.replace(plan, limit=plan.peak - 1).check()
    dataclasses.replace(plan, limit=plan.peak).check()
    heavy = dataclasses.replace(plan, resident={**plan.resident, "base weights": 9 * _GIB}, limit=8 * _GIB)
    with pytest.raises(memory.DoesNotFit, match=r"mesh\.fsdp.*over half"):
        heavy.check()


def test_the_command_prints_a_table_and_refuses():
    command = [
        sys.executable, "launch/profile_step.py", "--config=configs/tiny.py", "--dry_run", "--devices=2",
        "--device_gib=0.001",
    ]  # fmt: skip
    as_users_run_it = {"XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "false"}
    environment = {**os.environ, **as_users_run_it, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 2, done.stderr[-2000:]
    assert "base weights" in done.stdout and "while in update" in done.stdout
    assert "this run needs" in done.stderr
