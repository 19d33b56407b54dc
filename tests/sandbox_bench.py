"""The figures of reports/sandbox.md: `python -m tests.sandbox_bench --seconds=5 --slots=1,2 > figures.json`.

For each kind of run: actions or test runs per second over all slots, and the latency of one (p50, p99).  And what a
run is made of, to see what a warm pool could save: a bare process, bubblewrap around it, Python in that.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from srl_jax.records import TestSpec
from srl_jax.rewards import RewardConfig
from srl_jax.sandbox import Limits, Sandbox, SandboxConfig
from srl_jax.sandbox.service import RewardService, ScoreRequest
from srl_jax.trace import Action
from tests.sandbox_soak import WordEmbedder, record

ACTION = Action("python", "old($X)", "new($X)", ("app.py",))
APP = {"app.py": "def new(x):\n    return x\n\n\ndef f(x):\n    return old(x)\n"}
PYTHON_TEST = (
    "import unittest\nfrom app import f\n\n\nclass T(unittest.TestCase):\n"
    "    def test_f(self):\n        self.assertEqual(f(1), 1)\n"
)
NODE_TEST = "import test from 'node:test';\nimport './app.mjs';\ntest('t', () => {});\n"
JAVA_TEST = "public class AppTest {\n    public void testX() {}\n}\n"


def kinds(sandbox: Sandbox) -> dict[str, Callable[[], object]]:
    """What is measured, by name; runners that the machine lacks are left out."""
    found: dict[str, Callable[[], object]] = {"action alone": lambda: sandbox.apply(ACTION, APP)}
    tests = {
        "unittest": ("test_app.py", PYTHON_TEST, ACTION, APP),
        "pytest": ("test_app.py", PYTHON_TEST, ACTION, APP),
        "node": (
            "a.test.mjs", NODE_TEST, Action("javascript", "old($X)", "new($X)", ("app.mjs",)),
            {"app.mjs": "const f = (x) => old(x);\n"},
        ),
        "java": (
            "AppTest.java", JAVA_TEST, Action("java", "old($X)", "abs($X)", ("App.java",)),
            {"App.java": "class App {\n    int abs(int x) { return x; }\n    int f(int x) { return old(x); }\n}\n"},
        ),
    }  # fmt: skip
    for runner, (path, text, action, files) in tests.items():
        if runner in sandbox.runners:
            spec = TestSpec(runner, ("any",), (path,))
            repository = {**files, path: text}
            found[f"action and {runner}"] = lambda a=action, r=repository, s=spec: sandbox.execute(a, r, tests=s)
    return found


def measure(work: Callable[[], object], seconds: float, slots: int) -> dict[str, float]:
    """Runs `work` in a loop on `slots` threads for `seconds` (at least three times each)."""
    work()  # what is read for the first time

    def loop(_: int) -> list[float]:
        taken: list[float] = []
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(taken) < 3:
            started = time.perf_counter()
            work()
            taken.append(time.perf_counter() - started)
        return taken

    started, before = time.perf_counter(), os.times()
    with ThreadPoolExecutor(slots) as pool:
        taken = sorted(second for times in pool.map(loop, range(slots)) for second in times)
    spent, after = time.perf_counter() - started, os.times()
    cpu = sum(after[:4]) - sum(before[:4])
    return {
        "per_second": round(len(taken) / spent, 2),
        "p50_ms": round(1e3 * taken[len(taken) // 2], 1),
        "p99_ms": round(1e3 * taken[min(len(taken) - 1, int(0.99 * len(taken)))], 1),
        "cpu_ms": round(1e3 * cpu / len(taken), 1),
        "runs": len(taken),
    }


def parts(sandbox: Sandbox, seconds: float) -> dict[str, dict[str, float]]:
    """What one action's time is made of, each row with everything of the row before."""
    jail = sandbox._jail
    with sandbox._slot() as slot:
        enter = jail._enter(slot)
        bwrap = [
            # As its namespace's init, like a guest: otherwise bwrap's child is, which ends after its parent, and in a
            # tight loop those fill the slot's limit on processes.
            *enter, str(jail.bwrap), "--unshare-all", "--as-pid-1", "--ro-bind", "/usr", "/usr", "--symlink", "usr/lib",
            "/lib", "--symlink", "usr/lib64", "/lib64", "--proc", "/proc", "--", "/usr/bin/true",
        ]  # fmt: skip

        def process(command: list[str]) -> Callable[[], object]:
            return lambda: subprocess.run(command, check=True, env={}, cwd="/", capture_output=True)

        ast_grep = shutil.which("ast-grep", path=f"{os.path.dirname(sys.executable)}:{os.defpath}") or "ast-grep"  # noqa: PTH120
        return {
            "a bare process": measure(process(["/usr/bin/true"]), seconds, 1),
            "dropping privileges and bubblewrap around it": measure(process(bwrap), seconds, 1),
            "the whole jail, with a Python that does nothing": measure(
                lambda: jail.run("__init__", {}, limits=Limits(), slot=slot), seconds, 1
            ),
            "ast-grep --version, bare": measure(process([ast_grep, "--version"]), seconds, 1),
        }


def batch(sandbox: Sandbox, rounds: int) -> dict[str, float]:
    """A step's executions as training asks for them: 32 completions, all different, tasks with a unittest each.

    `hidden_s` is how long they take from submit to scores while the caller does something else.
    """
    taken = []
    with RewardService(
        WordEmbedder(), lambda text: len(text.split()), reward=RewardConfig(execution=0.2), sandbox=sandbox
    ) as service:
        for turn in range(rounds):
            records = [record(2 * (32 * turn + i)) for i in range(32)]
            started = time.perf_counter()
            scores = service.submit([ScoreRequest(each.trace, each) for each in records]).result()
            taken.append(time.perf_counter() - started)
            assert all(score.reward and score.report and score.report.success for score in scores)
    return {"hidden_s": round(sorted(taken)[len(taken) // 2], 2), "most_s": round(max(taken), 2), "batches": rounds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="per measurement")
    parser.add_argument("--slots", default="1,2", help="numbers of slots, with commas")
    flags = parser.parse_args()
    result: dict[str, object] = {"load_before": os.getloadavg(), "cpus": len(os.sched_getaffinity(0))}
    for slots in map(int, flags.slots.split(",")):
        with Sandbox(SandboxConfig(slots=slots, test_limits=Limits(wall_s=60.0, cpu_s=30))) as sandbox:
            result["versions"], result["isolation"] = sandbox.versions, sandbox.isolation
            result[f"{slots} slots"] = {
                name: measure(work, flags.seconds, slots) for name, work in kinds(sandbox).items()
            }
            result[f"{slots} slots"]["a batch of 32, executed"] = batch(sandbox, 3)
            if slots == 1:
                result["parts"] = parts(sandbox, flags.seconds)
    result["load_after"] = os.getloadavg()
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
