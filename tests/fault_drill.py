"""What a long run meets, on purpose: `python -m tests.fault_drill --out=/tmp/drill --kills=50`.

A tiny run is killed at random moments (while saving too), meets a full disk, a corrupted newest checkpoint, a batch of
NaNs, sandbox processes that are killed, and a clock that jumps. After each it goes on with the same command, and its
end is compared with an undisturbed run's, bit for bit where the fault loses nothing. Prints one line a fault. Exit
code 1 when any came out otherwise.
"""

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
STEPS = 24


@dataclass(frozen=True)
class Ended:
    """How a process ended, and the last line it said on stderr."""

    code: int
    said: str
    seconds: float


def start(workdir: Path, fault: str = "") -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SRL_DRILL_FAULT": fault}
    command = [sys.executable, "-m", "tests.fault_worker", str(workdir), str(STEPS)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def finish(process: subprocess.Popen[str], began: float) -> Ended:
    _, err = process.communicate(timeout=900)
    lines = [line for line in err.splitlines() if line.strip()]
    return Ended(process.returncode, lines[-1][:300] if lines else "", time.monotonic() - began)


def whole(workdir: Path, fault: str = "") -> Ended:
    began = time.monotonic()
    return finish(start(workdir, fault), began)


def steps_done(workdir: Path) -> int:
    path = workdir / "metrics.jsonl"
    return len(path.read_text().split("\n")) - 1 if path.exists() else 0


def final(workdir: Path) -> dict:
    from srl_jax.checkpoint import saved_checksums

    return saved_checksums(workdir / "checkpoints")


def same_end(workdir: Path, undisturbed: Path) -> str:
    """Empty where the runs ended alike, otherwise what differs."""
    from srl_jax.metrics import is_timing, read_metrics

    told = lambda path: [{k: v for k, v in m.items() if not is_timing(k)} for m in read_metrics(path)]
    if final(workdir).get("step") != STEPS:
        return f"ended at step {final(workdir).get('step')}"
    if final(workdir) != final(undisturbed):
        return "the final state differs"
    return "" if told(workdir) == told(undisturbed) else "the metrics differ"


def kills(workdir: Path, undisturbed: Path, count: int, rng: random.Random) -> tuple[str, dict]:
    """SIGKILL at random moments from the first step on; half of them while a checkpoint is being written."""
    seen = {"kills": 0, "while saving": 0, "runs": 1}
    while seen["kills"] < count:
        done = steps_done(workdir)
        if done >= STEPS:  # nothing left to interrupt but the last evaluation
            ended = whole(workdir)
            if difference := ended.said if ended.code else same_end(workdir, undisturbed):
                return difference, seen
            seen["runs"] += 1
            shutil.rmtree(workdir)
            continue
        began = time.monotonic()
        process = start(workdir)
        wanted_saving = seen["kills"] % 2 == 0
        # One more step than the run had, so that it gets on; then a moment of its own.
        while process.poll() is None and steps_done(workdir) <= done:
            time.sleep(0.005)
        moment = time.monotonic() + rng.uniform(0.0, 0.4)
        while process.poll() is None:
            saving = any((workdir / "checkpoints").glob("*tmp*"))
            if saving if wanted_saving else time.monotonic() > moment:
                break
            time.sleep(0.001)
        if process.poll() is None:
            seen["while saving"] += any((workdir / "checkpoints").glob("*tmp*"))
            process.send_signal(signal.SIGKILL)
            seen["kills"] += 1
        ended = finish(process, began)
        if ended.code not in (0, -signal.SIGKILL):
            return f"ended with {ended.code}: {ended.said}", seen
    ended = whole(workdir)
    return (f"ended with {ended.code}: {ended.said}" if ended.code else same_end(workdir, undisturbed)), seen


def full_disk(workdir: Path, undisturbed: Path) -> tuple[str, dict]:
    """No file may grow beyond what metrics.jsonl has: what the process then meets is what a full disk gives it."""
    began = time.monotonic()
    process = start(workdir)
    while process.poll() is None and steps_done(workdir) < 6:
        time.sleep(0.01)
    size = (workdir / "metrics.jsonl").stat().st_size
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, size))
    ended = finish(process, began)
    if ended.code != 2 or not any(words in ended.said for words in ("File too large", "disk is full", "free space")):
        return f"ended with {ended.code}: {ended.said}", {}
    again = whole(workdir)
    return (again.said if again.code else same_end(workdir, undisturbed)), {"said": ended.said}


