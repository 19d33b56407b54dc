"""The system-call filter of the sandbox, as classic BPF for `bwrap --seccomp FD`.

Assembled by hand because the filter is short and a bare machine may lack libseccomp.  Everything the filter
refuses fails with EPERM (so that programs report it rather than die), except foreign architectures, which are
killed: their numbers would mean other calls.  `clone3` fails with ENOSYS, since its flags lie behind a pointer a
filter cannot read; the C library then falls back to `clone`, whose flags are checked.  Memory that no process has
mapped (memfd_create, shmget) is refused since nothing but a control group would count it.
"""

from __future__ import annotations

import platform
import struct

ALLOW, KILL, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
EPERM, ENOSYS, EAFNOSUPPORT = 1, 38, 97
AF_UNIX = 1
TIOCSTI, TIOCLINUX = 0x5412, 0x541C
# CLONE_NEWTIME|NEWNS|NEWCGROUP|NEWUTS|NEWIPC|NEWUSER|NEWPID|NEWNET
NAMESPACE_FLAGS = 0x80 | 0x20000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000

# Offsets in struct seccomp_data (little endian: the low half of a 64-bit argument comes first).
_NR, _ARCH, _ARG0, _ARG1 = 0, 4, 16, 24

_LD, _JEQ, _JGE, _JSET, _RET = 0x20, 0x15, 0x35, 0x45, 0x06

# Numbers shared by every architecture since the tables were unified (Linux 5.1).
_COMMON = {
    "pidfd_getfd": 438, "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427,
    "open_tree": 428, "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433,
    "mount_setattr": 442, "memfd_secret": 447, "process_madvise": 440,
}  # fmt: skip

_X86_64 = {
    "ptrace": 101, "syslog": 103, "modify_ldt": 154, "pivot_root": 155, "adjtimex": 159, "chroot": 161, "acct": 163,
    "settimeofday": 164, "mount": 165, "umount2": 166, "swapon": 167, "swapoff": 168, "reboot": 169,
    "sethostname": 170, "setdomainname": 171, "iopl": 172, "ioperm": 173, "init_module": 175, "delete_module": 176,
    "quotactl": 179, "clock_settime": 227, "kexec_load": 246, "add_key": 248, "request_key": 249, "keyctl": 250,
    "migrate_pages": 256, "unshare": 272, "move_pages": 279, "perf_event_open": 298, "fanotify_init": 300,
    "name_to_handle_at": 303, "open_by_handle_at": 304, "clock_adjtime": 305, "setns": 308, "process_vm_readv": 310,
    "process_vm_writev": 311, "kcmp": 312, "finit_module": 313, "kexec_file_load": 320, "bpf": 321,
    "userfaultfd": 323, "vhangup": 153, "memfd_create": 319, "shmget": 29,
}  # fmt: skip

_AARCH64 = {
    "ptrace": 117, "syslog": 116, "pivot_root": 41, "adjtimex": 171, "chroot": 51, "acct": 89,
    "settimeofday": 170, "mount": 40, "umount2": 39, "swapon": 224, "swapoff": 225, "reboot": 142,
    "sethostname": 161, "setdomainname": 162, "init_module": 105, "delete_module": 106,
    "quotactl": 60, "clock_settime": 112, "kexec_load": 104, "add_key": 217, "request_key": 218, "keyctl": 219,
    "migrate_pages": 238, "unshare": 97, "move_pages": 239, "perf_event_open": 241, "fanotify_init": 262,
    "name_to_handle_at": 264, "open_by_handle_at": 265, "clock_adjtime": 266, "setns": 268, "process_vm_readv": 270,
    "process_vm_writev": 271, "kcmp": 272, "finit_module": 273, "kexec_file_load": 294, "bpf": 280,
    "userfaultfd": 282, "vhangup": 58, "memfd_create": 279, "shmget": 194,
}  # fmt: skip

# machine -> (AUDIT_ARCH, denied calls, socket, clone, clone3, ioctl)
_MACHINES = {
    "x86_64": (0xC000003E, _X86_64, 41, 56, 435, 16),
    "aarch64": (0xC00000B7, _AARCH64, 198, 220, 435, 29),
}
_X32_BIT = 0x40000000


def _instruction(code: int, k: int, jump_true: int = 0, jump_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, jump_true, jump_false, k)


def denied_calls(machine: str | None = None) -> frozenset[str]:
    """Names of the calls that the filter refuses outright on this machine."""
    return frozenset(_COMMON) | frozenset(_MACHINES[machine or platform.machine()][1])


def supported(machine: str | None = None) -> bool:
    """Whether the filter knows this machine's system-call numbers."""
    return (machine or platform.machine()) in _MACHINES


def filter_program(machine: str | None = None) -> bytes:
    """The filter as an array of `struct sock_filter`; raises KeyError for an unknown machine."""
    arch, table, socket, clone, clone3, ioctl = _MACHINES[machine or platform.machine()]
    program = [
        _instruction(_LD, _ARCH),
        _instruction(_JEQ, arch, 1, 0),
        _instruction(_RET, KILL),
        _instruction(_LD, _NR),
        # x32 calls carry this bit and the x86-64 architecture word; nothing honest in here uses them.
        _instruction(_JGE, _X32_BIT, 0, 1),
        _instruction(_RET, KILL),
    ]
    for number in sorted({**_COMMON, **table}.values()):
        program += [_instruction(_JEQ, number, 0, 1), _instruction(_RET, ERRNO | EPERM)]
    program += [_instruction(_JEQ, clone3, 0, 1), _instruction(_RET, ERRNO | ENOSYS)]
    program += [  # sockets of any family but AF_UNIX
        _instruction(_JEQ, socket, 0, 4),
        _instruction(_LD, _ARG0),
        _instruction(_JEQ, AF_UNIX, 1, 0),
        _instruction(_RET, ERRNO | EAFNOSUPPORT),
        _instruction(_RET, ALLOW),
    ]
    program += [  # clone with any namespace flag (the low byte is the exit signal, hence not CLONE_NEWTIME there)
        _instruction(_JEQ, clone, 0, 4),
        _instruction(_LD, _ARG0),
        _instruction(_JSET, NAMESPACE_FLAGS & ~0xFF, 0, 1),
        _instruction(_RET, ERRNO | EPERM),
        _instruction(_RET, ALLOW),
    ]
    program += [  # typing into a terminal
        _instruction(_JEQ, ioctl, 0, 5),
        _instruction(_LD, _ARG1),
        _instruction(_JEQ, TIOCSTI, 1, 0),
        _instruction(_JEQ, TIOCLINUX, 0, 1),
        _instruction(_RET, ERRNO | EPERM),
        _instruction(_RET, ALLOW),
    ]
    program.append(_instruction(_RET, ALLOW))
    return b"".join(program)
