"""One system in a process of its own, which works only while it is asked to.

A system is a function `run(gate, workload, directory, **options)` that trains for ever: again and again
`with gate.part("rollout") as part:` and `with gate.part("update") as part:` around its real work. Entering waits until
the parent asks for that part; leaving reports its time. So a peer's own training loop runs as it is, with the gate in
its hooks, and sleeps while another system is timed.
"""

import contextlib
import dataclasses
import importlib
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from srl_jax.bench.workload import Workload

PARTS = ("rollout", "update")


class PartFailed(RuntimeError):
    """What could not be measured in a process of its own; the message is that of the error there."""


@dataclasses.dataclass
class Part:
    """What a system says of the part it has just done; `seconds` is measured around it."""

    tokens: int = 0  # completion tokens sampled
    extra: dict[str, float] = dataclasses.field(default_factory=dict)


class Gate:
    """Lets a system through one part at a time."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._compiles: list[float] | None = None  # None: nobody counts
        self._started = 0.0
        self._part = Part()

    def count_compilations(self) -> None:
        """For systems on JAX: reports how many programs a part compiled, and the seconds that took."""
        from jax import monitoring

        compiles = self._compiles = []

        def listen(event: str, seconds: float, **_: Any) -> None:
            if event == "/jax/core/compile/backend_compile_duration":
                compiles.append(seconds)

        monitoring.register_event_duration_secs_listener(listen)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[Part]:
        yield self.begin(name)
        self.end()

    def begin(self, name: str) -> Part:
        """Waits to be asked for `name`, then starts the clock."""
        try:
            asked = self._connection.recv()
        except EOFError:  # the parent has what it wanted, or is gone
            asked = None
        if asked is None:
            raise SystemExit
        if asked != name:
            raise RuntimeError(f"asked for {asked}, but {name} comes next")
        if self._compiles is not None:
            self._compiles.clear()
        self._part = Part()
        self._started = time.perf_counter()
        return self._part

    def end(self, extra: Mapping[str, float] | None = None) -> None:
        """Stops the clock and reports, `extra` as well. Whatever ran asynchronously must be waited for before."""
        seconds = time.perf_counter() - self._started
        self._connection.send(
            {
                "seconds": seconds,
                "tokens": self._part.tokens,
                "compilations": None if self._compiles is None else len(self._compiles),
                "compile_seconds": sum(self._compiles or ()),
                "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
                **self._part.extra,
                **(extra or {}),
            }
        )


def main(connection: Connection, system: str, workload: Workload, directory: Path, options: dict[str, Any]) -> None:
    """Entry of the process: runs `system` ("module:function") until the parent closes the connection."""
    module, _, function = system.partition(":")
    os.environ["TQDM_DISABLE"] = "1"  # peers draw bars over what the parent says
    try:
        getattr(importlib.import_module(module), function)(Gate(connection), workload, directory, **options)
    except ModuleNotFoundError as error:
        connection.send({"failed": f"not installed: {error}"})
    except Exception as error:  # whatever a peer does, it is reported and the others go on
        traceback.print_exc(file=sys.stderr)
        connection.send({"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"})


def carried(function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's value; whatever it raises is printed and becomes a `PartFailed`, which can go to the parent."""
    try:
        return function(*arguments)
    except Exception as error:  # of whatever class: few of ours survive being sent
        traceback.print_exc(file=sys.stderr)
        raise PartFailed(f"{type(error).__name__}: {error}") from None
