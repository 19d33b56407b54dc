"""The run that fault_drill.py disturbs: the real loop on the tiny model, with one fault built in when it is told so.

Arguments: workdir, steps. SRL_DRILL_FAULT: "nan:N" poisons the advantages of update N ("nan:N-": of all later ones
too), "clock:0" makes the wall clock jump, "execute:0" lets rewards depend on executions, for whoever kills those.
"""

import os
import sys
import time
from pathlib import Path

import jax.numpy as jnp

from srl_jax import cli, steps, train
from tests.fakes import CountingStream, teacher_record, tiny_config


def main(workdir: Path, count: int) -> int:
    config = tiny_config()
    config.steps, config.checkpoint.every, config.checkpoint.keep = count, 1, 3
    config.data.prompts_per_step = config.grpo.micro_batch = config.grpo.group_size = 2
    config.sampling.max_new_tokens = 64
    config.eval.max_tasks, config.eval.batch_size = 2, 2
    kind, _, when = os.environ.get("SRL_DRILL_FAULT", "").partition(":")
    config.reward.execution = 0.2 if kind == "execute" else 0.0
    if kind in INJECT:
        INJECT[kind](int(when.rstrip("-")), when.endswith("-"))
    held_out = [teacher_record(number) for number in (20, 21)]
    return 0 if train.train(config, workdir, CountingStream(), held_out) else 3


def nan(number: int, lasting: bool) -> None:
    """The advantages of an update become NaN, as a broken kernel or reward would make them."""
    real = steps.train_step

    def poisoned(state, params, automaton, batch, *rest, **options):
        step = int(state.step) + 1
        if step == number or (lasting and step > number):
            batch = batch._replace(advantages=batch.advantages * jnp.nan)
        return real(state, params, automaton, batch, *rest, **options)

    steps.train_step = poisoned


def clock(*_: object) -> None:
    """time.time() is right, a day behind and two days ahead in turns, a second each; the monotonic clock goes on."""
    real, began = time.time, time.monotonic()

    def jumping() -> float:
        return real() + (0, -86_400, 172_800)[int(time.monotonic() - began) % 3]

    time.time = jumping


INJECT = {"nan": nan, "clock": clock}

if __name__ == "__main__":
    # `cli.run` parses flags, of which this has none: only how it ends a run is wanted.
    arguments = sys.argv[1:]
    del sys.argv[1:]
    cli.run(lambda: main(Path(arguments[0]), int(arguments[1])))
