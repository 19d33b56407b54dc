"""What a run will take of each device's memory, known before anything runs.

Resident arrays are counted from their shapes and shardings. The sampler, the reference pass and the update are compiled
for the devices at hand, from shapes alone, and asked what they need beside their inputs. No weight is read.
"""

import dataclasses
import math
import os
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from srl_jax import grammar
from srl_jax.config import TrainConfig, validate
from srl_jax.model.decoder import abstract_variables, mergeable
from srl_jax.sampling import LEAST_ROWS, decode, intake_of, prefill, row_keys
from srl_jax.sharding import batch_sharding, make_mesh, replicated, variable_shardings
from srl_jax.student import Student, plan_student
from srl_jax.train_step import StepSettings, TrainBatch, TrainState, make_optimizer, reference_logprobs, train_step

_GIB = 2**30


class DoesNotFit(RuntimeError):
    """The configuration needs more memory than a device has; the message says which part and what to change."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes per device."""

    resident: dict[str, int]  # arrays that stay for the whole run
    programs: dict[str, int]  # what each compiled function takes beside them, while it runs
    limit: int
    platform: str  # the programs were compiled for

    @property
    def peak(self) -> int:
        return sum(self.resident.values()) + max(self.programs.values())

    def check(self) -> None:
        """Raises `DoesNotFit` when the peak exceeds the limit."""
        if self.peak <= self.limit:
            return
        name = max(self.programs, key=self.programs.__getitem__)
        remedies = {
            "sample": (
                "lower sampling.max_new_tokens, data.prompts_per_step or grpo.group_size, or set "
                "sampling.cache_dtype=int8"
            ),
            "reference": "lower grpo.micro_batch",
            "update": "lower grpo.micro_batch, or set model.remat=full",
        }
        base = self.resident["base weights"]
        remedy = remedies[name]
        if base > self.limit / 2:
            remedy = (
                "raise mesh.fsdp or mesh.tensor, set model.dtype=bfloat16, or model.quantize=int8 or nf4: "
                "the base weights take over half"
            )
        raise DoesNotFit(
            f"a device has {self.limit / _GIB:.2f} GiB and this run needs {self.peak / _GIB:.2f} GiB "
            f"(base weights {base / _GIB:.2f}, {name} {self.programs[name] / _GIB:.2f}); {remedy}"
        )

    def table(self) -> str:
        """One line for each part, in MiB."""
        lines = [f"bytes per device, MiB (programs compiled for {self.platform})"]
        lines += [f"  {name:<24}{size / 2**20:>12,.1f}" for name, size in self.resident.items()]
        lines += [f"  while in {name:<15}{size / 2**20:>12,.1f}" for name, size in self.programs.items()]
        lines += [f"  {'peak':<24}{self.peak / 2**20:>12,.1f}", f"  {'limit':<24}{self.limit / 2**20:>12,.1f}"]
        return "\n".join(lines)


def device_bytes(tree: Any) -> int:
    """Bytes of a pytree of (abstract) arrays on one device, each cut as its sharding says."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def device_limit() -> int:
    """Bytes one local device may hold: what its runtime says, or its share of the host's memory on a CPU."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()


@dataclasses.dataclass(frozen=True)
class Programs:
    """The programs of a step after sampling, lowered from shapes, and the abstract arrays they are lowered for."""

    student: Student
    automaton: grammar.TokenAutomaton
    state: TrainState
    batch: TrainBatch
    reference: jax.stages.Lowered
    update: jax.stages.Lowered


def lower(config: TrainConfig) -> Programs:
    """The programs of a run of `config` on the devices that JAX sees.

    Raises what `validate`, `make_mesh` and `plan_student` raise.
    """
    validate(config)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    student = plan_student(config, mesh)
    lora = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        nn.unbox(abstract_variables(student.decoder)["lora"]),
        variable_shardings(mesh, student.decoder)["lora"],
    )
    optimizer, _ = make_optimizer(steps=config.steps, **dataclasses.asdict(config.optim))
    state = _state(student, lora, optimizer)
    automaton = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), student.automaton)
    batch = _batch(student, automaton, config)
    settings = StepSettings(micro_batch=config.grpo.micro_batch)
    reference = reference_logprobs.lower(student.decoder, student.params, automaton, batch, settings=settings)
    update = train_step.lower(
        state, student.params, automaton, batch, decoder=student.decoder, optimizer=optimizer, settings=settings
    )
    return Programs(student, automaton, state, batch, reference, update)


