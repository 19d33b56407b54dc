"""Where a training step's time goes, part by part, with a trace for xprof or Perfetto beside it.

The steps are real ones. What a step does not time itself is timed apart on the last batch and taken off the part it
belongs to: the prompts' pass of sampling, the forward pass and the optimiser of an update.
"""

import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from srl_jax.config import TrainConfig
from srl_jax.model.decoder import encode_prompts
from srl_jax.rollout import collect_rollouts
from srl_jax.run import Run
from srl_jax.steps import step_settings, take_step
from srl_jax.train_step import forward_logprobs

_COLLECTIVE = re.compile(r"(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?!.*-done)")
_REPEATS = 3
PARTS = ("prefill", "decode", "reward wait", "log-probs", "forward", "backward", "optimiser", "collectives", "host")


def profile(config: TrainConfig, records: Iterator[Any], out: Path, steps: int) -> dict[str, float]:
    """Seconds of each of `PARTS` in a mean step of `steps` after a first one, which compiles; and "step".

    Collectives run within the other parts and are also counted apart: their seconds are taken off the backward pass.
    Writes the trace under `out`. Method "srl" only; the run's directory, `out/run`, is thrown away by the next call.
    """
    with Run(config, out / "run") as run:
        take_step(run, records, 0, None)
        told = []
        with jax.profiler.trace(str(out)):
            for step in range(1, 1 + steps):
                told.append(take_step(run, records, step, None).metrics)
        mean = lambda name: float(np.mean([metrics[f"seconds/{name}"] for metrics in told]))
        prefill, forward, optimiser = _timed_apart(run, records)
    collectives = collective_seconds(out) / steps
    step = mean("step")
    parts = {
        "prefill": prefill * float(np.mean([m["groups_drawn"] for m in told])) / config.data.prompts_per_step,
        "reward wait": mean("reward_wait"),
        "log-probs": mean("reference"),
        "forward": forward * config.grpo.epochs,
        "optimiser": optimiser * config.updates_per_step,
        "collectives": collectives,
    }
    parts["decode"] = max(0.0, mean("rollout") - parts["prefill"])
    parts["backward"] = max(0.0, mean("update") - parts["forward"] - parts["optimiser"] - collectives)
    parts["host"] = max(0.0, step - sum(parts.values()))
    return {name: parts[name] for name in PARTS} | {"step": step}


def table(parts: dict[str, float]) -> str:
    """One line for each part: milliseconds and share of the step."""
    step = parts["step"]
    lines = [f"  {name:<14}{seconds * 1e3:>12,.1f} ms{seconds / step:>8.1%}" for name, seconds in parts.items()]
    return "\n".join(["where a step's time goes", *lines])


def collective_seconds(out: Path) -> float:
    """Seconds that the newest trace under `out` spent in collectives, on the mean device."""
    newest = max(out.glob("plugins/profile/*/*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    total = 0.0
    for plane in jax.profiler.ProfileData.from_file(str(newest)).planes:
        for line in plane.lines:
            total += sum(event.duration_ns for event in line.events if _COLLECTIVE.match(event.name))
    return total / 1e9 / jax.local_device_count()


def _timed_apart(run: Run, records: Iterator[Any]) -> tuple[float, float, float]:
    """Seconds of the prompts' pass, of an update's forward pass, and of the optimiser."""
    student, settings = run.student, step_settings(run.config)
    rollout = collect_rollouts(
        student, run.state.lora, records, jax.random.key(0), run.rewards, run.config, settings, value=run.state.value
    )
    batch = rollout.batch
    prompts = jax.jit(partial(encode_prompts, student.decoder))
    variables = student.sampling_variables(run.state.lora)
    zeros = jax.tree.map(jnp.zeros_like, run.state.lora)

    @jax.jit
    def apply(lora, opt_state):
        updates, opt_state = run.optimizer.update(zeros, opt_state, lora)
        return optax.apply_updates(lora, updates), opt_state

    scores = partial(forward_logprobs, student.decoder, settings=settings)
    adapted = {"params": student.params, "lora": run.state.lora}
    return (
        _seconds(lambda: prompts(variables, batch.prompt_tokens, batch.prompt_lengths)),
        _seconds(lambda: scores(adapted, student.automaton, batch)),
        _seconds(lambda: apply(run.state.lora, run.state.opt_state)),
    )


def _seconds(work: Callable[[], Any]) -> float:
    jax.block_until_ready(work())  # compiles
    began = time.perf_counter()
    for _ in range(_REPEATS):
        jax.block_until_ready(work())
    return (time.perf_counter() - began) / _REPEATS
