"""Hostile programs and actions in the real sandbox, eight at a time: none gets out, and the host stays as it was.

Each program is the body of a function that returns something true when its attack got through and raises or returns
None when it was held.  All of them run at once over eight slots in one module fixture; each test looks at one verdict.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from srl_jax.records import TestSpec
from srl_jax.sandbox import Limits, Sandbox, SandboxConfig, Status, TestOutcome
from srl_jax.trace import Action

SLOTS = 8
HELD, STOPPED = "held", "stopped"

# Shared by the programs: raw system calls, and a shell command's success.
PRELUDE = """
import ctypes, os, socket, struct, subprocess, sys, time, threading, signal, resource, errno
LIBC = ctypes.CDLL(None, use_errno=True)
def call(number, *arguments):
    if LIBC.syscall(ctypes.c_long(number), *[ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return True
def shell(command):
    return subprocess.run(["/bin/sh", "-c", command], capture_output=True, timeout=5).returncode == 0
def reads(path):
    with open(path, "rb") as f:
        return f.read(100) or None
def writes(path, flags=os.O_CREAT):
    os.close(os.open(path, os.O_WRONLY | flags, 0o666)); return path
"""


@dataclass(frozen=True)
class Attack:
    """`ends`: HELD when the program must live to see itself refused, STOPPED when it is to be cut or timed out."""

    name: str
    body: str
    ends: str = HELD
    x86_64_only: bool = False


def raw(name: str, number: int, *arguments: object) -> Attack:
    """An attack that is one x86-64 system call."""
    return Attack(name, f"return call({', '.join(map(str, (number, *arguments)))})", x86_64_only=True)


def family(name: str, number: int, kind: str = "SOCK_STREAM") -> Attack:
    return Attack(f"socket {name}", f"return socket.socket({number}, socket.{kind})")


ATTACKS = [
    # Files outside.
    Attack("overwrite a host file", "return writes('@WATCHED@/open.txt', os.O_TRUNC)"),
    Attack("read a host file", "return reads('@WATCHED@/open.txt')"),
    Attack("write to /usr", "return writes('/usr/escaped')"),
    Attack("write to /", "return writes('/escaped')"),
    Attack("write to /guest", "return writes('/guest/run_unittest.py', os.O_TRUNC)"),
    Attack("write to /dev", "return writes('/dev/escaped')"),
    Attack("write to /repo", "return writes('/repo/new.py')"),
    Attack("overwrite the test file", "return writes('/repo/tests/test_attack.py', os.O_TRUNC)"),
    Attack("chmod the test file", "os.chmod('/repo/tests/test_attack.py', 0o777); return True"),
    Attack("rename the tests folder", "os.rename('/repo/tests', '/repo/tests2'); return True"),
    Attack("delete the tests folder", "os.unlink('/repo/tests/test_attack.py'); return True"),
    Attack("symlink to a host file", "os.symlink('@WATCHED@/open.txt', '/tmp/l'); return writes('/tmp/l', 0)"),
    Attack("host root by /proc/1/root", "return reads('/proc/1/root@WATCHED@/open.txt')"),
    Attack("host folder by /proc/1/cwd", "return os.path.exists('/proc/1/cwd@WATCHED@')"),
    Attack("host files by /proc/1/fd", "return [os.readlink('/proc/1/fd/' + n) for n in os.listdir('/proc/1/fd')]"),
    Attack("kernel settings", "return writes('/proc/sys/kernel/core_pattern', 0)"),
    Attack("sysrq", "return writes('/proc/sysrq-trigger', 0)"),
    Attack("own oom score", "return os.write(os.open('/proc/self/oom_score_adj', os.O_WRONLY), b'-1000')"),
    Attack("control groups", "return os.path.exists('/sys/fs/cgroup') and os.listdir('/sys/fs/cgroup')"),
    Attack("kernel memory", "return reads('/dev/mem') or reads('/proc/kcore')"),
    Attack("kernel log", "return reads('/dev/kmsg')"),
    Attack("device node", "os.mknod('/tmp/sda', 0o600 | 0o060000, os.makedev(8, 0)); return True"),
    # Secrets.
    Attack("shadow", "return reads('/etc/shadow')"),
    Attack("ssh keys", "return reads('/root/.ssh/id_rsa') or reads('/root/.bash_history')"),
    Attack("environment", "return [k for k in os.environ if 'SECRET' in k]"),
    Attack(
        "environments of others",
        "return [p for p in os.listdir('/proc') if p.isdigit() and b'SECRET' in reads(f'/proc/{p}/environ')]",
    ),
    Attack("host processes", "return [p for p in os.listdir('/proc') if p.isdigit() and int(p) > 60] or None"),
    Attack("supervisor's descriptors", "return os.listdir(f'/proc/{os.getppid()}/fd')"),
    Attack("supervisor's memory", "return open(f'/proc/{os.getppid()}/mem', 'r+b')"),
    Attack(
        "inherited descriptors",
        "held = [n for n in os.listdir('/proc/self/fd') if int(n) > 3 and os.path.exists('/proc/self/fd/' + n)]\n"
        "return [os.readlink('/proc/self/fd/' + n) for n in held]",
    ),
    Attack("another slot's files", "return [n for n in os.listdir('/tmp') if n != 'mine']"),
    # Privileges.
    Attack("become root", "os.setuid(0); return True"),
    Attack("set groups", "os.setgroups([0]); return True"),
    Attack("change owner", "open('/tmp/mine', 'w'); os.chown('/tmp/mine', 0, 0); return True"),
    Attack("su", "return shell('su -c id || sudo -n id || mount -t tmpfs none /tmp')"),
    Attack("raise limits", "resource.setrlimit(resource.RLIMIT_NPROC, (10**6, 10**6)); return True"),
    Attack("clear no_new_privs", "return LIBC.prctl(38, 0, 0, 0, 0) == 0"),
    Attack("unshare by tool", "return shell('unshare -Ur true')"),
    Attack("remount /", "return LIBC.mount(b'none', b'/', None, 32, None) == 0"),
    Attack("remount /repo", "return LIBC.mount(b'none', b'/repo', None, 32 | 4096, None) == 0"),
    Attack("unmount /repo", "return LIBC.umount2(b'/repo', 2) == 0"),
    Attack("type into the terminal", "import fcntl; fcntl.ioctl(0, 0x5412, b'x'); return True"),
    raw("user namespace", 272, 0x10000000),
    raw("network namespace", 272, 0x40000000),
    raw("clone into a namespace", 56, 0x10000000 | 17, 0, 0, 0, 0),
    raw("chroot", 161, "b'/tmp'"),
    raw("pivot_root", 155, "b'/tmp'", "b'/tmp'"),
    raw("ptrace", 101, 16, "os.getppid()", 0, 0),
    raw("process_vm_readv", 310, "os.getppid()", 0, 0, 0, 0, 0),
    raw("keyctl", 250, 0, -3, 1),
    raw("bpf", 321, 0, 0, 0),
    raw("perf_event_open", 298, 0, 0, -1, -1, 0),
    raw("userfaultfd", 323, 0),
    raw("io_uring", 425, 1, "ctypes.create_string_buffer(256)"),
    raw("open_by_handle_at", 304, -100, 0, 0),
    raw("new mount interface", 430, "b'tmpfs'", 0),
    raw("kernel module", 313, 0, "b''", 0),
    Attack("x32 calls", "return call(0x40000000 | 39)", STOPPED, x86_64_only=True),
    raw("setns", 308, "os.open('/proc/self/ns/user', 0)", 0),
    # Network.
    family("inet", 2),
    family("inet datagram", 2, "SOCK_DGRAM"),
    family("inet6", 10),
    family("netlink", 16, "SOCK_RAW"),
    family("packet", 17, "SOCK_RAW"),
    family("bluetooth", 31, "SOCK_RAW"),
    family("alg", 38, "SOCK_SEQPACKET"),
    family("vsock", 40),
    Attack("connect to the host's loopback", "return socket.create_connection(('127.0.0.1', @PORT@), 2)"),
    Attack("resolve a name", "return socket.getaddrinfo('example.com', 80)"),
    Attack("bash's /dev/tcp", "return subprocess.run(['bash', '-c', ': </dev/tcp/127.0.0.1/@PORT@']).returncode == 0"),
    Attack("abstract socket of the host", "s = socket.socket(socket.AF_UNIX); s.connect('\\0@ABSTRACT@'); return True"),
    Attack("socket file of the host", "s = socket.socket(socket.AF_UNIX); s.connect('@WATCHED@/s'); return True"),
    # Resources.
    Attack(
        "fork bomb",
        "pids = []\n"
        "try:\n"
        "    for _ in range(2000):\n"
        "        pid = os.fork()\n"
        "        if pid == 0: time.sleep(60); os._exit(0)\n"
        "        pids.append(pid)\n"
        "except OSError: pass\n"
        "return len(pids) > 200",
    ),
    Attack("fork bomb that never waits", "while True:\n    try: os.fork()\n    except OSError: pass", STOPPED),
    Attack(
        "thread bomb",
        "n = 0\n"
        "try:\n"
        "    for _ in range(2000): threading.Thread(target=time.sleep, args=(60,), daemon=True).start(); n += 1\n"
        "except RuntimeError: pass\n"
        "return n > 200",
    ),
    Attack("memory of one process", "return len(bytearray(6 << 30))"),
    Attack(
        "memory of many processes",
        "for _ in range(40):\n"
        "    if os.fork() == 0: hold = bytearray(b'x') * (300 << 20); time.sleep(60)\n"
        "time.sleep(60)",
        STOPPED,
    ),
    Attack("fill /tmp", "open('/tmp/mine', 'wb').write(bytes(200 << 20)); return True"),
    Attack("fill /dev/shm", "open('/dev/shm/x', 'wb').write(bytes(200 << 20)); return True"),
    Attack("sparse file", "os.truncate(os.open('/tmp/mine', os.O_CREAT | os.O_RDWR), 1 << 40); return True"),
    Attack("burn CPU", "while True: pass", STOPPED),
    Attack("sleep for ever", "time.sleep(10**6)", STOPPED),
    Attack(
        "ignore every signal",
        "for s in range(1, 32):\n"
        "    try: signal.signal(s, signal.SIG_IGN)\n"
        "    except OSError: pass\n"
        "while True: time.sleep(1)",
        STOPPED,
    ),
    Attack(
        "daemon that outlives its parents",
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    if os.fork() == 0:\n"
        "        signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "        for fd in range(64):\n"
        "            try: os.close(fd)\n"
        "            except OSError: pass\n"
        "        while True: time.sleep(1)\n"
        "    os._exit(0)",
    ),
    Attack(
        "daemon that holds the pipes",
        "if os.fork() == 0:\n    os.setsid()\n    while True: time.sleep(1)",
    ),
    Attack("flood stdout", "while True: os.write(1, b'x' * 65536)", STOPPED),
    Attack("flood stderr for a while", "for _ in range(2000): os.write(2, b'x' * 65536)"),
    Attack("flood the results", "for _ in range(400): os.write(3, b'{}' * 32768)", STOPPED),
    Attack("junk among the results", "os.write(3, b'\\x00\\xff{\"nonce\": 1}\\n[]\\nnull\\n{}\\n')"),
    # The supervisor.
    Attack("kill everything", "os.kill(-1, 9)"),
    Attack("kill init", "os.kill(1, 9); time.sleep(0.1)"),
    Attack("kill the supervisor", "os.kill(os.getppid(), 9); time.sleep(0.2)"),
    Attack("stop the supervisor", "os.kill(os.getppid(), signal.SIGSTOP); time.sleep(0.2)"),
    Attack("kill a host process", "os.kill(@HOST_PID@, 9); return True"),
    Attack("close the results", "os.close(3)", STOPPED),
    # Gaming the verdict.
    Attack("leave early", "os._exit(0)", STOPPED),
    Attack("exit by exception", "sys.exit(0)", STOPPED),
    Attack("forge blindly", 'os.write(3, b\'{"id": "forged", "outcome": "passed"}\\n\'); os._exit(0)', STOPPED),
    Attack(
        "guess the nonce from the outside",
        "import json\n"
        "seen = open('/proc/self/cmdline').read() + repr(os.environ) + open('/proc/1/cmdline').read()\n"
        "return [w for w in seen.replace(chr(0), ' ').split() if len(w) == 32]",
    ),
]

TEST_ID = "tests.test_attack.Attack.test_attack"
SPEC = TestSpec("unittest", (TEST_ID,), ("tests/test_attack.py",))


def program(body: str) -> dict[str, str]:
    """A repository whose one test passes exactly when the attack was held."""
    text = (
        PRELUDE
        + "import unittest\ndef attack():\n"
        + textwrap.indent(body, "    ")
        + textwrap.dedent(
            """

            class Attack(unittest.TestCase):
                def test_attack(self):
                    try:
                        got = attack()
                    except (Exception, ctypes.ArgumentError) as refusal:
                        got = None
                        print("held by", repr(refusal))
                    self.assertFalse(got, "ESCAPED")
            """
        )
    )
    return {"tests/test_attack.py": text}


def fingerprint(folder: Path) -> str:
    """A hash of everything about a tree that an intruder could change."""
    digest = hashlib.sha256()
    for path in sorted([folder, *folder.rglob("*")]):
        info = path.lstat()
        digest.update(f"{path} {info.st_mode} {info.st_uid} {info.st_size} {info.st_mtime_ns}".encode())
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()


def left_running(sandbox: Sandbox) -> list[str]:
    """Processes of the sandbox's own uids or, for an ordinary user, our children's; other sandboxes may be at work."""
    uids = {slot.uid for _, slot in sandbox._pool._held}
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            status = dict(line.split(":", 1) for line in (entry / "status").read_text().splitlines())
        except OSError:
            continue  # gone meanwhile
        if int(status["Uid"].split()[0]) in uids or int(status["PPid"]) == os.getpid():
            found.append(f"{entry.name} {status['Name'].strip()}")
    return found


def mounts() -> int:
    return len(Path("/proc/self/mountinfo").read_text().splitlines())


@dataclass
class Siege:
    """What the attacks came to, and the host before and after."""

    outcomes: dict[str, TestOutcome] = field(default_factory=dict)
    before: dict[str, object] = field(default_factory=dict)
    after: dict[str, object] = field(default_factory=dict)
    next_request_s: float = 0.0
    left: list[str] = field(default_factory=list)


def host_state(watched: Path) -> dict[str, object]:
    return {
        "watched tree": fingerprint(watched),
        "mounts": mounts(),
        "descriptors": len(os.listdir("/proc/self/fd")),  # noqa: PTH208
        "threads": threading.active_count(),
        "usr": Path("/usr").stat().st_mtime_ns,
        "root": sorted(p.name for p in Path("/").iterdir()),
    }


@pytest.fixture(scope="module")
def siege(tmp_path_factory):
    watched = tmp_path_factory.mktemp("watched")
    for parent in (watched, watched.parent, watched.parent.parent):
        parent.chmod(0o777)  # so that nothing but the sandbox protects it
    (watched / "open.txt").write_text("untouched")
    (watched / "open.txt").chmod(0o666)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    by_file = socket.socket(socket.AF_UNIX)
    by_file.bind(str(watched / "s"))
    by_file.listen()
    abstract = f"srl_jax-escape-{os.getpid()}"
    by_name = socket.socket(socket.AF_UNIX)
    by_name.bind(f"\0{abstract}")
    by_name.listen()
    names = {
        "@WATCHED@": str(watched),
        "@PORT@": str(listener.getsockname()[1]),
        "@ABSTRACT@": abstract,
        "@HOST_PID@": str(os.getpid()),
    }
    result = Siege()

    def half(limits: Limits) -> Sandbox:
        return Sandbox(SandboxConfig(slots=SLOTS // 2, test_limits=limits, slot_memory_bytes=512 << 20))

    # What must live to see itself refused gets time, on a machine that the others keep busy; what is to be stopped
    # anyway is stopped soon.
    with (
        pytest.MonkeyPatch.context() as patch,
        half(Limits(wall_s=30.0, cpu_s=3)) as patient,
        half(Limits(wall_s=3.0, cpu_s=2)) as hasty,
    ):
        patch.setenv("SRL_SECRET", "hunter2")

        def run(attack: Attack) -> None:
            body = attack.body
            for name, value in names.items():
                body = body.replace(name, value)
            sandbox = patient if attack.ends == HELD else hasty
            result.outcomes[attack.name] = sandbox.run_tests(program(body), SPEC)

        result.before = host_state(watched)
        possible = [a for a in ATTACKS if not a.x86_64_only or os.uname().machine == "x86_64"]
        with ThreadPoolExecutor(SLOTS // 2) as first, ThreadPoolExecutor(SLOTS // 2) as second:
            held = first.map(run, [a for a in possible if a.ends == HELD])
            stopped = second.map(run, [a for a in possible if a.ends != HELD])
            assert len([*held, *stopped]) == len(possible)
        started = time.monotonic()
        honest = patient.run_tests(program("return None"), SPEC)
        result.next_request_s = time.monotonic() - started
        result.outcomes["honest"] = honest
        result.after = host_state(watched)
        result.left = left_running(patient) + left_running(hasty)
    for opened in (listener, by_file, by_name):
        opened.close()
    return result


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_attack_is_held(siege, attack):
    if attack.name not in siege.outcomes:
        pytest.skip("the call's number is x86-64's")
    outcome = siege.outcomes[attack.name]
    assert "ESCAPED" not in outcome.output
    if attack.ends == HELD:
        assert outcome.ended == "finished", outcome.output
        assert outcome.satisfies(SPEC.expected_ids), outcome.output
    else:
        assert not outcome.satisfies(SPEC.expected_ids), outcome
        assert "forged" not in outcome.passed


def test_the_host_is_unchanged(siege):
    assert siege.after == siege.before


def test_the_next_request_is_answered_in_time(siege):
    assert siege.outcomes["honest"].satisfies(SPEC.expected_ids)
    assert siege.next_request_s < 5


def test_nothing_is_left_running(siege):
    assert siege.left == []


def test_an_attack_that_gets_through_would_be_seen(siege):
    # The suite can fail: what is allowed is reported as an escape by the same machinery.
    with Sandbox(SandboxConfig(test_limits=Limits(wall_s=10.0))) as sandbox:
        outcome = sandbox.run_tests(program("return writes('/tmp/mine')"), SPEC)
    assert outcome.ended == "finished"
    assert outcome.failed == (TEST_ID,)
    assert "ESCAPED" in outcome.output


CODE = "import helper\n\ndef f(x):\n    return old(x)\n\ndef new(x):\n    return x + 1\n\ndef old(x):\n    return 0\n"
TEST = """\
import unittest
from app import f

class T(unittest.TestCase):
    def test_f(self):
        self.assertEqual(f(1), 2)
"""
GAMES = {
    "leave at import": "import os\nos._exit(0)\n",
    "exit at import": "import sys\nsys.exit(0)\n",
    "skip at import": "import unittest\nraise unittest.SkipTest('no')\n",
    "pass everything": "import unittest\nunittest.TestCase.run = lambda self, result=None: result.addSuccess(self)\n",
    "assert nothing": "import unittest\nunittest.TestCase.assertEqual = lambda *a: None\n",
    "replace the loader": "import unittest\nunittest.TestLoader.loadTestsFromName = lambda *a: unittest.TestSuite()\n",
    "silence json": "import json, os\njson.dumps = lambda *a: '{}'\nos.write = lambda *a: 0\n",
    "kill the supervisor": "import os\nos.kill(os.getppid(), 9)\n",
    "never return": "while True: pass\n",
}


@pytest.fixture(scope="module")
def strict():
    with Sandbox(SandboxConfig(test_limits=Limits(wall_s=4.0, cpu_s=2))) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def hurried():
    """For actions of which an answer is asked, whatever it is."""
    with Sandbox(SandboxConfig(engine_limits=Limits(wall_s=4.0, cpu_s=2))) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def patient():
    """For programs that must live to see themselves refused, however busy the machine."""
    with Sandbox(SandboxConfig(test_limits=Limits(wall_s=60.0, cpu_s=10))) as sandbox:
        yield sandbox


@pytest.mark.parametrize("game", GAMES)
def test_no_game_makes_a_wrong_edit_succeed(strict, game):
    """The code under test tries to win without the right edit; the oracle on the diff is what it cannot reach."""
    files = {"app.py": CODE, "helper.py": GAMES[game], "tests/test_app.py": TEST}
    spec = TestSpec("unittest", ("tests.test_app.T.test_f",), ("tests/test_app.py",))
    right = {"app.py": CODE.replace("return old(x)", "return new(x)")}
    wrong = Action("python", "return old($X)", "return older($X)", ("app.py",))
    report = strict.execute(wrong, files, tests=spec, expected=right)
    assert report.status is Status.OK
    assert report.expected_diff is False
    assert not report.success
    if game not in ("pass everything", "assert nothing"):  # in-process lies that only the oracle sees through
        assert strict.execute(wrong, files, tests=spec).success is False


PLANTED = {
    "sitecustomize": {"sitecustomize.py": "import os\nos._exit(0)\n"},
    "usercustomize": {"usercustomize.py": "import os\nos._exit(0)\n"},
    "conftest": {"conftest.py": "import os\nos._exit(0)\n", "tests/conftest.py": "import os\nos._exit(0)\n"},
    "pytest.ini": {"pytest.ini": "[pytest]\naddopts = --co\n"},
    "setup.cfg": {"setup.cfg": "[tool:pytest]\naddopts = --co\n"},
    "sgconfig": {"sgconfig.yml": "ruleDirs: [/etc]\ncustomLanguages: {x: {libraryPath: /x.so, extensions: [py]}}\n"},
    "ignore files": {".gitignore": "*.py\n", ".ignore": "*.py\n"},
    "shadowed modules": {"json.py": "raise SystemExit\n", "selectors.py": "raise SystemExit\n"},
    "odd names": {"--config.py": "", "a\nb.py": "", "-": "", "é\u202e.py": "", "a b;rm -rf $HOME.py": ""},
}


@pytest.mark.parametrize("planted", PLANTED)
def test_planted_files_change_nothing(strict, planted):
    files = {"app.py": CODE, "helper.py": "", "tests/test_app.py": TEST, **PLANTED[planted]}
    spec = TestSpec("unittest", ("tests.test_app.T.test_f",), ("tests/test_app.py",))
    right = Action("python", "return old($X)", "return new($X)", ("**/*.py",))
    report = strict.execute(right, files, tests=spec)
    assert report.success, report


HOSTILE_ACTIONS = {
    "document injection": Action("python", "f(1)\n---\nid: x\nlanguage: python", "g", ("*",)),
    "deep pattern": Action("python", "(" * 60 + "f" + ")" * 60, "g", ("*",)),
    "long pattern": Action("python", "f(" + "a, " * 600 + "b)", "g", ("*",)),
    "huge regex": Action("python", "f($A)", "g", ("*",), {"A": {"regex": "((a{1000}){1000}){1000}"}}),
    "backtracking regex": Action("python", "f($A)", "g", ("*",), {"A": {"regex": "^(a+)+$"}}),
    "lookaround regex": Action("python", "f($A)", "g", ("*",), {"A": {"regex": "(?=a)"}}),
    "growing replacement": Action("python", "$F($A)", "$F($A)" * 300, ("*",)),
    "option as pattern": Action("python", "--help", "g", ("*",)),
    "option as replacement": Action("python", "f($A)", "--update-all", ("*",)),
    "shell as replacement": Action("python", "f($A)", "'$(touch /tmp/x)'; `id`", ("*",)),
    "host glob": Action("python", "f($A)", "g", ("**/../../etc/*",)),
    "everything": Action("python", "$$$A", "", ("**",)),
}


@pytest.mark.parametrize("name", HOSTILE_ACTIONS)
def test_hostile_actions_are_answered(hurried, name):
    files = {"a.py": "f(1)\n" * 500 + "f(" + "a" * 5000 + "!)\n", "b.py": "f('" + "a" * 50_000 + "')\n"}
    started = time.monotonic()
    result = hurried.apply(HOSTILE_ACTIONS[name], files)
    assert time.monotonic() - started < 12
    assert isinstance(result.status, Status)
    if result.status is not Status.OK:
        assert result.files_after == files


@pytest.mark.parametrize(
    "text",
    [
        "(" * 20_000,
        "f(" * 4_000 + ")" * 4_000,
        "f(1);" * 200_000,
        "x = " + "-" * 100_000 + "1",
        "\0" * 1000 + "f(1)",
        "'" * 99_999,
        "\ufeff" * 100 + "f(1)\n",
    ],
    ids=["open brackets", "nested calls", "one long line", "unary chain", "NULs", "quotes", "marks"],
)
def test_hostile_files_are_answered(hurried, strict, text):
    result = hurried.apply(Action("python", "f($A)", "g($A)", ("*",)), {"a.py": text})
    assert isinstance(result.status, Status)
    assert strict.apply(Action("python", "f($A)", "g($A)", ("*",)), {"a.py": "f(1)"}).status is Status.OK


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed: JavaScript attacks are left out")
@pytest.mark.parametrize(
    "body",
    [
        "fs.writeFileSync('/escaped', 'x')",
        "fs.readFileSync('/etc/shadow')",
        "await new Promise((y, n) => net.connect(80, '127.0.0.1').on('connect', y).on('error', n))",
        "process.kill(1, 'SIGKILL'); throw new Error('held')",
        "process.setuid(0)",
        "fs.writeFileSync('/repo/a.test.mjs', 'x')",
        "fs.appendFileSync('/guest/node_reporter.mjs', 'x')",
        "fs.symlinkSync('/etc', '/tmp/etc'); fs.readFileSync('/tmp/etc/shadow')",
        "fs.readFileSync(`/proc/${process.ppid}/environ`); fs.readFileSync('/proc/1/environ')",
        "await import('node:dns').then((dns) => dns.promises.lookup('example.com'))",
        "await fetch('http://127.0.0.1:80/')",
        "await new Promise((y, n) => net.createServer().on('error', n).listen(0, '127.0.0.1', y))",
        "(await import('node:child_process')).execFileSync('unshare', ['-Ur', 'true'], { stdio: 'ignore' })",
        "if (!process.env.SRL_NONCE && !process.env.SRL_SECRET) throw new Error('held')",
    ],
)
def test_node_is_held_too(patient, body):
    text = (
        "import test from 'node:test'; import assert from 'node:assert'; import fs from 'node:fs';\n"
        "import net from 'node:net';\n"
        f"test('attack', async () => {{ await assert.rejects(async () => {{ {body} }}) }})\n"
    )
    spec = TestSpec("node", ("a.test.mjs::attack",), ("a.test.mjs",))
    outcome = patient.run_tests({"a.test.mjs": text}, spec)
    assert outcome.satisfies(spec.expected_ids), outcome


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed: JavaScript games are left out")
@pytest.mark.parametrize(
    "helper",
    [
        "process.exit(0)",
        "process.kill(process.ppid, 'SIGKILL')",
        "console.log(JSON.stringify({ nonce: process.env.SRL_NONCE, id: 'a.test.mjs::t', outcome: 'passed' }))",
        "process.stdout.write('{\"end\": true}\\n'); process.exit(0)",
        "import test from 'node:test'; test('t', () => {}); process.exit(0)",
        "import test from 'node:test'; test.skip('t'); process.exitCode = 0; process.exit()",
        "import assert from 'node:assert'; assert.equal = () => {}; process.abort()",
        "for (;;);",
    ],
)
def test_no_javascript_game_makes_a_wrong_edit_succeed(strict, helper):
    files = {
        "app.mjs": "import './helper.mjs';\nexport const f = (x) => older(x);\n",
        "helper.mjs": helper,
        "a.test.mjs": "import test from 'node:test';\nimport assert from 'node:assert';\n"
        "import { f } from './app.mjs';\ntest('t', () => assert.equal(f(1), 2));\n",
    }
    spec = TestSpec("node", ("a.test.mjs::t",), ("a.test.mjs",))
    wrong = Action("javascript", "older($X)", "oldest($X)", ("app.mjs",))
    report = strict.execute(wrong, files, tests=spec)
    assert report.status is Status.OK
    assert not report.success, report
