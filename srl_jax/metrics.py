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
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TextIO

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import histogram, scalar

METRICS_FILE = "metrics.jsonl"
HISTOGRAMS_FILE = "histograms.jsonl"
_BINS = 24
# Rewards lie in [-.2, 1]: bins of .05 with these ends are the same in every run and step, and so comparable.
_REWARD_RANGE = (-0.2, 1.0)
_PLAIN_SECONDS = 10.0  # between two lines about one evaluation where the output is a file or a pipe


class MetricWriter:
    """Writes `<workdir>/metrics.jsonl`, `histograms.jsonl` and `tensorboard/`, and progress on `console`.

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
        self._lines, self._histograms = (
            self._go_on(self._workdir / name, resumed_step) for name in (METRICS_FILE, HISTOGRAMS_FILE)
        )
        self._tensorboard = _Events(self._workdir / "tensorboard", purge_step=resumed_step + 1)
        self._view = _View(console or Console(), total_steps, resumed_step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @staticmethod
    def _go_on(path: Path, step: int) -> TextIO:
        if path.exists():
            _keep_until(path, step)
        return path.open("a", encoding="utf-8")

    def write(
        self,
        step: int,
        metrics: Mapping[str, float | None],
        histograms: Mapping[str, Sequence[float] | np.ndarray] | None = None,
    ) -> None:
        """Records one step. None is a value that was not measured; a NaN or infinity is written as null and named.

        `histograms` are finite values to be counted in bins: of .05 over [-.2, 1] for rewards, over their own range
        for others.
        """
        broken = sorted(name for name, value in metrics.items() if value is not None and not math.isfinite(value))
        record: dict[str, Any] = {"step": step, "time": round(time.time(), 3)}
        record |= {name: None if name in broken else value for name, value in metrics.items()}
        if broken:
            record["non_finite"] = broken
        self._lines.write(json.dumps(record, allow_nan=False) + "\n")
        self._lines.flush()  # what was written survives a kill of this process
        counted = {name: _histogram(name, values) for name, values in (histograms or {}).items() if len(values)}
        if counted:
            self._histograms.write(json.dumps({"step": step} | counted) + "\n")
            self._histograms.flush()
        self._tensorboard.write(step, metrics, histograms or {})
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
        self._histograms.close()
        self._tensorboard.close()


class QuietWriter:
    """A `MetricWriter` that writes and shows nothing: those of several hosts that are not the first."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def write(self, *record: object) -> None:
        pass

    def note(self, message: str) -> None:
        pass

    @contextlib.contextmanager
    def progress(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        yield lambda n: None


def read_metrics(workdir: str | os.PathLike[str], name: str = METRICS_FILE) -> list[dict[str, Any]]:
    """The records of a run in the order written; [] where there are none. A cut-off last line is left out."""
    path = Path(workdir) / name
    return [record for record, _ in _records(path)] if path.exists() else []


def is_timing(name: str) -> bool:
    """Whether a metric depends on the clock or on what was compiled before, and so differs between equal runs."""
    return name.startswith("seconds/") or name in ("time", "tokens_per_second", "model_tflops", "mfu", "compiles")


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


def _binned(name: str, values: Sequence[float] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The values, and the edges of equal bins that hold all of them: what lies outside goes into the bin at its end.

    -0.2 in float32 is a little less than the edge -0.2, and TensorBoard refuses a histogram that counts nothing.
    """
    low, high = _REWARD_RANGE if name.startswith("reward/") else (float(np.min(values)), float(np.max(values)))
    edges = np.linspace(low, high if high > low else low + 1.0, _BINS + 1)
    return np.clip(np.asarray(values, np.float64), edges[0], edges[-1]), edges


def _histogram(name: str, values: Sequence[float] | np.ndarray) -> dict[str, Any]:
    values, edges = _binned(name, values)
    counts, _ = np.histogram(values, edges)
    return {"range": [round(float(edges[0]), 6), round(float(edges[-1]), 6)], "counts": counts.tolist()}


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

    def write(
        self, step: int, metrics: Mapping[str, float | None], histograms: Mapping[str, Sequence[float] | np.ndarray]
    ) -> None:
        values = [scalar(name, value).value[0] for name, value in metrics.items() if value is not None]
        event = Event(wall_time=time.time(), step=step)
        event.summary.value.extend(values)
        for name, some in histograms.items():
            if len(some):
                event.summary.value.extend(histogram(f"histogram/{name}", *_binned(name, some)).value)
        self._file.write_event(event)
        self._file.flush()

    def close(self) -> None:
        self._file.close()


# Rows of the live view: title, metrics, and how their values are shown.
_ROWS = (
    ("reward", ("reward/total",), "{:.3f}"),
    ("action, state, think", ("reward/action", "reward/state", "reward/think"), "{:.3f}"),
    ("group spread, kept", ("reward/group_std", "kept_groups"), "{:.3f}"),
    ("KL, lambda", ("kl", "kl_coef"), "{:.4f}"),
    ("entropy, clipped", ("entropy", "clip_low", "clip_high"), "{:.3f}"),
    ("parse rate, tokens", ("parse_rate", "completion_tokens"), "{:.2f}"),
    ("loss, gradient", ("loss", "grad_norm"), "{:.4f}"),
    ("tok/s, TFLOP/s, MFU", ("tokens_per_second", "model_tflops", "mfu"), "{:.3g}"),
    ("s: rollout, reward, update", ("seconds/rollout", "seconds/reward_wait", "seconds/update"), "{:.2f}"),
    # Waited for the loader, in all; and by an execution for a slot of the sandbox.
    ("s queued: data, slot, longest", ("seconds/data_wait", "seconds/queue_mean", "seconds/queue_max"), "{:.2f}"),
)
_BARS = "▁▂▃▄▅▆▇█"
_TREND = 40  # steps


def trend(values: Sequence[float | None]) -> str:
    """A line of block characters from the lowest to the highest value; a blank where there is none."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known:
        return " " * len(values)
    low, span = min(known), max(known) - min(known)
    place = lambda value: 0 if span == 0 else round((value - low) / span * (len(_BARS) - 1))
    return "".join(" " if v is None or not math.isfinite(v) else _BARS[place(v)] for v in values)


class _View:
    """A live table and bar on a terminal, plain lines elsewhere (a log file must not hold control codes)."""

    def __init__(self, console: Console, total_steps: int, resumed_step: int):
        self._console = console
        self._total = total_steps
        self._seconds: deque[float] = deque(maxlen=20)
        self._last = time.monotonic()
        self._progress: Progress | None = None
        self._recent: deque[Mapping[str, float | None]] = deque(maxlen=_TREND)
        if console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=40),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=console,
            )
            self._training = self._progress.add_task("training", total=total_steps, completed=resumed_step)
            self._live = Live(self._progress, console=console, refresh_per_second=4)
            self._live.start()

    def show(self, step: int, metrics: Mapping[str, float | None]) -> None:
        now = time.monotonic()
        self._seconds.append(now - self._last)
        self._last = now
        if self._progress is not None:
            self._recent.append(metrics)
            self._progress.update(self._training, completed=step)
            self._live.update(Group(self._table(), self._progress))
            return
        # The median, because the first step compiles and an evaluation falls between two others.
        left = round(statistics.median(self._seconds) * max(0, self._total - step))
        eta = f"ETA {left // 3600}:{left // 60 % 60:02}:{left % 60:02}"
        self._print(f"step {step}/{self._total}  {describe(metrics)}  {eta}")

    def _table(self) -> Table:
        table = Table(box=None, show_header=False, pad_edge=False)
        for title, names, form in _ROWS:
            values = [self._recent[-1].get(name) for name in names]
            if any(value is not None for value in values):
                texts = ["-" if value is None else form.format(value) for value in values]
                table.add_row(title, "  ".join(texts), trend([m.get(names[0]) for m in self._recent]))
        return table

    def note(self, message: str) -> None:
        self._print(message)

    @contextlib.contextmanager
    def part(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        if self._progress is not None:
            task = self._progress.add_task(description, total=total)
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
            self._live.stop()

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