def plan(config: TrainConfig, limit: int | None = None) -> Plan:
    """The memory plan of a run of `config` on the devices that JAX sees; `limit` overrides `device_limit()`.

    Raises what `lower` raises. Does not raise when it does not fit: see `check`.
    """
    programs = lower(config)
    student = programs.student
    resident = {
        "base weights": device_bytes(student.params),
        "adapters": device_bytes(programs.state.lora),
        "optimiser": device_bytes(programs.state.opt_state),
        "grammar": device_bytes(student.automaton),
    }
    batch_bytes = device_bytes(programs.batch)
    beside = {
        "sample": _sampler_bytes(config, programs),
        "reference": _beside_inputs(programs.reference.compile()) + batch_bytes,
        "update": _beside_inputs(programs.update.compile()) + batch_bytes,
    }
    return Plan(resident, beside, device_limit() if limit is None else limit, jax.default_backend())


def _sampler_bytes(config: TrainConfig, programs: Programs) -> int:
    """What prefill or decoding takes beside the resident arrays, whichever is more; and a merged copy of the layers."""
    student, batch, automaton = programs.student, programs.batch, programs.automaton
    merged = mergeable(student.params)  # see Student.sampling_variables
    variables = {"params": student.params} | ({} if merged else {"lora": programs.state.lora})
    prompts, group_size = config.sampled_shape
    slots = config.sampling.slots or prompts
    tokens, lengths = (
        jax.ShapeDtypeStruct((min(slots, prompts), *x.shape[1:]), x.dtype, sharding=x.sharding)
        for x in (batch.prompt_tokens, batch.prompt_lengths)
    )
    keys = jax.eval_shape(partial(row_keys, rows=lengths.shape[0] * group_size), jax.random.key(0))
    start = prefill.lower(
        student.decoder, variables, automaton, tokens, lengths, keys,
        group_size=group_size, settings=student.sampling, pad_id=student.tokenizer.pad_id,
        sharding=None if tokens.sharding.is_fully_replicated else tokens.sharding,
    )  # fmt: skip
    started = start.compile()
    flight = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        start.out_info, started.output_shardings,
    )  # fmt: skip
    turns = decode.lower(student.decoder, variables, automaton, flight, 0, 0, settings=student.sampling)
    own_copy = device_bytes([x["kernel"] for x in student.params["layers"].values() if "kernel" in x]) if merged else 0
    # Beside the flight are, one at a time: a turn, its copy with half of the rows but maybe all prompts, an intake.
    beside = [_beside_inputs(turns.compile())]
    shared = device_bytes(flight.prefix)
    beside += [shared + (device_bytes(flight) - shared) // 2] if lengths.shape[0] * group_size > LEAST_ROWS else []
    if slots < prompts:
        shares, intake = slots // lengths.sharding.shard_shape(lengths.shape)[0], intake_of(slots)
        # An intake that does not divide is computed whole by every device.
        beside.append(_beside_inputs(started) * intake * (shares if intake % shares else 1) // slots)
    return max(_beside_inputs(started), device_bytes(flight) + max(beside)) + own_copy


def _beside_inputs(compiled: jax.stages.Compiled) -> int:
    """Temporaries and outputs of a compiled function; donated inputs that become outputs count once, as inputs."""
    analysis = compiled.memory_analysis()
    return analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes


def _state(student: Student, lora: dict, optimizer: optax.GradientTransformation) -> TrainState:
    alone = replicated(student.mesh)
    opt_state = optax.tree_map_params(
        optimizer,
        lambda _, like: jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=like.sharding),
        jax.eval_shape(optimizer.init, lora),
        lora,
        transform_non_params=lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=alone),
    )
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=alone)
    return TrainState(step, lora, opt_state, jax.ShapeDtypeStruct((2,), jnp.uint32, sharding=alone))


def _batch(student: Student, automaton: grammar.TokenAutomaton, config: TrainConfig) -> TrainBatch:
    (p, g), t = config.batch_shape, config.sampling.max_new_tokens
    split = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(student.mesh))
    tokens = split((p, g, t), jnp.int32)
    one = jax.eval_shape(lambda a: grammar.initial_state(a, 1, t, config.sampling.max_think_tokens), automaton)
    states = jax.tree.map(lambda x: split((p, g, t), x.dtype), one)
    return TrainBatch(
        split((p, config.data.max_prompt_tokens), jnp.int32),
        split((p,), jnp.int32),
        tokens,
        split((p, g, t), jnp.bool_),
        states,
        split((p, g, t), jnp.float32),
        split((p, g), jnp.float32),
        kept=split((p, g, t, student.sampling.width), jnp.int32) if student.sampling.width else None,
    )
