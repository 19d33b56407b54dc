"""Systems for the tests of the benchmark's harness; `bench_test` runs the real one of this project beside them."""

import os
import time
from pathlib import Path


def steady(gate, workload, directory, *, log, name, seconds):
    """Takes about `seconds` for each part and writes when."""
    while True:
        for part in ("rollout", "update"):
            with gate.part(part) as report:
                began = time.time()
                time.sleep(seconds)
                report.tokens = workload.tokens if part == "rollout" else 0
                with Path(log).open("a") as file:
                    file.write(f"{name} {part} {began} {time.time()}\n")


def breaks_in_the_second_round(gate, workload, directory):
    for turn in range(3):
        for part in ("rollout", "update"):
            with gate.part(part) as report:
                report.tokens = 1
                if turn == 2:
                    raise MemoryError("no room for | the logits")


def hangs_in_the_second_turn(gate, workload, directory):
    for part in ("rollout", "update"):
        with gate.part(part) as report:
            report.tokens = 1
    with gate.part("rollout"):
        time.sleep(5)
        (directory / "went-on").touch()
        time.sleep(600)


def dies(gate, workload, directory):
    with gate.part("rollout"):
        os._exit(137)


def not_installed(gate, workload, directory):
    import a_peer_that_nobody_has  # noqa: F401
