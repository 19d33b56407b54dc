"""What a long run meets, on purpose: `python -m tests.fault_drill --out=/tmp/drill --kills=50`.

A tiny run is killed at random moments (while starting and while saving too), meets a full disk, a corrupted newest
checkpoint, batches of NaNs, sandbox processes that are killed, and a clock that jumps. After each it goes on with the
same command, and its end is compared with an undisturbed run's: every metric but timings, and the checksums of
adapters, optimiser and RNG, bit for bit where the fault loses nothing. Prints a row of reports/faults.md for each
fault. Exit code 1 when any came out otherwise.
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

from srl_jax.checkpoint import saved_checksums
from srl_jax.metrics import is_timing, read_metrics

ROOT = Path(__file__).parents[1]
STEPS = 24
MOMENTS = ("within a step", "while saving", "while starting")
TIMEOUT_S = 900  # a run that is not over by then hangs


@dataclass(frozen=True)
class Ended:
    """How a process ended, and the last line it said on stderr."""

    code: int
    said: str
    seconds: float


def start(workdir: Path, fault: str = "") -> subprocess.Popen[str]:
    environment = {"JAX_PLATFORMS": "cpu", **os.environ, "PYTHONPATH": str(ROOT), "SRL_DRILL_FAULT": fault}
    environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "xla-tests"))
    environment.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    command = [sys.executable, "-m", "tests.fault_worker", str(workdir), str(STEPS)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def finish(process: subprocess.Popen[str], began: float) -> Ended:
    with process:
        try:
            _, err = process.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    lines = [line for line in err.splitlines() if line.strip()]
    return Ended(process.returncode, lines[-1][:300] if lines else "", time.monotonic() - began)


def whole(workdir: Path, fault: str = "") -> Ended:
    began = time.monotonic()
    return finish(start(workdir, fault), began)


def steps_done(workdir: Path) -> int:
    path = workdir / "metrics.jsonl"
    return len(path.read_text().split("\n")) - 1 if path.exists() else 0


def wait_for_steps(process: subprocess.Popen[str], workdir: Path, count: int) -> None:
    while process.poll() is None and steps_done(workdir) < count:
        time.sleep(0.005)


def final(workdir: Path) -> dict:
    return saved_checksums(workdir / "checkpoints")


def told(workdir: Path) -> list[dict]:
    return [{name: m[name] for name in m if not is_timing(name)} for m in read_metrics(workdir)]


def same_end(ended: Ended, workdir: Path, undisturbed: Path) -> str:
    """Empty where a run ended as the undisturbed one did, otherwise what differs."""
    if ended.code:
        return f"ended with {ended.code}: {ended.said}"
    if final(workdir).get("step") != STEPS:
        return f"ended at step {final(workdir).get('step')}"
    if final(workdir) != final(undisturbed):
        return "the final state differs"
    return "" if told(workdir) == told(undisturbed) else "the metrics differ"


def saving(workdir: Path) -> bool:
    return any((workdir / "checkpoints").glob("*orbax-checkpoint-tmp*"))


def kills(workdir: Path, undisturbed: Path, count: int, rng: random.Random) -> tuple[str, dict]:
    """SIGKILL in turns at a moment of its own, while a checkpoint is written, and while the run starts or restores."""
    seen = dict.fromkeys(MOMENTS, 0)
    counts = {"runs compared": 0, "starts": 0}
    startup = 10.0  # seconds to the first new step, as last seen
    while (killed := sum(seen.values())) < count or steps_done(workdir):
        done, began = steps_done(workdir), time.monotonic()
        counts["starts"] += 1
        if killed == count or done >= STEPS:
            if difference := same_end(whole(workdir), workdir, undisturbed):
                return difference, seen | counts
            counts["runs compared"] += 1
            shutil.rmtree(workdir)
            continue
        process, wanted = start(workdir), MOMENTS[killed % 3]
        if wanted == "while starting":
            time.sleep(rng.uniform(0.0, startup))
        else:
            wait_for_steps(process, workdir, done + 1)  # one more than it had, so that the run gets on
            startup = time.monotonic() - began
            moment = time.monotonic() + rng.uniform(0.0, 1.0)
            reached = lambda end=moment: time.monotonic() > end
            if wanted == "while saving":
                reached = lambda: saving(workdir)
            while process.poll() is None and not reached():
                time.sleep(0.001)
        if process.poll() is None:
            caught = wanted  # what a start finds half saved is what the kill before it left
            if wanted != "while starting":
                caught = "while saving" if saving(workdir) else "within a step"
            process.send_signal(signal.SIGKILL)
            seen[caught] += 1
        ended = finish(process, began)
        if ended.code not in (0, -signal.SIGKILL):
            return f"ended with {ended.code}: {ended.said}", seen | counts
    return "", seen | counts


def full_disk(workdir: Path, undisturbed: Path) -> tuple[str, dict]:
    """No file may grow beyond what metrics.jsonl has: what the process then meets is what a full disk gives it."""
    began = time.monotonic()
    process = start(workdir)
    wait_for_steps(process, workdir, 6)
    size = (workdir / "metrics.jsonl").stat().st_size
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, size))
    ended = finish(process, began)
    if ended.code != 2 or not any(words in ended.said for words in ("File too large", "disk is full", "free space")):
        return f"ended with {ended.code}: {ended.said}", {}
    return same_end(whole(workdir), workdir, undisturbed), {"said": ended.said}


def corrupt_newest(workdir: Path, undisturbed: Path) -> tuple[str, dict]:
    """One bit of the newest checkpoint's largest file, after a kill."""
    began = time.monotonic()
    process = start(workdir)
    wait_for_steps(process, workdir, 12)
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
    return same_end(again, workdir, undisturbed), {"damaged": largest.name, "set aside": aside[0]}


