"""Try to escape, and print what happened: {"probe name": null when held, else what got through}.

The start-up probe runs this in the real sandbox; one attempt that succeeds refuses the whole machine.
job: {"canary": host path of a file anybody may read, "host_pid": pid of the caller, "processes": limit}
"""

# Importing pathlib would cost each run 5 ms.
# ruff: noqa: PTH110, PTH123, PTH208

import ctypes
import os
import socket

CLONE_NEWUSER, MS_REMOUNT, MS_BIND = 0x10000000, 32, 4096
LIBC = ctypes.CDLL(None, use_errno=True)


def opens(path, flags):
    try:
        os.close(os.open(path, flags, 0o644))
    except OSError:
        return None
    return f"opened {path}"


def writes(paths):
    return next(filter(None, (opens(path, os.O_CREAT | os.O_WRONLY) for path in paths)), None)


def connects(family, kind):
    try:
        socket.socket(family, kind).close()
    except OSError:
        return None
    return f"created a socket of family {family}"


def remounts():
    for flags in (MS_REMOUNT, MS_REMOUNT | MS_BIND):
        if LIBC.mount(b"none", b"/", None, flags, None) == 0:
            return "remounted / writable"
    return None


def makes_user_namespace():
    pid = os.fork()
    if pid == 0:
        os._exit(0 if LIBC.unshare(CLONE_NEWUSER) == 0 else 1)
    return "created a user namespace" if os.waitpid(pid, 0)[1] == 0 else None


def has_privileges():
    with open("/proc/self/status", encoding="ascii") as status:
        fields = dict(line.split(":\t", 1) for line in status.read().splitlines() if ":\t" in line)
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        if int(fields[name], 16):
            return f"{name} is {fields[name]}"
    if 0 in (os.getuid(), os.geteuid(), os.getgid(), os.getegid()):
        return "runs as root"
    if fields["NoNewPrivs"].strip() != "1":
        return "no_new_privs is off"
    return None if fields["Seccomp"].strip() == "2" else "no system-call filter"


def sees_processes():
    pids = [name for name in os.listdir("/proc") if name.isdigit()]
    return None if len(pids) <= 3 else f"sees {len(pids)} processes"


def inherits():
    extra = sorted(set(os.listdir("/proc/self/fd")) - {"0", "1", "2"}, key=int)
    # listdir itself holds one descriptor while it reads the folder.
    kept = [fd for fd in extra if os.path.exists(f"/proc/self/fd/{fd}")]
    if kept:
        return f"inherits descriptors {kept}"
    secrets = sorted(set(os.environ) - {"HOME", "LANG", "PATH", "TMPDIR", "PWD", "LC_CTYPE"})
    return f"inherits variables {secrets}" if secrets else None


def forks_without_end(limit):
    children = []
    problem = f"started {2 * limit} processes, the limit is {limit}"
    try:
        for _ in range(2 * limit):
            pid = os.fork()
            if pid == 0:
                os.read(hold[0], 1)
                os._exit(0)
            children.append(pid)
    except OSError:
        problem = None if len(children) >= 2 else "cannot start a second process"
    for pid in children:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
    return problem


hold = (0, 0)


def main(job, loads):
    global hold
    results = {
        "descriptors and environment": inherits(),
        "privileges": has_privileges(),
        "read a secret": opens("/etc/shadow", os.O_RDONLY) or opens("/etc/passwd", os.O_RDONLY),
        "read outside": opens(job["canary"], os.O_RDONLY),
        "write outside": writes((job["canary"], "/usr/x", "/x", "/guest/x", "/dev/x", "/etc/x", "/repo/x")),
        "remount": remounts(),
        "network": connects(socket.AF_INET, socket.SOCK_STREAM) or connects(socket.AF_INET6, socket.SOCK_DGRAM)
        or connects(socket.AF_NETLINK, socket.SOCK_RAW) or connects(socket.AF_PACKET, socket.SOCK_RAW),
        "user namespace": makes_user_namespace(),
        "processes visible": sees_processes(),
        "private tmp": None if opens("/tmp/probe", os.O_CREAT | os.O_WRONLY) else "cannot write to /tmp",
    }  # fmt: skip
    hold = os.pipe()
    results["process limit"] = forks_without_end(job["processes"])
    return results
