"""Many runs from one declarative file: resumable cells, each a training command of its own, then one table.

A cell is a name and the fields it changes in the base recipe; each is trained once per seed, in
`<out>/<cell>/seed<N>/`, by a process of its own, so that a crash is that cell's alone. Running the sweep again starts
what is missing, goes on with what was stopped and tries again what failed. The base, which most cells share, is
evaluated once for all that agree in what its answers and their scores depend on.
"""

import dataclasses
import importlib.util
import json
import os
import queue
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from srl_jax.config import ConfigError, TrainConfig, validate
from srl_jax.evaluation import DECISIVE, write_bytes, write_json

RECIPE, LOG, STATUS, BASE = "recipe.py", "log.txt", "status.json", "eval_base.json"
_STOPPED = 3  # exit code of launch/train.py after a signal: saved, to be resumed
_POLL_S = 0.2


class SweepError(ValueError):
    """A sweep that cannot be run as declared; the message names the file or cell and the remedy."""


@dataclasses.dataclass
class Sweep:
    """`base` is a recipe's path; `cells` maps a name to {"grpo.kl_coef": 0.1, ...}. The first cell is the reference.

    `overrides` go to every cell, before its own.
    """

    base: str
    cells: dict[str, dict[str, Any]]
    seeds: tuple[int, ...] = (0, 1, 2)
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Job:
    """One cell under one seed."""

    cell: str
    seed: int
    config: TrainConfig
    workdir: Path

    @property
    def recipe(self) -> str:
        """A recipe of the complete configuration, so that the cell can be rerun alone, whatever the base becomes."""
        values = json.dumps(self.config.to_dict(), indent=1)
        return (
            f'"""Cell {self.cell!r}, seed {self.seed}; written by launch/sweep.py."""\n\nimport json\n\n'
            f"from srl_jax.config import TrainConfig\n\n_VALUES = json.loads({values!r})\n\n\n"
            "def get_config() -> TrainConfig:\n    return TrainConfig.from_dict(_VALUES)\n"
        )

    @property
    def status(self) -> Mapping[str, Any]:
        """How the last try ended: `state` is "done", "failed" or "stopped", and "missing" before the first."""
        path = self.workdir / STATUS
        return json.loads(path.read_text()) if path.exists() else {"state": "missing"}


def load_recipe(path: Path) -> Any:
    """What `get_config()` of the file returns; `SweepError` where there is no such file or function."""
    if not path.is_file():
        raise SweepError(f"{path}: no such file")
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise SweepError(f"{path}: has no get_config()")
    return module.get_config()


def plan(
    sweep: Sweep,
    out: Path,
    seeds: Sequence[int] = (),
    overrides: Sequence[str] = (),
    *,
    cells: Sequence[str] = (),
) -> list[Job]:
    """Every job of the sweep, seed by seed, its configuration built and validated.

    `seeds` replace the sweep's own; `cells` are the ones to take, in that order, all by default; `overrides`,
    `field=value` with values as JSON or text, are added to its own.
    Raises `SweepError` for a cell that cannot run, or whose directory holds another configuration's run.
    """
    if not isinstance(sweep, Sweep):
        raise SweepError(f"a sweep file's get_config() must return a srl_jax.sweep.Sweep, not {type(sweep).__name__}")
    sweep = dataclasses.replace(
        sweep,
        seeds=tuple(seeds) or sweep.seeds,
        overrides={**sweep.overrides, **dict(map(_override, overrides))},
    )
    for cell in cells:
        if cell not in sweep.cells:
            raise SweepError(f"cell {cell!r}: not in the sweep, which has {', '.join(sweep.cells)}")
    if cells:
        sweep = dataclasses.replace(sweep, cells={cell: sweep.cells[cell] for cell in cells})
    if not sweep.cells or not sweep.seeds:
        raise SweepError("a sweep needs at least one cell and one seed")
    if len(set(sweep.seeds)) < len(sweep.seeds):
        raise SweepError(f"seeds {sweep.seeds} hold one twice")
    jobs = []
    for seed in sweep.seeds:  # all cells once before any cell twice: an interrupted sweep still compares
        for cell, changes in sweep.cells.items():
            if not re.fullmatch(r"[\w.+-]+", cell):
                raise SweepError(f"cell {cell!r}: names are directories; use letters, digits and . + - _")
            config = load_recipe(Path(sweep.base))
            try:
                for field, value in {**sweep.overrides, **changes, "seed": seed}.items():
                    _assign(config, field, value)
                validate(config)
            except ConfigError as error:
                raise SweepError(f"cell {cell!r}: {error}") from error
            job = Job(cell, seed, config, out / cell / f"seed{seed}")
            recipe = job.workdir / RECIPE
            if recipe.exists() and recipe.read_text() != job.recipe:
                raise SweepError(
                    f"{job.workdir}: holds a run of another configuration (see {RECIPE}); give another --out, or "
                    "delete that directory to train the cell anew"
                )
            jobs.append(job)
    return jobs


