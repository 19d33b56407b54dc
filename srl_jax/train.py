"""The loop: resume, roll out, step, log, save, evaluate, report.

It orchestrates and computes nothing itself. Running the same command again goes on from the last checkpoint; SIGINT
and SIGTERM save first. On several hosts every process runs this same loop; the first one writes, and what the loop does
next is decided by values that all have alike (srl_jax/hosts.py).
"""

import fcntl
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from absl import logging

from srl_jax import control, hosts
from srl_jax.checkpoint import CheckpointError
from srl_jax.compiles import count_compiles
from srl_jax.config import TrainConfig, config_hash
from srl_jax.environment import ENVIRONMENT_FILE, check_same, data_hash, environment
from srl_jax.evaluate import evaluate, evaluated_before, fitting_tasks
from srl_jax.evaluation import write_json
from srl_jax.floors import write_bounds
from srl_jax.metrics import MetricWriter, QuietWriter
from srl_jax.model.hf import weights_hash
from srl_jax.page import write_page
from srl_jax.records import ReplayGroup, TeacherRecord
from srl_jax.replay import ReplayWriter
from srl_jax.report import load_evaluation, write_report
from srl_jax.reproduce import recorded_environment, verdict
from srl_jax.rollout import executable_only
from srl_jax.run import Run
from srl_jax.steps import BROKEN, take_step


class RecordStream(Protocol):
    """Records for ever, with a position that can be saved as JSON: what the data pipeline hands over.

    Teacher records; whole episodes of them where `grpo.returns` needs these; stored rollouts for method "replay".
    """

    def __next__(self) -> TeacherRecord | list[TeacherRecord] | ReplayGroup: ...
    def __iter__(self) -> Iterator[TeacherRecord | list[TeacherRecord] | ReplayGroup]: ...
    def get_state(self) -> Any: ...
    def set_state(self, state: Any) -> None: ...


class Stopped(Exception):
    """A signal asked the run to end; the message is the signal's name."""


class NotReproduced(RuntimeError):
    """A repetition that came out differently; the message names the first difference."""


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
        """Called where everything that was computed can be saved; a signal to one host stops all at the same point."""
        if number := hosts.greatest(self._signal or 0):
            raise Stopped(signal.Signals(number).name)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        for previous, handler in self._previous.items():
            signal.signal(previous, handler)


def train(
    config: TrainConfig,
    workdir: str | os.PathLike[str],
    stream: RecordStream,
    held_out: Sequence[TeacherRecord],
    corpus: Sequence[TeacherRecord] = (),
    *,
    repeats: Path | None = None,
) -> bool:
    """Trains to `config.steps`, evaluating base and student on `held_out`; writes everything under `workdir`.

    `corpus` are training records to take the most common trace from; without them the report lacks that floor.
    `repeats` is the directory of a run that this one is to be the repetition of: that it can be is checked first, that
    it was in the end.

    Returns True when the run is complete, False when a signal stopped it after saving. Raises what `Run` raises,
    `Diverged` when update after update was not finite or sampler and trainer disagree, and `NotReproduced`; of several
    hosts, `HostsError` and `HostLost`.
    """
    with StopRequested() as stop, hosts.together():
        if hosts.count() > 1:
            hosts.check(config, workdir, {"the configuration": config_hash(config), "the data": data_hash(config)})
        with _alone_in(Path(workdir)), Run(config, workdir) as run, hosts.together():
            return _train(run, stream, held_out, corpus, stop, repeats)


_LOCK = ".lock"


@contextmanager
def _alone_in(workdir: Path) -> Iterator[None]:
    """Keeps a second trainer out, whose lines and checkpoints would mix with this one's; raises `CheckpointError`.

    The kernel ends the lock with the process, however that dies, and no process started by it inherits the lock.
    """

    def take() -> bool:
        lock = stack.enter_context((workdir / _LOCK).open("a"))
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # POSIX leaves open which of the two
            return False
        except OSError as error:  # some network file systems know no locks
            logging.warning("%s: cannot be locked (%s); see to it that nothing else trains there", workdir, error)
        return True

    made = not workdir.exists()
    workdir.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        if not hosts.from_first(take):
            raise CheckpointError(
                f"{workdir}: another process trains there; wait for its end, or give another --workdir"
            )
        try:
            yield
        finally:
            # A run that was refused leaves nothing behind.
            if made and hosts.is_first() and [path.name for path in workdir.iterdir()] == [_LOCK]:
                (workdir / _LOCK).unlink()
                workdir.rmdir()


def _train(
    run: Run,
    stream: RecordStream,
    held_out: Sequence[TeacherRecord],
    corpus: Sequence[TeacherRecord],
    stop: StopRequested,
    repeats: Path | None,
) -> bool:
    """`train`, once everything is open."""
    config = run.config
    resumed = run.resume()
    start = 0
    if resumed is not None:
        start, position = resumed
        stream.set_state(position)
    run.checkpoints.prepare(run.state)
    with _writer(run, start) as writer:
        _write(run.workdir / "config.json", config.to_dict())
        if hosts.is_first():
            _record_environment(run, writer, repeats)
        if start:
            writer.note(f"resumed at step {start} of {config.steps}")
        with ExitStack() as stack:
            recorder = None
            if config.replay.record and hosts.is_first():
                recorder = stack.enter_context(ReplayWriter(run.workdir / "replay"))
            complete = _loop(run, stream, held_out, corpus, writer, stop, start, recorder)
        if complete and repeats is not None:
            same, line = hosts.from_first(lambda: verdict(repeats, run.workdir))
            if not same:
                raise NotReproduced(line)
            writer.note(line)
        return complete


