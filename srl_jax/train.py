"""The loop: resume, roll out, step, log, save, evaluate, report.

It orchestrates and computes nothing itself. Running the same command again goes on from the last checkpoint; SIGINT
and SIGTERM save first.
"""

import os
import signal
import time
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any, Protocol

import jax

from srl_jax.config import TrainConfig
from srl_jax.evaluate import evaluate, fitting_tasks, write_json
from srl_jax.metrics import MetricWriter
from srl_jax.records import TeacherRecord
from srl_jax.report import write_report
from srl_jax.rollout import collect_rollouts
from srl_jax.run import Run, environment
from srl_jax.train_step import StepSettings, train_step


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


def train(
    config: TrainConfig, workdir: str | os.PathLike[str], stream: RecordStream, held_out: Sequence[TeacherRecord]
) -> bool:
    """Trains to `config.steps`, evaluating base and student on `held_out`; writes everything under `workdir`.

    Returns True when the run is complete, False when a signal stopped it after saving. Raises what `Run` raises.
    """
    with StopRequested() as stop, Run(config, workdir) as run:
        resumed = run.resume()
        start = 0
        if resumed is not None:
            start, position = resumed
            stream.set_state(position)
        with MetricWriter(run.workdir, config.steps, resumed_step=start) as writer:
            write_json(run.workdir / "config.json", config.to_dict())
            write_json(run.workdir / "environment.json", environment())
            if start:
                writer.note(f"resumed at step {start} of {config.steps}")
            return _loop(run, stream, held_out, writer, stop, start)


def _loop(
    run: Run,
    stream: RecordStream,
    held_out: Sequence[TeacherRecord],
    writer: MetricWriter,
    stop: StopRequested,
    start: int,
) -> bool:
    config, student = run.config, run.student
    tasks = fitting_tasks(student, held_out, config)

    def assess(name: str, adapters: dict | None) -> None:
        with writer.progress(f"evaluating {name}", len(tasks)) as advance:
            result = evaluate(student, adapters, tasks, run.judge, config, name=name, advance=advance)
        write_json(run.workdir / f"eval_{name}.json", result)
        m = result["metrics"]
        writer.note(f"{name}: reward {m['reward']:.4f} on {m['tasks']} held-out tasks in {m['seconds']:.0f} s")

    if not (run.workdir / "eval_base.json").exists():
        assess("base", None)
    settings = step_settings(config)
    for step in range(start, config.steps):
        began = time.perf_counter()
        key = jax.random.fold_in(jax.random.wrap_key_data(run.state.key), step)
        batch, metrics, _ = collect_rollouts(student, run.state.lora, stream, key, run.rewards, config, settings)
        updating = time.perf_counter()
        run.state, scalars = train_step(
            run.state, student.params, student.automaton, batch,
            decoder=student.decoder, optimizer=run.optimizer, settings=settings,
        )  # fmt: skip
        metrics |= {name: float(value) for name, value in scalars.items()}
        now = time.perf_counter()
        metrics |= {"learning_rate": float(run.rates(step)), "seconds/update": now - updating}
        writer.write(step + 1, {**metrics, "seconds/step": now - began})
        done = step + 1 == config.steps
        if done or stop.signal or (step + 1) % config.checkpoint.every == 0:
            run.checkpoints.save(step + 1, run.state, stream.get_state())
        if stop.signal and not done:
            run.checkpoints.wait()
            name = signal.Signals(stop.signal).name
            writer.note(f"stopped by {name}; saved at step {step + 1}. Run the same command to go on.")
            return False
        if config.eval.every and (step + 1) % config.eval.every == 0 and not done:
            assess(f"step{step + 1}", run.state.lora)
    run.checkpoints.wait()
    assess("student", run.state.lora)
    writer.note(f"report: {write_report(run.workdir)}")
    return True