def _override(text: str) -> tuple[str, Any]:
    field, _, value = text.partition("=")
    if not field or not value:
        raise SweepError(f"override {text!r} is no field=value, such as steps=10 or model.quantize=bfloat16")
    try:
        return field, json.loads(value)
    except ValueError:
        return field, value


def _assign(config: TrainConfig, field: str, value: Any) -> None:
    *sections, name = field.split(".")
    part = config
    for section in sections:
        if section not in part.__dataclass_fields__:
            raise ConfigError(field, value, f"{section} is no section")
        part = part.__dict__[section]
    setattr(part, name, value)


def run_jobs(
    jobs: Sequence[Job],
    command: Sequence[str],
    *,
    parallel: int,
    devices: Sequence[str] = (),
    note: Callable[[str], None],
) -> bool:
    """Runs what is not done, `parallel` at a time; False when a signal stopped the sweep.

    `command` is completed by `--config` and `--workdir`. With `devices`, each process sees one of them alone
    (CUDA_VISIBLE_DEVICES). SIGINT and SIGTERM let the running ones save first.
    """
    stopping = threading.Event()
    slots: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    for index in range(parallel):
        slots.put(devices[index % len(devices)] if devices else None)

    def work(job: Job) -> None:
        device = slots.get()
        try:
            if not stopping.is_set():
                job.workdir.mkdir(parents=True, exist_ok=True)
                _borrow_base(job, jobs, note)
                _run(job, command, device, stopping, note)
        finally:
            slots.put(device)

    previous = {number: signal.signal(number, lambda *_: stopping.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with ThreadPoolExecutor(parallel) as pool:
            for future in [pool.submit(work, job) for job in jobs if job.status["state"] != "done"]:
                future.result()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return not stopping.is_set()


def _borrow_base(job: Job, jobs: Sequence[Job], note: Callable[[str], None]) -> None:
    """Gives `job` a finished one's evaluation of the base, where both would make the same one.

    Its seed does not matter to greedy answers. The trainer compares tasks and settings before it takes it.
    """
    if (job.workdir / BASE).exists():
        return
    ours = job.config.to_dict()
    for other in jobs:
        theirs, path = other.config.to_dict(), other.workdir / BASE
        alike = all(ours[part] == theirs[part] for part in DECISIVE)
        if alike and other.status["state"] == "done" and path.exists():
            write_json(job.workdir / BASE, json.loads(path.read_text(encoding="utf-8")))
            note(f"{job.cell}, seed {job.seed}: its base is that of {other.cell}, already evaluated")
            return


def _run(
    job: Job, command: Sequence[str], device: str | None, stopping: threading.Event, note: Callable[[str], None]
) -> None:
    recipe = job.workdir / RECIPE
    if not recipe.exists():
        write_bytes(recipe, job.recipe.encode())
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if device is not None:
        environment["CUDA_VISIBLE_DEVICES"] = device
    label = f"{job.cell}, seed {job.seed}"
    note(f"{label}: started")
    began = time.monotonic()
    with (job.workdir / LOG).open("ab") as log:
        # A session of its own: Ctrl-C must reach it once, from us, since the second signal kills.
        process = subprocess.Popen(
            [*command, f"--config={recipe}", f"--workdir={job.workdir}"],
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
        )  # fmt: skip
        told = False
        while process.poll() is None:
            if stopping.is_set() and not told:
                process.terminate()
                told = True
            time.sleep(_POLL_S)
    code = process.returncode
    state = "done" if code == 0 else "stopped" if code == _STOPPED or told else "failed"
    seconds = time.monotonic() - began
    status = {"state": state, "code": code, "seconds": round(seconds, 1), "said": last_words(job.workdir / LOG)}
    write_json(job.workdir / STATUS, status)
    note(f"{label}: {state} after {seconds:.0f} s" + (f" ({status['said']})" if state == "failed" else ""))


def last_words(log: Path) -> str:
    """The last non-blank line of a log, for a table: at most 200 characters."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.strip()[-200:] for line in reversed(lines) if line.strip()), "no output")