def poisoned(workdir: Path, undisturbed: Path) -> tuple[str, dict]:
    """One batch of NaNs: skipped, dumped, and the run ends; the trajectory is another one by that step."""
    once = whole(workdir, "nan:8")
    dumps = [path.name for path in (workdir / "broken").glob("*.npz")] if (workdir / "broken").exists() else []
    skipped = [m["step"] for m in map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines()) if m["skipped"]]
    if once.code or dumps != ["step8.npz"] or skipped != [8] or final(workdir).get("step") != STEPS:
        return f"ended with {once.code}: {once.said}; dumped {dumps}, skipped {skipped}", {}
    return "", {"skipped": 8, "dumped": dumps[0]}


def poisoned_for_good(workdir: Path, undisturbed: Path) -> tuple[str, dict]:
    """NaNs without end: the run stops with the reason, and the same command goes on once the cause is gone."""
    ended = whole(workdir, "nan:8-")
    if ended.code != 2 or "3 updates in a row" not in ended.said:
        return f"ended with {ended.code}: {ended.said}", {}
    again = whole(workdir)
    step = final(workdir).get("step")
    trouble = "" if again.code == 0 and step == STEPS else f"then {again.code}: {again.said}, step {step}"
    return trouble, {"said": ended.said[:160]}


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
    return same_end(ended, workdir, alone), {"killed": killed}


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
    """The wall clock is right, a day behind and two days ahead in turns, a second each."""
    return same_end(whole(workdir, "clock:0"), workdir, undisturbed), {}


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
    parser.add_argument("--out", type=Path, required=True, help="a folder; an undisturbed run already in it is taken")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--faults", nargs="*", default=list(FAULTS), choices=list(FAULTS))
    options = parser.parse_args()
    undisturbed, wrong = options.out / "undisturbed", False
    print("| fault | what happened | seconds |\n| --- | --- | --- |", flush=True)
    if final(undisturbed).get("step") != STEPS:
        ended = whole(undisturbed)
        print(f"| none | code {ended.code}, {STEPS} steps {ended.said} | {ended.seconds:.0f} |", flush=True)
        wrong = ended.code != 0
    drills, rng = {}, random.Random(options.seed)
    if options.kills:
        drills[f"{options.kills} kills"] = lambda own, other: kills(own, other, options.kills, rng)
    drills |= {name: FAULTS[name] for name in options.faults}
    for name, drill in drills.items():
        began = time.monotonic()
        trouble, seen = drill(options.out / name.replace(" ", "_"), undisturbed)
        wrong = wrong or bool(trouble)
        facts = "; ".join(f"{key}: {value}" for key, value in seen.items())
        happened = f"{trouble or 'as it should be'}; {facts}" if facts else trouble or "as it should be"
        print(f"| {name} | {happened} | {time.monotonic() - began:.0f} |", flush=True)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
