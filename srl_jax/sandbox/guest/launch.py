"""First program in the sandbox: lower the resource limits for good, then become the guest program.

usage: python -I -S -B launch.py LIMITS_JSON PROGRAM.py

Limits are set inside the sandbox's user namespace because there RLIMIT_NPROC counts this sandbox's processes only
(Linux 5.14), and because hard limits once lowered cannot be raised again without capabilities.
"""

# Importing pathlib would cost each run 5 ms.
# ruff: noqa: PTH123

import json
import resource
import sys


def main() -> None:
    for name, value in json.loads(sys.argv[1]).items():
        which = getattr(resource, "RLIMIT_" + name)  # the name comes from the host, not from the model
        hard = resource.getrlimit(which)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (value, value))
    program = sys.argv[2]
    sys.argv = [program]
    with open(program, encoding="utf-8") as source:
        code = compile(source.read(), program, "exec", dont_inherit=True)
    exec(code, {"__name__": "__main__", "__file__": program})


main()
