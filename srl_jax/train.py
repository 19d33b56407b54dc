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
from srl_jax.evaluate import evaluate, evaluated_before, fitting_tasks
from srl_jax.evaluation import write_json
from srl_jax.floors import write_bounds
from srl_jax.metrics import MetricWriter
from srl_jax.page import write_page
from srl_jax.records import TeacherRecord
from srl_jax.report import write_report
from srl_jax.rollout import collect_rollouts, executable_only
from srl_jax.run import Run, environment
from srl_jax.sft import collect_traces, sft_settings, sft_step
from srl_jax.train_step import StepSettings, train_step


class RecordStream(Protocol):
    """Teacher records for ever, with a position that can be saved: what the data pipeline hands over."""

    def __next__(self) -> TeacherRecord: ...
    def __iter__(self) -> Iterator[TeacherRecord]: ...
    def get_state(self) -> Any: ...
    def set_state(self, state: Any) -> None: ...


class Stopped(Exception):
    """A signal asked the run to end; the message is the signal's name."""


class StopRequested:
    """Turns the first SIGINT or SIGTERM into `Stopped` at the next `check`; the second one kills."""

    def __init__(self) -> None:
        self._signal: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequested":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Called where everything that was computed can be saved."""
        if self._signal is not None:
            raise Stopped(signal.Signals(self._signal).name)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
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
    config: TrainConfig,
    workdir: str | os.PathLike[str],
    stream: RecordStream,
    held_out: Sequence[TeacherRecord],
    corpus: Sequence[TeacherRecord] = (),
) -> bool:
    """Trains to `config.steps`, evaluating base and student on `held_out`; writes everything under `workdir`.

    `corpus` are training records to take the most common trace from; without them the report lacks that floor.

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
            return _loop(run, stream, held_out, corpus, writer, stop, start)


def _loop(
    run: Run,
    stream: RecordStream,
    held_out: Sequence[TeacherRecord],
    corpus: Sequence[TeacherRecord],
    writer: MetricWriter,
    stop: StopRequested,
    start: int,
) -> bool:
    config, student = run.config, run.student
    tasks = fitting_tasks(student, held_out, config, runners=run.runners, note=writer.note)
    records = executable_only(stream, run.runners if config.reward.execution > 0 else None)

    def assess(name: str, adapters: dict | None, *, again: bool = False) -> None:
        path = run.workdir / f"eval_{name}.json"
        if not again and evaluated_before(path, tasks, config):
            return
        stop.check()
        with writer.progress(f"evaluating {name}", len(tasks)) as shown:

            def advance(count: int) -> None:
                shown(count)
                stop.check()

            result = evaluate(student, adapters, tasks, run.judge, config, name=name, advance=advance)
        write_json(path, result)
        m = result["metrics"]
        reward = "unknown" if m["reward"] is None else f"{m['reward']:.4f}"
        writer.note(f"{name}: reward {reward} on {m['tasks']} held-out tasks in {m['seconds']:.0f} s")

    step = start
    try:
        assess("base", None)
        while step < config.steps:
            if step and config.eval.every and step % config.eval.every == 0:
                assess(f"step{step}", run.state.lora)
            stop.check()
            metrics = _one_step(run, records, step)
            step += 1
            writer.write(step, metrics)
            if step == config.steps or step % config.checkpoint.every == 0:
                run.checkpoints.save(step, run.state, stream.get_state())
        run.checkpoints.wait()
        stop.check()
        write_bounds(run.workdir, tasks, corpus, student.tokenizer, run.judge, config)
        assess("student", run.state.lora, again=True)
    except Stopped as reason:
        run.checkpoints.save(step, run.state, stream.get_state())
        run.checkpoints.wait()
        writer.note(f"stopped by {reason}; saved at step {step}. Run the same command to go on.")
        return False
    writer.note(f"report: {write_report(run.workdir)}, every trace: {write_page(run.workdir)}")
    return True


def _one_step(run: Run, records: Iterator[TeacherRecord], step: int) -> dict[str, float | None]:
    """Replaces `run.state` by its successor; returns the step's metrics."""
    config, student, settings = run.config, run.student, step_settings(run.config)
    began = time.perf_counter()
    key = jax.random.fold_in(jax.random.wrap_key_data(run.state.key), step)
    if config.method == "sft":
        batch, metrics = collect_traces(student, records, config)
        update, settings = sft_step, sft_settings(config, settings)
    else:
        batch, metrics, _ = collect_rollouts(student, run.state.lora, records, key, run.rewards, config, settings)
        update = train_step
    updating = time.perf_counter()
    run.state, scalars = update(
        run.state, student.params, student.automaton, batch,
        decoder=student.decoder, optimizer=run.optimizer, settings=settings,
    )  # fmt: skip
    metrics |= {name: float(value) for name, value in scalars.items()}
    now = time.perf_counter()
    metrics |= {"learning_rate": float(run.rates(step)), "seconds/update": now - updating}
    return {**metrics, "seconds/step": now - began}