def _writer(run: Run, start: int) -> MetricWriter | QuietWriter:
    if not hosts.is_first():
        return QuietWriter()
    return MetricWriter(run.workdir, run.config.steps, resumed_step=start)


def _write(path: Path, value: dict) -> None:
    if hosts.is_first():
        write_json(path, value)


def _record_environment(run: Run, writer: MetricWriter, repeats: Path | None) -> None:
    """Keeps where the run was started, and after it every place where it was gone on with."""
    now = environment(run.config, run.student)
    if repeats is not None:
        for line in check_same(recorded_environment(repeats), now, repeats):
            writer.note(f"notice: {line}; the last digits may differ")
    path = run.workdir / ENVIRONMENT_FILE
    if path.exists():
        first = recorded_environment(run.workdir)
        write_json(path, {**first, "resumed": [*first.get("resumed", []), now]})
    else:
        write_json(path, now)


def _loop(
    run: Run,
    stream: RecordStream,
    held_out: Sequence[TeacherRecord],
    corpus: Sequence[TeacherRecord],
    writer: MetricWriter | QuietWriter,
    stop: StopRequested,
    step: int,
    recorder: ReplayWriter | None,
) -> bool:
    config, student = run.config, run.student
    tasks = fitting_tasks(student, held_out, config, runners=run.runners, note=writer.note)
    needs_sandbox = config.reward.build().needs_execution and config.method != "replay"
    records = stream
    if needs_sandbox:
        records = executable_only(stream, run.runners, list if config.plays_episodes else lambda record: [record])

    def assess(name: str, adapters: dict | None, *, again: bool = False) -> float | None:
        """The mean reward of the evaluation called `name`, which is made unless it is there."""
        path = run.workdir / f"eval_{name}.json"
        digest = None if adapters is None else weights_hash(adapters)  # every host takes part in it
        known = lambda: (
            [load_evaluation(path)["metrics"]["reward"]]
            if evaluated_before(path, tasks, config, adapters=digest)
            else []
        )
        if not again and (reward := hosts.from_first(known)):
            return reward[0]
        stop.check()
        with writer.progress(f"evaluating {name}", len(tasks)) as shown:

            def advance(count: int) -> None:
                shown(count)
                stop.check()

            result = evaluate(student, adapters, tasks, run.judge, config, name=name, advance=advance)
        _write(path, result)
        m = result["metrics"]
        reward = "unknown" if m["reward"] is None else f"{m['reward']:.4f}"
        writer.note(f"{name}: reward {reward} on {m['tasks']} held-out tasks in {m['seconds']:.0f} s")
        return m["reward"]

    def save() -> float:
        """Starts saving; the seconds it held the run up. Rollouts of the steps before are on disk first."""
        began = time.perf_counter()
        if recorder is not None:
            recorder.wait()
        run.save(step, stream.get_state())
        return time.perf_counter() - began

    stalled = 0.0  # how long the last save held the run up
    try:
        assess("base", None)
        while True:
            # The last step's student is evaluated anyway; it takes part in the choice only where there is one.
            due = step and config.eval.every and step % config.eval.every == 0
            if due and (step < config.steps or config.control.keep_best):
                reward = assess(f"step{step}", run.state.lora)
                run.control = control.after_evaluation(run.control, step, reward, config)
                if config.control.keep_best and run.control.best_step == step:
                    run.keep_as_best(step, stream.get_state())
            if step >= config.steps or run.control.stopped:
                break
            stop.check()
            with count_compiles() as compiled:
                done = take_step(run, records, step, recorder)
            step += 1
            more = {"compiles": float(compiled.count), "seconds/checkpoint": stalled}
            writer.write(step, done.metrics | more, done.histograms)
            if step == config.steps or step % config.checkpoint.every == 0:
                # After the metrics: a run that goes on from this checkpoint must find every line before it.
                stalled = save()
            if done.metrics["skipped"]:
                writer.note(f"step {step}: loss or gradient not finite, update skipped; see {run.workdir / BROKEN}")
            control.check_broken(run.control, config, run.workdir / BROKEN)
            control.check_gap(run.control, config)
        if run.control.stopped and step < config.steps:
            writer.note(f"training ends at step {step} of {config.steps}: {run.control.stopped}")
        save()
        run.wait()
        stop.check()
        write_bounds(run.workdir, tasks, corpus, student.tokenizer, run.judge, config, write=_write)
        assess("student", run.best_lora(), again=True)
    except (Stopped, control.Diverged) as reason:
        save()
        run.wait()
        if isinstance(reason, control.Diverged):
            raise
        writer.note(f"stopped by {reason}; saved at step {step}. Run the same command to go on.")
        return False
    if hosts.is_first():
        writer.note(f"report: {write_report(run.workdir)}, every trace: {write_page(run.workdir)}")
    return True
