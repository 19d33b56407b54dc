"""A control group per slot: memory (tmpfs included) and number of processes, bounded by the kernel over the whole run.

Resource limits bound each process; only a control group bounds their sum.  Root on a machine with a writable v1 or v2
hierarchy gets one; elsewhere the namespace's process count, the tmpfs sizes and a watch over the resident memory are
what holds, and `EnvReport.isolation` says so.
"""

from __future__ import annotations

import contextlib
import errno
import os
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
SELF = Path("/proc/self/cgroup")
# One shell word of set-up: a process moves itself by writing 0, and exec keeps its number.
_ENTER = 'for group; do shift; [ "$group" = -- ] && break; echo 0 > "$group/cgroup.procs" || exit 97; done; exec "$@"'
ENTER_FAILED = 97
_LEAF = "srl_jax-host"


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
    folders = []
    try:
        if (ROOT / "cgroup.controllers").exists():
            parent = _delegating(ROOT / own[""].lstrip("/"))
            limits = {parent: {"memory.max": memory_bytes, "memory.swap.max": 0, "pids.max": processes}}
        elif "memory" in own and "pids" in own:
            limits = {
                ROOT / "memory" / own["memory"].lstrip("/"): {"memory.limit_in_bytes": memory_bytes},
                ROOT / "pids" / own["pids"].lstrip("/"): {"pids.max": processes},
            }
        else:
            return None
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


def _delegating(group: Path) -> Path:
    """The v2 group, ours or the one above our leaf, that hands memory and pids down to groups below it.

    Version 2 lets a group hold processes or hand controllers down, not both.  So where a group is ours alone (a
    container's, a delegated unit's), its processes move into a leaf below it, which has no limits of its own.  Raises
    OSError where the group is not ours to arrange: read-only, or other people's processes are in it.
    """
    if group.name == _LEAF:
        group = group.parent
    control = group / "cgroup.subtree_control"
    if {"memory", "pids"} <= set(control.read_text().split()):
        return group
    try:
        control.write_text("+memory +pids")
        return group
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
    members = [int(pid) for pid in (group / "cgroup.procs").read_text().split()]
    if not all(map(_is_ours, members)):
        raise PermissionError(f"{group} holds processes that are not ours")
    leaf = group / _LEAF
    leaf.mkdir(exist_ok=True)
    for pid in members:
        with contextlib.suppress(ProcessLookupError):  # it has ended
            (leaf / "cgroup.procs").write_text(str(pid))
    control.write_text("+memory +pids")
    return group


def _is_ours(pid: int) -> bool:
    """Whether that process is this one or descends from it."""
    while pid > 1 and pid != os.getpid():
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return True  # it has ended, so nobody is moved
    return pid == os.getpid()
