"""First program in the sandbox: lower the resource limits for good, then run the guest program's `main`.

usage: python -I -S -B launch.py NAME=VALUE,... PROGRAM

PROGRAM holds a module's code and stdin the job, both in Python's marshal format, which only the host writes;
`main(job, loads)` returns the answer, which goes to stdout as JSON, since the host trusts nothing that comes out.

Limits are set inside the sandbox's user namespace because there RLIMIT_NPROC counts this sandbox's processes only
(Linux 5.14), and because hard limits once lowered cannot be raised again without capabilities.
"""

# What a run imports it pays for: pathlib 5 ms, json 10 ms on top of the interpreter's 7. The C parts of json are free.
# ruff: noqa: PTH123

import _json
import marshal
import resource
import sys


class _Strict:
    """What the scanner reads its options from: json's own defaults."""

    strict = True
    object_hook = object_pairs_hook = None
    parse_float, parse_int, parse_constant = float, int, float


_scan = _json.make_scanner(_Strict)


def loads(text):
    """The value of a JSON text that begins and ends with it, spaces at the end apart; ValueError when it is none."""
    try:
        value, end = _scan(text, 0)
    except StopIteration:
        raise ValueError("not JSON") from None
    if text[end:].strip():
        raise ValueError("more than one JSON value")
    return value


def dumps(value):
    """JSON text (ASCII) of strings, numbers, booleans, None, and lists and dicts of them with strings as keys."""
    if isinstance(value, str):
        return _json.encode_basestring_ascii(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{dumps(key)}: {dumps(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(dumps, value)) + "]"
    if value is None:
        return "null"
    return repr(value).lower() if isinstance(value, bool) else repr(value)


def main():
    for limit in sys.argv[1].split(","):
        name, value = limit.split("=")
        which = getattr(resource, "RLIMIT_" + name)  # the name comes from the host, not from the model
        hard = resource.getrlimit(which)[1]
        value = int(value) if hard == resource.RLIM_INFINITY else min(int(value), hard)
        resource.setrlimit(which, (value, value))
    program = sys.argv[2]
    sys.argv = [program]
    with open(program, "rb") as compiled:
        code = marshal.load(compiled)
    guest = {"__name__": "guest", "__file__": program}
    exec(code, guest)
    sys.stdout.write(dumps(guest["main"](marshal.load(sys.stdin.buffer), loads)))


if __name__ == "__main__":
    main()