def corrupt_newest(workdir: Path, undisturbed: Path) -> tuple[str, dict]:
    """One bit of the newest checkpoint's largest file, after a kill."""
    began = time.monotonic()
    process = start(workdir)
    while process.poll() is None and steps_done(workdir) < 12:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    finish(process, began)
    newest = max((workdir / "checkpoints").glob("[0-9]*[0-9]"), key=lambda path: int(path.name.partition(".")[0]))
    largest = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    again = whole(workdir)
    aside = [path.name for path in (workdir / "checkpoints").glob("*.corrupt")]
    if not aside:
        return "the damage was not found", {}
    return (again.said if again.code else same_end(workdir, undisturbed)), {"set aside": aside[0]}


def poisoned(workdir: Path, undisturbed: Path) -> tuple[str, dict]:
    """One batch of NaNs: skipped, dumped, and the run ends; the trajectory is another one by that step."""
    once = whole(workdir, "nan:7")
    dumps = [path.name for path in (workdir / "broken").glob("*.npz")] if (workdir / "broken").exists() else []
    skipped = [m["step"] for m in map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines()) if m["skipped"]]
    if once.code or dumps != ["step7.npz"] or skipped != [7] or final(workdir).get("step") != STEPS:
        return f"ended with {once.code}: {once.said}; dumped {dumps}, skipped {skipped}", {}
    return "", {"skipped": 7, "dumped": dumps[0]}


def poisoned_for_good(workdir: Path, undisturbed: Path) -> tuple[str, dict]:
    """NaNs without end: the run stops with the reason, and the same command goes on once the cause is gone."""
    ended = whole(workdir, "nan:7-")
    if ended.code != 2 or "3 updates in a row" not in ended.said:
        return f"ended with {ended.code}: {ended.said}", {}
    again = whole(workdir)
    step = final(workdir).get("step")
    return ("" if again.code == 0 and step == STEPS else f"then {again.code}: {again.said}, step {step}"), {
        "said": ended.said[:160]
    }


def reward_worker(workdir: Path, undisturbed: Path) -> tuple[str, dict]:
    """Processes that execute actions for the reward are killed: each is run again, and no reward is another one."""
    alone = workdir.with_name(workdir.name + "_undisturbed")
    ended = whole(alone, "execute:0")
    if ended.code:
        return f"undisturbed: {ended.code}: {ended.said}", {}
    began, killed = time.monotonic(), 0
    process = start(workdir, "execute:0")
    while process.poll() is None:
        if steps_done(workdir) >= 2 and killed < 5:
            for worker in sandboxes(process.pid)[:1]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker, signal.SIGKILL)
                    killed += 1
                time.sleep(0.5)
        time.sleep(0.002)
    ended = finish(process, began)
    if not killed:
        return "no execution was met", {}
    return (f"{ended.code}: {ended.said}" if ended.code else same_end(workdir, alone)), {"killed": killed}


def sandboxes(parent: int) -> list[int]:
    """The sandbox processes that the process `parent` has started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, _, rest = path.read_text().partition("(")[2].rpartition(")")
            if int(rest.split()[1]) == parent and name.startswith("bwrap"):
                found.append(int(path.parent.name))
    return found


def clock(workdir: Path, undisturbed: Path) -> tuple[str, dict]:
    """The wall clock jumps a day back and two forward in the middle of the run."""
    ended = whole(workdir, "clock:0")
    return (ended.said if ended.code else same_end(workdir, undisturbed)), {}


FAULTS: dict[str, Callable[[Path, Path], tuple[str, dict]]] = {
    "disk full": full_disk,
    "corrupt newest checkpoint": corrupt_newest,
    "one batch of NaNs": poisoned,
    "NaNs without end": poisoned_for_good,
    "reward worker killed": reward_worker,
    "clock jumps": clock,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="an empty folder")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True)
    undisturbed = options.out / "undisturbed"
    ended = whole(undisturbed)
    print(f"undisturbed: {ended.seconds:.0f} s, {STEPS} steps, code {ended.code} {ended.said if ended.code else ''}")
    rng, wrong = random.Random(options.seed), int(ended.code != 0)
    drills = {f"{options.kills} kills": lambda own, other: kills(own, other, options.kills, rng), **FAULTS}
    for name, drill in drills.items():
        began = time.monotonic()
        trouble, seen = drill(options.out / name.replace(" ", "_"), undisturbed)
        wrong += bool(trouble)
        print(f"{name}: {trouble or 'as it should be'} ({time.monotonic() - began:.0f} s) {seen or ''}", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
