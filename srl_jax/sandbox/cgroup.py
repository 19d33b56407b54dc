"""A control group per slot: memory (tmpfs included) and number of processes, bounded by the kernel over the whole run.

Resource limits bound each process; only a control group bounds their sum.  Root on a machine with a writable v1 or v2
hierarchy gets one; elsewhere the namespace's process count, the tmpfs sizes and a watch over the resident memory are
what holds, and `EnvReport.isolation` says so.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
SELF = Path("/proc/self/cgroup")
# One shell word of set-up: a process moves itself by writing 0, and exec keeps its number.
_ENTER = 'for group; do shift; [ "$group" = -- ] && break; echo 0 > "$group/cgroup.procs" || exit 97; done; exec "$@"'
ENTER_FAILED = 97


@dataclass(frozen=True)
class Cgroup:
    """The groups of one slot: one on v2, one per controller on v1."""

    folders: tuple[Path, ...]

    def enter(self) -> list[str]:
        """Command prefix that joins the groups and becomes the command after it."""
        return ["/bin/sh", "-c", _ENTER, "enter", *map(str, self.folders), "--"]

    def memory_kills(self) -> int:
        """Processes that the kernel has killed for the groups' memory so far; 0 where it does not count them."""
        for folder in self.folders:
            for name in ("memory.events", "memory.oom_control"):  # v2, v1
                with contextlib.suppress(FileNotFoundError):
                    counts = dict(line.split() for line in (folder / name).read_text().splitlines())
                    return int(counts.get("oom_kill", 0))
        return 0

    def close(self) -> None:
        """Remove the groups; a group that is still being emptied stays for the slot's next holder."""
        for folder in self.folders:
            with contextlib.suppress(OSError):
                folder.rmdir()


def open_cgroup(slot: str, *, memory_bytes: int, processes: int) -> Cgroup | None:
    """The slot's control groups with their limits set, or None where the machine offers none to us."""
    if os.geteuid() != 0:
        return None
    # Below our own group, so that whatever bounds this process bounds its sandboxes too.
    own = dict(line.split(":", 2)[1:] for line in SELF.read_text().splitlines())
    if (ROOT / "cgroup.controllers").exists():
        parent = ROOT / own[""].lstrip("/")
        limits = {parent: {"memory.max": memory_bytes, "memory.swap.max": 0, "pids.max": processes}}
    elif "memory" in own and "pids" in own:
        limits = {
            ROOT / "memory" / own["memory"].lstrip("/"): {"memory.limit_in_bytes": memory_bytes},
            ROOT / "pids" / own["pids"].lstrip("/"): {"pids.max": processes},
        }
    else:
        return None
    folders = []
    try:
        for parent, values in limits.items():
            folder = parent / f"srl_jax-{slot}"
            folder.mkdir(exist_ok=True)
            folders.append(folder)
            for name, value in values.items():
                if name == "memory.swap.max" and not (folder / name).exists():
                    continue  # a kernel without swap accounting
                (folder / name).write_text(str(value))
    except OSError:
        # Read-only or not delegated, as in most containers.
        Cgroup(tuple(folders)).close()
        return None
    return Cgroup(tuple(folders))
