"""Where the stages run: on this machine's threads, or on a Ray cluster.

A stage is a pure function of a sandbox and a shard, that is, of a list small enough to be done again. Results come
back in the order of the shards, so who computed what, and how often, cannot be seen in the output.
"""

import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

from data_pipeline.errors import DataError
from data_pipeline.limits import open_sandbox
from srl_jax.sandbox.isolation import SandboxCrash
from srl_jax.sandbox.runner import Sandbox

T = TypeVar("T")
R = TypeVar("R")
Stage = Callable[[Sandbox, T], R]

# The sandbox may be killed from outside, which says nothing about the step.
ATTEMPTS = 3
# Shards in flight per worker: enough that none waits, few enough that the driver never holds many.
_AHEAD = 3


class Executor(Protocol):
    """`run` applies a stage to shards and yields results in order; `workers` shards are under way at once."""

    workers: int

    def run(self, stage: Stage[T, R], shards: Iterable[T]) -> Iterator[R]: ...

    def close(self) -> None: ...


class LocalExecutor:
    """Threads of this process. What is dear runs in the sandbox's processes, outside the interpreter's lock."""

    def __init__(self, sandbox: Sandbox) -> None:
        self.workers = sandbox.config.slots
        self._sandbox = sandbox

    def run(self, stage: Stage[T, R], shards: Iterable[T]) -> Iterator[R]:
        with ThreadPoolExecutor(self.workers) as pool:
            yield from in_order(lambda shard: pool.submit(stage, self._sandbox, shard).result, shards, self.workers)

    def close(self) -> None:
        """Nothing of its own; the sandbox belongs to the caller."""


class RayExecutor:
    """Tasks on a Ray cluster, each in a process with a sandbox of its own.

    `address` is that of a running cluster ("auto": the one this machine belongs to); "" starts one on this machine
    with `workers` processes. A task whose worker or machine dies is done again elsewhere, as is one whose sandbox
    crashed. Every node needs this package installed and what the sandbox needs.
    """

    def __init__(self, address: str = "", workers: int = 2) -> None:
        try:
            import ray
        except ImportError:
            raise DataError("--executor=ray needs Ray: pip install -c third_party/constraints.txt ray") from None
        self._ray = ray
        try:
            if address:
                ray.init(address=address, log_to_driver=False, logging_level="warning")
            else:
                ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level="warning")
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise DataError(
                f"no Ray cluster at {address or 'this machine'} ({error}); start one with `ray start`"
            ) from error
        self.workers = max(1, int(ray.cluster_resources().get("CPU", workers)))
        self._task = ray.remote(max_retries=8, retry_exceptions=[SandboxCrash], num_cpus=1)(_run_stage)

    def run(self, stage: Stage[T, R], shards: Iterable[T]) -> Iterator[R]:
        def submit(shard: T) -> Callable[[], R]:
            reference = self._task.remote(stage, shard)
            return lambda: self._ray.get(reference)

        yield from in_order(submit, shards, self.workers)

    def close(self) -> None:
        self._ray.shutdown()


def in_order(submit: Callable[[T], Callable[[], R]], shards: Iterable[T], workers: int) -> Iterator[R]:
    """Results in the order of `shards`, of which only a few are taken ahead of the result being waited for."""
    waiting: deque[Callable[[], R]] = deque()
    for shard in shards:
        waiting.append(submit(shard))
        if len(waiting) > _AHEAD * workers:
            yield waiting.popleft()()
    while waiting:
        yield waiting.popleft()()


def open_executor(kind: str, sandbox: Sandbox, address: str = "") -> Executor:
    """The executor called `kind`; DataError for one that does not exist or cannot be had."""
    if kind == "local":
        return LocalExecutor(sandbox)
    if kind == "ray":
        return RayExecutor(address, sandbox.config.slots)
    raise DataError(f"--executor={kind}: must be local or ray")


def cut(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """`items` in shards of at most `size`."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def retried(action: Callable[[], R]) -> R:
    """`action()`, up to `ATTEMPTS` times while the sandbox itself crashes."""
    for _ in range(ATTEMPTS - 1):
        try:
            return action()
        except SandboxCrash:
            continue
    return action()


@functools.cache
def _own_sandbox() -> Sandbox:
    """This worker process's sandbox; its uids are given back when the process ends."""
    return open_sandbox(1)


def _run_stage(stage: Stage[Any, Any], shard: Any) -> Any:
    return stage(_own_sandbox(), shard)
