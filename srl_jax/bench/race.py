"""Several systems timed against each other, in turns.

One process for each system. The parent asks one at a time for a rollout, then for an update, while the others sleep; a
round is one turn of every system, and the order rotates. So what else the machine does in a minute meets all systems
alike, and a ratio is taken within a round. Every finished round is on disk before the next begins.
"""

import contextlib
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from srl_jax.bench import worker
from srl_jax.bench.weights import write_model
from srl_jax.bench.workload import Workload
from srl_jax.config import ConfigError
from srl_jax.evaluation import write_bytes

_PAUSE_S = 0.3  # for the threads of the system before to fall asleep
_LIMIT_S = 3600.0  # for one part; the first includes loading and compiling

System = tuple[str, Mapping[str, Any]]  # "module:function" of its `run`, and the options it takes
SYSTEMS: dict[str, System] = {
    "ours": ("srl_jax.bench.ours:run", {}),
    "hf": ("srl_jax.bench.peer_hf:run", {}),
    "trl": ("srl_jax.bench.peer_trl:run", {}),
    "tunix": ("srl_jax.bench.peer_tunix:run", {}),
    "unshared": ("srl_jax.bench.ours:run", {"shared": False}),
    "unforced": ("srl_jax.bench.ours:run", {"forced": False}),
    "unmasked": ("srl_jax.bench.ours:run", {"forced": False, "masked": False}),
    "ragged": ("srl_jax.bench.ours:run", {"ragged": True}),
    "uncompacted": ("srl_jax.bench.ours:run", {"ragged": True, "compact": False}),
    "speculating": ("srl_jax.bench.ours:run", {"drafts": 3}),
}


class Rounds:
    """The rounds of one race that have been run, in `<out>/rounds/<race>-<workload>.json`.

    The first entry is the warm-up (loading and compiling); it starts anew in every process and the last one is kept.
    """

    def __init__(self, path: Path, commit: str) -> None:
        self._path = path
        stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if stored and stored["commit"] != commit:
            raise ConfigError(
                "out", str(path), f"holds rounds of commit {stored['commit']}, this is {commit}; give another --out"
            )
        self.value: dict[str, Any] = stored or {"commit": commit, "warmup": {}, "rounds": []}

    def save(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(self._path, (json.dumps(self.value) + "\n").encode())


class _Runner:
    """A worker process and the line to it. `failed` says why it is out of the race."""

    def __init__(self, system: System, workload: Workload, directory: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection: Connection
        self._connection, far = context.Pipe()
        target, options = system
        self._process = context.Process(target=worker.main, args=(far, target, workload, directory, dict(options)))
        self._process.start()
        far.close()
        self.failed: str | None = None

    def turn(self) -> dict[str, Any]:
        """Part -> what the worker reports of it, or `{"failed": reason}`."""
        reports: dict[str, Any] = {}
        for part in worker.PARTS:
            if self.failed is None:
                reports[part] = self._ask(part)
        return {"failed": self.failed} if self.failed is not None else reports

    def _ask(self, part: str) -> dict[str, Any] | None:
        try:
            with contextlib.suppress(BrokenPipeError):  # it has ended; what it had to say is still in the pipe
                self._connection.send(part)
            if not self._connection.poll(_LIMIT_S):
                self.failed = f"{part} took longer than {_LIMIT_S:.0f} s"
                self._process.kill()  # or it would compute beside the others
                self._process.join()
                return None
            report = self._connection.recv()
        except (EOFError, ConnectionResetError):
            self._process.join(10)
            self.failed = f"its process ended (exit code {self._process.exitcode}; -9 is out of memory)"
            return None
        self.failed = report.get("failed")
        return report

    def close(self) -> None:
        self._connection.close()
        self._process.join(5)
        if self._process.is_alive():  # inside a peer's own loop, which may catch what the gate raises
            self._process.kill()
            self._process.join()


@contextlib.contextmanager
def _runners(systems: Mapping[str, System], workload: Workload, directory: Path) -> Iterator[dict[str, _Runner]]:
    started: dict[str, _Runner] = {}
    try:
        for name, system in systems.items():
            started[name] = _Runner(system, workload, directory)
        yield started
    finally:
        for runner in started.values():
            runner.close()


def race(
    name: str,
    workload: Workload,
    systems: Mapping[str, System],
    out: Path,
    *,
    rounds: int,
    commit: str,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Runs what is missing of `rounds` rounds and returns the stored value: commit, warmup, rounds.

    A round is `{"at": ISO time, "systems": {system: {part: report} or {"failed": reason}}}`. A system that fails is
    asked no more, and stays in the table with its reason.
    """
    stored = Rounds(out / "rounds" / f"{name}-{workload.name}.json", commit)
    missing = rounds - len(stored.value["rounds"])
    if missing <= 0:
        return stored.value
    directory = out / "models" / f"{workload.model}-{workload.dtype}"
    if not (directory / "config.json").exists():
        write_model(workload, directory)
    with _runners(systems, workload, directory) as runners:
        for system, runner in runners.items():  # one after the other: two compiling at once may not fit in memory
            stored.value["warmup"][system] = runner.turn()
            say(f"{name} {workload.name} warm-up {system}: {describe(stored.value['warmup'][system])}")
        stored.save()
        for number in range(len(stored.value["rounds"]), rounds):
            order = list(runners)
            order = order[number % len(order) :] + order[: number % len(order)]
            reports: dict[str, Any] = {}
            for system in order:
                time.sleep(_PAUSE_S)
                reports[system] = runners[system].turn()
                say(f"{name} {workload.name} round {number + 1}/{rounds} {system}: {describe(reports[system])}")
            at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            stored.value["rounds"].append({"at": at, "systems": reports})
            stored.save()
    return stored.value


def describe(report: Mapping[str, Any]) -> str:
    """One line about one turn."""
    if "failed" in report:
        return f"failed: {report['failed']}"
    return ", ".join(f"{part} {value['seconds']:.2f} s" for part, value in report.items())
