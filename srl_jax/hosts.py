"""Several hosts as one run: how a process joins, does its share of the host's work, and decides as the others do.

Every process runs the same program. Their devices meet in the collectives of jitted functions; what is made on the host
meets here. One rule holds wherever several may be running: what is run next is decided by values that all have alike,
gathered or told by the first, because a process that takes another branch leaves the others waiting for it.

Alone, in one process, nothing here communicates.
"""

import atexit
import contextlib
import itertools
import json
import os
import re
import secrets
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding

from srl_jax.config import ConfigError, TrainConfig

# After so long without a sign of life JAX's coordination service ends the processes that are left. Where sockets carry
# the collectives, as between CPUs, these fail at once; over NCCL or a TPU's links they would wait for ever.
HEARTBEAT_SECONDS = 60
_LEAST_BYTES = 1024
_SEEN_WITHIN_S = 10.0  # what one host has written is to be seen by the others

_Item = TypeVar("_Item")


class HostsError(ValueError):
    """Hosts that cannot make one run; the message says what differs or what is missing."""


class HostLost(RuntimeError):
    """A computation over all hosts failed: another one has ended, or cannot be reached any more."""


def join(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Makes this process one of several; before any JAX computation. All None: JAX finds them (TPU pods, Slurm).

    Waits up to five minutes for the others. Raises `HostsError` when they do not come.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # It would take SIGTERM away from the training loop, which agrees with the other hosts on when to stop.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(coordinator, processes, process, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
        _watch()
    except (ValueError, RuntimeError) as error:
        where = f"with the coordinator {coordinator}" if coordinator else "that JAX could find by itself"
        raise HostsError(
            f"no run {where}: {_first_line(error)}; start every host with the same command and its own --process_id, "
            "and give --coordinator_address an address of process 0 that all can reach"
        ) from error


# JAX ends a process by aborting it, when the coordinator is gone or a heartbeat is missed: there is no exception to
# catch then. This shell outlives the process and says what to do, unless it is told that the end is in order.
_LAST_WORDS = 'read -r _ || printf "error: %s\\n" "$0" >&2'
_watchers: list[subprocess.Popen[bytes]] = []


def _watch() -> None:
    words = (
        f"host {index()} of {count()} was ended, by a kill or by JAX because another host was lost; see why that one "
        "ended, then start all hosts again with the same command: they go on from the last checkpoint"
    )
    shell = subprocess.Popen(["sh", "-c", _LAST_WORDS, words], stdin=subprocess.PIPE, start_new_session=True)
    _watchers.append(shell)
    atexit.register(ends_in_order)


def ends_in_order() -> None:
    """To be called where this process ends by itself and has said why, if there is anything to say."""
    while _watchers:
        shell = _watchers.pop()
        with contextlib.suppress(BrokenPipeError):
            shell.communicate(b"\n")


def count() -> int:
    return jax.process_count()


def index() -> int:
    return jax.process_index()


def is_first() -> bool:
    """Whether this process is the one that writes what is written once."""
    return jax.process_index() == 0


def place(array: np.ndarray, sharding: Sharding) -> jax.Array:
    """An array that every host has whole, each placing its part."""
    if count() == 1:
        return jax.device_put(array, sharding)
    return jax.make_array_from_callback(array.shape, sharding, lambda part: array[part])


def gather(tree: Any) -> Any:
    """A tree of arrays as numpy arrays, whole on every host."""
    whole = lambda x: isinstance(x, np.ndarray) or x.is_fully_addressable or x.is_fully_replicated
    return jax.tree.map(lambda x: np.asarray(x if whole(x) else multihost_utils.process_allgather(x, tiled=True)), tree)


def share(mine: Sequence[bytes]) -> list[list[bytes]]:
    """What every host hands over, by host; as many pieces from each as it likes."""
    if count() == 1:
        return [list(mine)]
    sizes = np.asarray([len(mine), *map(len, mine)], "<i8").tobytes()
    data = np.frombuffer(sizes + b"".join(mine), np.uint8)
    longest = int(multihost_utils.process_allgather(np.int32(len(data))).max())
    # Powers of two, because every length is a program of its own.
    padded = np.zeros(max(_LEAST_BYTES, 1 << (longest - 1).bit_length()), np.uint8)
    padded[: len(data)] = data
    return [_pieces(row.tobytes()) for row in multihost_utils.process_allgather(padded)]


def _pieces(data: bytes) -> list[bytes]:
    number = int(np.frombuffer(data, "<i8", 1)[0])
    ends = 8 * (number + 1) + np.cumsum([0, *np.frombuffer(data, "<i8", number, offset=8)])
    return [data[start:end] for start, end in itertools.pairwise(ends)]


def my_share(total: int) -> range:
    """Which of `total` things in a row this host sees to."""
    return range(total * index() // count(), total * (index() + 1) // count())


def spread(items: Sequence[_Item], work: Callable[[Sequence[_Item]], Sequence[bytes]]) -> list[bytes]:
    """What `work` makes of the items, one piece of each, in their order: every host works on its share of them."""
    mine = my_share(len(items))
    return [piece for pieces in share(work(items[mine.start : mine.stop])) for piece in pieces]


def from_first(tell: Callable[[], Any]) -> Any:
    """What the first host's `tell` returns, plain JSON data, on every host; the others do not call theirs."""
    if count() == 1:
        return tell()
    return json.loads(share([json.dumps(tell()).encode()] if is_first() else [])[0][0])


def greatest(number: int) -> int:
    """The greatest of the hosts' numbers."""
    return number if count() == 1 else int(multihost_utils.process_allgather(np.int32(number)).max())


def check(config: TrainConfig, workdir: str | os.PathLike[str], same: Mapping[str, str]) -> None:
    """Refuses, before any work, what several hosts cannot do together; `same` is for `check_same`.

    Raises `ConfigError` for settings that need one host, `HostsError` where hosts differ or do not see one workdir.
    """
    check_same(same)
    check_settings(config)
    _check_workdir(Path(workdir))


def check_same(things: Mapping[str, str]) -> None:
    """Raises `HostsError` on every host where one has another value of anything than the first has."""
    told = [json.loads(one) for [one] in share([json.dumps(dict(things)).encode()])]
    for host, theirs in enumerate(told):
        for name, ours in told[0].items():
            if theirs[name] != ours:
                raise HostsError(f"{name}: {theirs[name]} on host {host}, {ours} on host 0; give all hosts the same")


def check_settings(config: TrainConfig) -> None:
    """Raises `ConfigError` for what is not done by several hosts together: on every one, where they have one recipe."""
    needed = {
        "method": (config.method, "srl", "the baselines train on one host"),
        "grpo.returns": (config.grpo.returns, "step", "whole episodes are played on one host"),
        "grpo.baseline": (config.grpo.baseline, ("group", "none"), "the value head is trained on one host"),
        "sampling.slots": (config.sampling.slots, 0, "hosts decode all prompts of a step at once"),
    }
    for name, (value, wanted, why) in needed.items():
        choices = wanted if isinstance(wanted, tuple) else (wanted,)
        if value not in choices:
            remedy = " or ".join(map(repr, choices))
            raise ConfigError(name, value, f"must be {remedy} on several hosts ({why}); or start a single one")
    if config.sandbox.ray_address:
        raise ConfigError("sandbox.server", config.sandbox.server, "each of several hosts would start a Ray service")
    if config.data.prompts_per_step % count():
        raise ConfigError(
            "data.prompts_per_step", config.data.prompts_per_step, f"must be a multiple of the {count()} hosts"
        )


def _check_workdir(workdir: Path) -> None:
    """One directory for all: each writes its part of every checkpoint, and all read them."""
    name = from_first(lambda: f".seen-by-all-{secrets.token_hex(4)}")
    if is_first():
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / name).touch()
    greatest(0)  # it is written
    deadline = time.monotonic() + _SEEN_WITHIN_S
    while not (workdir / name).exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    blind = greatest(0 if (workdir / name).exists() else index())
    if is_first():
        (workdir / name).unlink()
    if blind:
        raise HostsError(f"{workdir} is not the same directory on host {blind} as on host 0; put it on shared storage")


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Names what a failed collective means: raises `HostLost` for it."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        if not jax.distributed.is_initialized() or not _of_the_runtime(error) or "RESOURCE_EXHAUSTED" in str(error):
            raise
        raise HostLost(
            f"host {index()} of {count()} lost another one ({_first_line(error)}); see why that one ended, then start "
            "all hosts again with the same command: they go on from the last checkpoint"
        ) from error


def _of_the_runtime(error: Exception) -> bool:
    """Whether XLA raised it: as a ValueError where a CPU computes on the calling thread, which it does when little."""
    return isinstance(error, jax.errors.JaxRuntimeError) or re.match(r"[A-Z_]{5,}: ", str(error)) is not None


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:300]
