"""The loop: resume, roll out, step, log, save, evaluate, report.

It orchestrates and computes nothing itself. Running the same command again goes on from the last checkpoint; SIGINT
and SIGTERM save first.
"""

import dataclasses
import os
import platform
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from srl_jax import rewards
from srl_jax.checkpoint import Checkpointer, CheckpointMeta
from srl_jax.config import TrainConfig, config_hash, validate
from srl_jax.embedding import load_embedder
from srl_jax.evaluate import evaluate, fitting_tasks, write_json
from srl_jax.metrics import MetricWriter
from srl_jax.records import SCHEMA_VERSION, TeacherRecord
from srl_jax.report import write_report
from srl_jax.rollout import collect_rollouts
from srl_jax.sandbox.runner import Sandbox, SandboxConfig
from srl_jax.sandbox.service import RewardService
from srl_jax.sharding import make_mesh
from srl_jax.student import Student, load_student
from srl_jax.train_step import StepSettings, TrainState, make_optimizer, train_step


class RecordStream(Protocol):
    """Teacher records for ever, with a position that can be saved: what the data pipeline hands over."""

    def __next__(self) -> TeacherRecord: ...
    def __iter__(self) -> Iterator[TeacherRecord]: ...
    def get_state(self) -> Any: ...
    def set_state(self, state: Any) -> None: ...


class StopRequested:
    """Turns the first SIGINT or SIGTERM into a flag that the loop reads between steps; the second one kills."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequested":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        for previous, handler in self._previous.items():
            signal.signal(previous, handler)


def environment() -> dict[str, Any]:
    """What a run's numbers depend on beside its configuration: versions, machine, devices."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "ast-grep-cli", "numpy")
    return {
        "python": platform.python_version(),
        "machine": platform.platform(),
        "cpus": os.cpu_count(),
        "devices": [device.device_kind for device in jax.devices()],
        "packages": {name: metadata.version(name) for name in packages},
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def step_settings(config: TrainConfig) -> StepSettings:
    c = config.grpo
    return StepSettings(
        temperature=config.sampling.temperature,
        clip_epsilon_low=c.clip_epsilon_low,
        clip_epsilon_high=c.clip_epsilon_high,
        aggregation=c.aggregation,
        max_length=config.sampling.max_new_tokens,
        micro_batch=c.micro_batch,
    )


def checkpoint_meta(config: TrainConfig, student: Student) -> CheckpointMeta:
    """What a checkpoint of this run belongs to."""
    return CheckpointMeta(
        config=config_hash(config),
        tokenizer=student.tokenizer.fingerprint,
        base_weights=student.base_hash,
        schema=SCHEMA_VERSION,
        reward=rewards.REWARD_VERSION,
    )


def train(
    config: TrainConfig, workdir: str | os.PathLike[str], stream: RecordStream, held_out: Sequence[TeacherRecord]
) -> bool:
    """Trains to `config.steps`, evaluating base and student on `held_out`; writes everything under `workdir`.

    Returns True when the run is complete, False when a signal stopped it after saving.

    Raises:
      ConfigError, BadMesh: before any work, naming the field.
      SandboxUnavailable: when evaluation should execute actions and no sandbox passes its probe.
      CheckpointMismatch: when `workdir` belongs to another tokenizer, base model, schema or reward.
    """
    validate(config)
    workdir = Path(workdir)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    with ExitStack() as stack:
        stop = stack.enter_context(StopRequested())
        sandbox = None
        if config.eval.execute or config.reward.execution > 0:
            sandbox = stack.enter_context(Sandbox(SandboxConfig(slots=config.sandbox.workers)))
        student = load_student(config, mesh)
        embedder = load_embedder()
        reward = rewards.RewardConfig(**dataclasses.asdict(config.reward))
        count = lambda text: len(student.tokenizer.encode_text(text))
        executing = sandbox if config.reward.execution > 0 else None
        service = stack.enter_context(RewardService(embedder, count, reward=reward, sandbox=executing))
        judge = stack.enter_context(
            RewardService(embedder, count, reward=reward, sandbox=sandbox if config.eval.execute else None)
        )
        tasks = fitting_tasks(student, held_out, config)

        optimizer, rates = make_optimizer(steps=config.steps, **dataclasses.asdict(config.optim))
        lora = student.fresh_lora(config.seed)
        key = jax.random.key_data(jax.random.key(config.seed))
        state = TrainState(jnp.int32(0), lora, optimizer.init(lora), key)
        checkpoints = stack.enter_context(
            Checkpointer(workdir / "checkpoints", config.checkpoint.keep, checkpoint_meta(config, student))
        )
        start = 0
        restored = checkpoints.restore(state)
        if restored is not None:
            start, state, position = restored
            stream.set_state(position)
        writer = stack.enter_context(MetricWriter(workdir, config.steps, resumed_step=start))
        write_json(workdir / "config.json", config.to_dict())
        write_json(workdir / "environment.json", environment())
        if start:
            writer.note(f"resumed at step {start} of {config.steps}")

        def assess(name: str, adapters: dict | None) -> None:
            with writer.progress(f"evaluating {name}", len(tasks)) as advance:
                result = evaluate(student, adapters, tasks, judge, config, name=name, advance=advance)
            write_json(workdir / f"eval_{name}.json", result)
            m = result["metrics"]
            writer.note(f"{name}: reward {m['reward']:.4f} on {m['tasks']} held-out tasks in {m['seconds']:.0f} s")

        if not (workdir / "eval_base.json").exists():
            assess("base", None)
        settings = step_settings(config)
        for step in range(start, config.steps):
            began = time.perf_counter()
            step_key = jax.random.fold_in(jax.random.wrap_key_data(state.key), step)
            batch, metrics, _ = collect_rollouts(student, state.lora, stream, step_key, service, config, settings)
            updating = time.perf_counter()
            state, scalars = train_step(
                state, student.params, student.automaton, batch,
                decoder=student.decoder, optimizer=optimizer, settings=settings,
            )  # fmt: skip
            metrics |= {name: float(value) for name, value in scalars.items()}
            now = time.perf_counter()
            metrics |= {
                "learning_rate": float(rates(step)),
                "seconds/update": now - updating,
                "seconds/step": now - began,
            }
            writer.write(step + 1, metrics)
            done = step + 1 == config.steps
            if done or stop.signal or (step + 1) % config.checkpoint.every == 0:
                checkpoints.save(step + 1, state, stream.get_state())
            if stop.signal and not done:
                checkpoints.wait()
                writer.note(
                    f"stopped by {signal.Signals(stop.signal).name}; saved at step {step + 1}. "
                    "Run the same command to go on."
                )
                return False
            if config.eval.every and (step + 1) % config.eval.every == 0 and not done:
                assess(f"step{step + 1}", state.lora)
        checkpoints.wait()
        assess("student", state.lora)
        writer.note(f"report: {write_report(workdir)}")
        return True
