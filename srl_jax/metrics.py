"""Numbers of a run: one JSON line a step, TensorBoard, and a view for the person watching.

Metric names are paths, the same in all three places: `reward/total`, `reward/action`, `reward/state`,
`reward/think`, `kl` (per token, against the base), `parse_rate`, `kept_groups`, `tokens_per_second`, `loss`, ...
Host only: callers pass plain numbers.
"""

import contextlib
import json
import math
import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

METRICS_FILE = "metrics.jsonl"
_PLAIN_SECONDS = 10.0  # between two lines about one evaluation where the output is a file or a pipe


class MetricWriter:
    """Writes `<workdir>/metrics.jsonl`, `<workdir>/tensorboard/` and progress on `console`.

    `resumed_step` is the step the run goes on from (0: a fresh start). Lines of later steps, which a killed run had
    written after its last checkpoint, are dropped, and so is a line cut off in the middle.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        total_steps: int,
        *,
        resumed_step: int = 0,
        console: Console | None = None,
    ):
        self._workdir = Path(workdir)
        self._workdir.mkdir(parents=True, exist_ok=True)
        path = self._workdir / METRICS_FILE
        if path.exists():
            _keep_until(path, resumed_step)
        self._lines = path.open("a", encoding="utf-8")
        self._tensorboard = _Events(self._workdir / "tensorboard", purge_step=resumed_step + 1)
        self._view = _View(console or Console(), total_steps, resumed_step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def write(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Records one step. None is a value that was not measured; a NaN or infinity is written as null and named."""
        broken = sorted(name for name, value in metrics.items() if value is not None and not math.isfinite(value))
        record: dict[str, Any] = {"step": step, "time": round(time.time(), 3)}
        record |= {name: None if name in broken else value for name, value in metrics.items()}
        if broken:
            record["non_finite"] = broken
        self._lines.write(json.dumps(record, allow_nan=False) + "\n")
        self._lines.flush()  # what was written survives a kill of this process
        self._tensorboard.write(step, metrics)
        self._view.show(step, metrics)

    def note(self, message: str) -> None:
        """One line for the person watching."""
        self._view.note(message)

    @contextlib.contextmanager
    def progress(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        """Progress of a part of the run other than training steps, such as an evaluation; yields advance(n)."""
        with self._view.part(description, total) as advance:
            yield advance

    def close(self) -> None:
        """Flushes and closes everything; the progress display ends."""
        self._view.close()
        self._lines.close()
        self._tensorboard.close()


def read_metrics(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a run in the order written; [] where there are none. A cut-off last line is left out."""
    path = Path(workdir) / METRICS_FILE
    return [record for record, _ in _records(path)] if path.exists() else []


def describe(metrics: Mapping[str, float | None]) -> str:
    """The few numbers worth watching, in one line; what was not measured is left out."""
    formats = {
        "reward/total": "reward {:.3f}",
        "reward/action": "action {:.3f}",
        "reward/state": "state {:.3f}",
        "reward/think": "think {:.3f}",
        "kl": "KL {:.4f}",
        "kept_groups": "kept {:.0%}",
        "tokens_per_second": "{:.0f} tok/s",
    }
    values = ((text, metrics.get(name)) for name, text in formats.items())
    return "  ".join(text.format(value) for text, value in values if value is not None)


def _records(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            record["step"]
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):
                return  # the process was killed while writing it
            raise ValueError(f"{path}:{number}: not a metrics record; delete the line or the file") from error
        yield record, line


def _keep_until(path: Path, step: int) -> None:
    kept = [line.rstrip("\n") + "\n" for record, line in _records(path) if record["step"] <= step]
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


class _Events:
    """TensorBoard's event file, written by the calling thread.

    Its usual `SummaryWriter` hands events to a thread, which a full disk kills; the queue to it then fills and the run
    hangs instead of ending with the error.
    """

    def __init__(self, folder: Path, purge_step: int):
        folder.mkdir(exist_ok=True)
        self._file = EventsWriter(str(folder / "events"))
        self._file.write_event(
            Event(wall_time=time.time(), step=purge_step, session_log=SessionLog(status=SessionLog.START))
        )

    def write(self, step: int, metrics: Mapping[str, float | None]) -> None:
        values = [scalar(name, value).value[0] for name, value in metrics.items() if value is not None]
        event = Event(wall_time=time.time(), step=step)
        event.summary.value.extend(values)
        self._file.write_event(event)
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class _View:
    """A live bar on a terminal, plain lines elsewhere (a log file must not hold control codes)."""

    def __init__(self, console: Console, total_steps: int, resumed_step: int):
        self._console = console
        self._total = total_steps
        self._seconds: deque[float] = deque(maxlen=20)
        self._last = time.monotonic()
        self._progress: Progress | None = None
        if console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[numbers]}"),
                console=console,
            )
            self._progress.start()
            self._training = self._progress.add_task("training", total=total_steps, completed=resumed_step, numbers="")

    def show(self, step: int, metrics: Mapping[str, float | None]) -> None:
        now = time.monotonic()
        self._seconds.append(now - self._last)
        self._last = now
        if self._progress is not None:
            self._progress.update(self._training, completed=step, numbers=describe(metrics))
            return
        # The median, because the first step compiles and an evaluation falls between two others.
        left = round(statistics.median(self._seconds) * max(0, self._total - step))
        eta = f"ETA {left // 3600}:{left // 60 % 60:02}:{left % 60:02}"
        self._print(f"step {step}/{self._total}  {describe(metrics)}  {eta}")

    def note(self, message: str) -> None:
        self._print(message)

    @contextlib.contextmanager
    def part(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        if self._progress is not None:
            task = self._progress.add_task(description, total=total, numbers="")
            try:
                yield lambda n: self._progress.advance(task, n)
            finally:
                self._progress.remove_task(task)
            return
        done, last = 0, time.monotonic()

        def advance(n: int) -> None:
            nonlocal done, last
            done += n
            if done >= total or time.monotonic() - last >= _PLAIN_SECONDS:
                last = time.monotonic()
                self._print(f"{description} {done}/{total}")

        yield advance

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
