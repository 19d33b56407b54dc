"""A day of the reward service in ten minutes: `python -m tests.sandbox_soak --requests=20000 --seconds=600`.

Mixed requests (right, wrong, malformed, broken rules, repeated ones; with tests and without), one in twenty hostile,
while processes of the sandboxes are killed at random.  As a trainer's, they come in batches of two groups, and a group
answers one task, each member with an action of its own.
Afterwards: every request was answered once, with its own answer; and no process, mount, descriptor, thread or file in
the temporary folders is left that was not there before.  Exit code: 0 all of that holds, 1 it does not.
`sandbox_soak_test.py` runs a short one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from srl_jax.records import SCHEMA_VERSION, SourceFile, Task, TeacherRecord, TestSpec, Versions
from srl_jax.rewards import REWARD_VERSION, RewardConfig
from srl_jax.sandbox import Limits, Sandbox, SandboxConfig, Status
from srl_jax.sandbox.service import RewardService, Score, ScoreRequest, ServiceConfig
from srl_jax.trace import Action, StateUpdate, Trace, render_trace

ACTION = Action("python", "old($X)", "new($X)", ("app.py",))
STATE = StateUpdate(("rename old",), (), (), ("run tests",))
THINK = "The old call is gone, so rename it."
APP = "def new(x):\n    return x\n\n\ndef f(x):\n    return old(x)\n"
TEST = (
    "import unittest\nfrom app import f\n\n\n"
    "class T(unittest.TestCase):\n    def test_f(self):\n        self.assertEqual(f(1), 1)\n"
)
HOSTILE = (
    "import os\nwhile True: os.fork()\n",
    "import os\nos.kill(-1, 9)\n",
    "import os\nos._exit(0)\n",
    "hold = bytearray(b'x') * (900 << 20)\n",
    "while True: pass\n",
    "import os\nif os.fork() == 0:\n    os.setsid()\n    while True: pass\n",
    "open('/tmp/x', 'wb').write(bytes(100 << 20))\n",
    "import os\nwhile True: os.write(1, b'x' * 65536)\n",
)
GROUP, BATCH = 8, 16


class WordEmbedder:
    """Thinks are equal here, or counted by word: the soak is of the sandbox, not of the embedding model."""

    def embed(self, texts: list[str]) -> np.ndarray:
        rows = np.zeros((len(texts), 384), np.float32)
        for row, text in zip(rows, texts, strict=True):
            for word in text.split():
                row[sum(map(ord, word)) % 384] += 1
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@dataclass(frozen=True)
class Asked:
    """A request and what must come of it: "right", "repeated" (right, one of a few), "wrong" (a reward, no success),
    "malformed" or "hostile".
    """

    kind: str
    request: ScoreRequest


def record(number: int, hostile: str | None = None) -> TeacherRecord:
    """A task of its own (the number is in its text, so that nothing of another's comes from the cache), perhaps a
    hostile one.

    Every other task has tests, and all hostile ones.
    """
    app = f"{hostile or ''}{APP}# {number}\n"
    files = (SourceFile("app.py", app), SourceFile("tests/test_app.py", TEST))
    expected = (SourceFile("app.py", app.replace("old(x)", "new(x)")),)
    tested = hostile is not None or number % 2 == 0
    spec = TestSpec("unittest", ("tests.test_app.T.test_f",), ("tests/test_app.py",)) if tested else None
    task = Task(
        f"soak-{number}", "rename", "python", "python", "rename", 1, "generated", files, files[:1],
        StateUpdate.empty(), spec, expected,
    )  # fmt: skip
    versions = Versions(SCHEMA_VERSION, "soak", REWARD_VERSION)
    trace = render_trace(Trace(THINK, ACTION, STATE))
    return TeacherRecord(task, trace, WordEmbedder().embed([THINK])[0], 1.0, {}, versions, "soak")


def make_request(number: int, dice: random.Random) -> Asked:
    if dice.random() < 0.05:
        return Asked("hostile", ScoreRequest(record(0).trace, record(number, dice.choice(HOSTILE))))
    kind = dice.choices(["right", "repeated", "wrong", "malformed"], [3, 3, 3, 1])[0]
    if kind == "repeated":  # an answer known from before
        return Asked(kind, ScoreRequest(record(0).trace, record(-dice.randrange(1, 50))))
    task = record(number // GROUP + 1)
    if kind == "malformed":
        return Asked(kind, ScoreRequest(dice.choice(["", "nonsense", "<think>x", "\ud800"]), task))
    own = f"$X{number}"  # so that the answer of no other member is this one's
    action = replace(ACTION, pattern=f"old({own})", replacement=f"new({own})")
    if kind == "wrong":
        changes = [
            {"replacement": f"newer({own})"}, {"pattern": f"gone({own})"}, {"pattern": f"old({own}"},
            {"files": ("x.py",)},
        ]  # fmt: skip
        action = replace(action, **dice.choice(changes))
    return Asked(kind, ScoreRequest(render_trace(Trace(THINK, action, STATE)), task))


def fault(asked: Asked, score: Score) -> str | None:
    """Why this is not the answer to that request; None when it is, or when the infrastructure owned up to a failure."""
    if asked.kind == "malformed":
        return None if score.reward and score.reward.total == -0.2 else "malformed text did not score -0.2"
    if score.report is None:
        return None if score.unscored else "neither a report nor a reason"
    # ast-grep and the test program are shot too, and theirs are deaths that a guest can bring about itself.
    shot = score.report.status in (Status.CRASH, Status.TIMEOUT) or score.report.tests in ("cut", "timeout")
    if asked.kind in ("right", "repeated") and not score.report.success and not shot:
        return f"the right edit failed: {score.report.status}, {score.report.tests}"
    if asked.kind == "wrong" and score.report.success:
        return "a wrong edit succeeded"
    return None


def descendants(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread is gone
            for child in map(int, task.read_text().split()):
                found += [child, *descendants(child)]
    return found


def host_state() -> dict[str, object]:
    """What a leak would change."""
    return {
        "processes": len(descendants(os.getpid())),
        "mounts": len(Path("/proc/self/mountinfo").read_text().splitlines()),
        "descriptors": len(os.listdir("/proc/self/fd")),  # noqa: PTH208
        "threads": threading.active_count(),
        "temporary files": sorted(path.name for path in Path(tempfile.gettempdir()).iterdir()),
    }


class Reaper(threading.Thread):
    """Kills a random process of the sandboxes now and then."""

    def __init__(self, pause_s: float, seed: int) -> None:
        super().__init__(name="reaper")
        self._pause_s, self._dice = pause_s, random.Random(seed)
        self.done = threading.Event()
        self.killed = 0

    def run(self) -> None:
        while not self.done.wait(self._dice.uniform(0, 2 * self._pause_s)):
            if victims := descendants(os.getpid()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._dice.choice(victims), signal.SIGKILL)
                    self.killed += 1


@contextlib.contextmanager
def own_temporary_folder() -> Iterator[None]:
    """What is left in it is ours: other jobs use the machine's."""
    with tempfile.TemporaryDirectory(prefix="srl_jax-soak-") as folder:
        Path(folder).chmod(0o755)
        before, tempfile.tempdir = tempfile.tempdir, folder
        try:
            yield
        finally:
            tempfile.tempdir = before


@own_temporary_folder()
def soak(requests: int, seconds: float, *, slots: int, pause_s: float, seed: int = 0) -> dict[str, object]:
    """Run it; returns figures, with `faults` (a list of sentences) and `leaks` (what differs before and after)."""
    dice = random.Random(seed)
    before = host_state()
    faults: list[str] = []
    tally: Counter[str] = Counter()
    limits = Limits(wall_s=4.0, cpu_s=1)
    config = SandboxConfig(slots=slots, test_limits=limits, slot_memory_bytes=512 << 20)
    reaper = Reaper(pause_s, seed)
    started = time.monotonic()
    with (
        Sandbox(config) as sandbox,
        RewardService(
            WordEmbedder(),
            lambda text: len(text.split()),
            reward=RewardConfig(execution=0.2),
            sandbox=sandbox,
            config=ServiceConfig(retries=3, deadline_s=300.0),
        ) as service,
    ):
        reaper.start()
        waiting: list[tuple[list[Asked], Future[list[Score]]]] = []

        def settle(batch: list[Asked], scores: list[Score]) -> None:
            tally["answered"] += len(scores)
            for asked, score in zip(batch, scores, strict=True):
                tally[asked.kind] += 1
                tally["unscored"] += score.reward is None
                if wrong := fault(asked, score):
                    faults.append(f"{asked.request.record.task.task_id}: {wrong}")

        number = 0
        while number < requests and time.monotonic() - started < seconds:
            batch = [make_request(number + i, dice) for i in range(min(BATCH, requests - number))]
            number += len(batch)
            waiting.append((batch, service.submit([asked.request for asked in batch])))
            while waiting and waiting[0][1].done():
                settle(waiting[0][0], waiting[0][1].result())
                waiting.pop(0)
        for batch, future in waiting:
            settle(batch, future.result())
        reaper.done.set()
        reaper.join()
        counts = service.counts
    spent = time.monotonic() - started
    if tally["answered"] != number:
        faults.append(f"{number} requests, {tally['answered']} answers")
    after = host_state()
    leaks = {name: [before[name], after[name]] for name in before if before[name] != after[name]}
    return {
        "requests": number, "seconds": round(spent, 1), "per_second": round(number / spent, 1), "slots": slots,
        "killed": reaper.killed, **tally, "retries": counts.get("retries", 0), "cached": counts.get("cached", 0),
        "faults": faults, "leaks": leaks,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--seconds", type=float, default=600.0, help="stop asking after so long")
    parser.add_argument("--slots", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--pause", type=float, default=1.0, help="mean seconds between two random kills")
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    result = soak(flags.requests, flags.seconds, slots=flags.slots, pause_s=flags.pause, seed=flags.seed)
    print(json.dumps(result, indent=1))
    return 1 if result["faults"] or result["leaks"] else 0


if __name__ == "__main__":
    sys.exit(main())
