"""Where a training step's time goes, part by part, with a trace for xprof or Perfetto beside it.

The steps are real ones. A step tells itself how long sampling, waiting for rewards, scoring under fixed weights and the
update took. What these consist of is timed apart on one more batch, and the time of collectives is read from the trace.
"""

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from srl_jax.compiles import count_compiles
from srl_jax.config import ConfigError, TrainConfig
from srl_jax.model.decoder import encode_prompts
from srl_jax.rollout import collect_rollouts
from srl_jax.run import Run
from srl_jax.steps import step_settings, take_step
from srl_jax.train_step import forward_logprobs

# The start of an asynchronous one counts, its end is a wait; "end: all-reduce" is XLA's own mark.
_COLLECTIVE = re.compile(r"(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?!-done)")
_REPEATS = 3
_WARM_UP = 5  # steps at most
PARTS = ("prefill", "decode", "reward wait", "log-probs", "forward", "backward", "optimiser", "collectives", "host")


@dataclass(frozen=True)
class Profile:
    """Seconds of the mean step, and of each of `PARTS`, which add up to it.

    Log-probs are those under fixed weights, the reference's above all; forward, backward and optimiser are the
    update's. Collectives run inside the other parts, and are taken off the one whose program they belong to. The host's
    part is what no device was waited for. `compiled`: programs that were compiled in these steps, which should be none.
    """

    parts: dict[str, float]
    step: float
    compiled: int

    def table(self) -> str:
        """One line for each part: milliseconds and share of the step."""
        rows = [*self.parts.items(), ("step", self.step)]
        lines = [f"  {name:<12}{seconds * 1e3:>12,.1f} ms{seconds / self.step:>8.1%}" for name, seconds in rows]
        if self.compiled:
            lines.append(f"  {self.compiled} programs were compiled in these steps: take more of them")
        return "\n".join(["where a step's time goes", *lines])


def profile(config: TrainConfig, records: Iterator[Any], out: Path, steps: int) -> Profile:
    """The mean of `steps` steps after those that compile; writes a trace of them under `out`.

    What the run itself writes goes to `out/run`. Raises `ConfigError` for a method that does not sample, and what `Run`
    raises.
    """
    if config.method != "srl":
        raise ConfigError("method", config.method, "only a step of method 'srl' has all these parts")
    if config.plays_episodes:
        raise ConfigError("grpo.returns", config.grpo.returns, "must be 'step': only a step without episodes is timed")
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # a trace of every Python call would itself be most of the host's time
    with Run(config, out / "run") as run:
        first = _warm_up(run, records)
        told = []
        with count_compiles() as compiled, jax.profiler.trace(str(out), profiler_options=options):
            for step in range(first, first + steps):
                with jax.profiler.StepTraceAnnotation("step", step_num=step):
                    told.append(take_step(run, records, step, None).metrics)
        apart = _timed_apart(run, records)
        devices = run.student.mesh.local_mesh.devices.size
    mean = lambda name: float(np.mean([metrics[name] for metrics in told]))
    apart["prefill"] *= mean("groups_drawn") / config.data.prompts_per_step
    apart["forward"] *= config.grpo.epochs
    apart["optimiser"] *= config.updates_per_step
    collectives = {name: seconds / steps / devices for name, seconds in collective_seconds(out).items()}
    measured = {name: mean(f"seconds/{name}") for name in ("rollout", "reward_wait", "reference", "update", "step")}
    return Profile(divide(measured, apart, collectives), measured["step"], compiled.count)


def _warm_up(run: Run, records: Iterator[Any]) -> int:
    """Steps until one compiles nothing: smaller batches and other prompt widths are compiled when they are met."""
    for step in range(_WARM_UP):
        with count_compiles() as compiled:
            take_step(run, records, step, None)
        if not compiled.count:
            break
    return step + 1


def divide(measured: dict[str, float], apart: dict[str, float], collectives: dict[str, float]) -> dict[str, float]:
    """The parts of a step, in seconds.

    `measured` are the step's own rollout, reward_wait, reference, update and step; `apart` prefill, forward and
    optimiser as they were timed alone; `collectives` those of each compiled program by its name. What was timed alone
    cannot take more than there is to divide: noise of the one clock must not make another part negative.
    """
    spent = Counter()
    for program, seconds in collectives.items():
        spent[_phase(program)] += seconds
    left = {name: max(0.0, measured[name] - spent[name]) for name in ("rollout", "reference", "update")}
    inside = apart["forward"] + apart["optimiser"]
    share = min(1.0, left["update"] / inside) if inside else 0.0
    parts = {
        "prefill": min(apart["prefill"], left["rollout"]),
        "reward wait": measured["reward_wait"],
        "log-probs": left["reference"],
        "forward": apart["forward"] * share,
        "optimiser": apart["optimiser"] * share,
        "collectives": sum(measured[name] - left[name] for name in left),
    }
    parts["decode"] = left["rollout"] - parts["prefill"]
    parts["backward"] = left["update"] - parts["forward"] - parts["optimiser"]
    parts["host"] = measured["step"] - sum(parts.values())
    return {name: parts[name] for name in PARTS}


def _phase(program: str) -> str:
    """Which of a step's measured phases a compiled program runs in."""
    if "train_step" in program:
        return "update"
    return "reference" if "logprobs" in program or "scores" in program else "rollout"


def collective_seconds(out: Path) -> dict[str, float]:
    """Seconds in collectives by compiled program, over all devices of this process, in the newest trace under `out`."""
    newest = max(out.glob("plugins/profile/*/*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    total: Counter[str] = Counter()
    for plane in jax.profiler.ProfileData.from_file(str(newest)).planes:
        accelerator = plane.name.startswith("/device:")
        for line in plane.lines:
            if accelerator and line.name != "XLA Ops":
                continue  # the same operations once more, by stream, by module, by step
            for event in line.events:
                if _COLLECTIVE.match(event.name):
                    total[str(dict(event.stats).get("hlo_module", ""))] += event.duration_ns / 1e9
    return dict(total)


def _timed_apart(run: Run, records: Iterator[Any]) -> dict[str, float]:
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
    return {
        "prefill": _seconds(lambda: prompts(variables, batch.prompt_tokens, batch.prompt_lengths)),
        "forward": _seconds(lambda: scores(adapted, student.automaton, batch)),
        "optimiser": _seconds(lambda: apply(run.state.lora, run.state.opt_state)),
    }


def _seconds(work: Callable[[], Any]) -> float:
    jax.block_until_ready(work())  # compiles
    began = time.perf_counter()
    for _ in range(_REPEATS):
        jax.block_until_ready(work())
    return (time.perf_counter() - began) / _REPEATS
