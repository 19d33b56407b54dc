"""One training step of each method: a batch is collected, updates are made of it, and what happened is told."""

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from srl_jax import control, flops, hosts
from srl_jax.chains import collect_episodes
from srl_jax.config import TrainConfig, config_hash
from srl_jax.control import ControlState
from srl_jax.groups import COMPONENTS
from srl_jax.replay import ReplayWriter
from srl_jax.replay_step import collect_replay, policy_version, store
from srl_jax.rollout import Rollout, collect_rollouts
from srl_jax.run import Run
from srl_jax.sft import collect_traces, sft_settings, sft_step
from srl_jax.train_step import StepSettings, TrainBatch, mini_batches, train_step, updates_made
from srl_jax.value import learn

BROKEN = "broken"  # folder of the batches whose updates were not finite


@dataclasses.dataclass(frozen=True)
class Step:
    """What a step did. `histograms` are the values behind some of the metrics."""

    metrics: dict[str, float | None]
    histograms: dict[str, np.ndarray]


def step_settings(config: TrainConfig) -> StepSettings:
    """The static part of an update that `config` asks for."""
    c = config.grpo
    return StepSettings(
        temperature=config.sampling.temperature,
        clip_epsilon_low=c.clip_epsilon_low,
        clip_epsilon_high=c.clip_epsilon_high,
        aggregation=c.aggregation,
        max_length=config.sampling.max_new_tokens,
        ratio=c.ratio,
        negative_ratio_cap=c.negative_ratio_cap or None,
        entropy_coef=c.entropy_coef,
        kl_in_loss=c.kl_estimator if c.kl_placement == "loss" else None,
        imitation_gamma=c.imitation_gamma,
        micro_batch=c.micro_batch,
    )


class _Timed(Iterator[Any]):
    """What another iterator yields, and the seconds that were waited for it."""

    def __init__(self, source: Iterator[Any]) -> None:
        self._source = source
        self.seconds = 0.0

    def __next__(self) -> Any:
        began = time.perf_counter()
        try:
            return next(self._source)
        finally:
            self.seconds += time.perf_counter() - began


def take_step(run: Run, records: Iterator[Any], step: int, recorder: ReplayWriter | None) -> Step:
    """Replaces `run.state` and `run.control` by their successors; `records` are what the method reads.

    `recorder` keeps the rollouts of a run that records them; of several hosts only the first one's does.
    """
    config, student, settings = run.config, run.student, step_settings(run.config)
    began = time.perf_counter()
    records = _Timed(records)
    coefficient = control.kl_coef(run.control, step, config)
    rollout: Rollout | None = None
    work = flops.Work()
    if config.method == "sft":
        batch, metrics = collect_traces(student, records, config)
        settings = sft_settings(config, settings)
    elif config.method == "replay":
        batch, metrics = collect_replay(student, run.state.lora, records, step, config, settings, kl_coef=coefficient)
        work.scored += 2 * flops.positions(batch)
    else:
        key = jax.random.fold_in(jax.random.wrap_key_data(run.state.key), step)
        if config.plays_episodes:
            rollout = collect_episodes(
                student, run.state.lora, records, key, run.rewards, run.sandbox, config, settings, kl_coef=coefficient
            )
        else:
            rollout = collect_rollouts(
                student, run.state.lora, records, key, run.rewards, config, settings,
                kl_coef=coefficient, value=run.state.value,
            )  # fmt: skip
        batch, metrics = rollout.batch, dict(rollout.metrics)
        work.sampled += flops.sampled_positions(rollout.drawn.arrays)
        work.scored += flops.sampled_positions(rollout.drawn.arrays)
        if recorder is not None or config.replay.record:  # every host takes part in making what one writes
            recording = time.perf_counter()
            version = policy_version(student, config_hash(config))
            stored = store(student, rollout.used, step, version, config)
            if recorder is not None:
                recorder.add(step + 1, stored)
            metrics["seconds/record"] = time.perf_counter() - recording
    updating = time.perf_counter()
    rate = float(run.rates(updates_made(run.state)))
    passes = 1 if config.method == "sft" else config.grpo.epochs
    # A rollout whose log-probs were all computed anew has told its gap to the sampler itself.
    metrics = _update(run, batch, settings, coefficient, passes) | metrics
    work.trained += passes * flops.positions(batch)
    if rollout is not None and rollout.features is not None:
        rewards, valid = np.nan_to_num(rollout.used.column("total")), rollout.used.valid
        value = learn(run.state.value, rollout.features, rewards, valid, config.grpo.value_rate)
        run.state = run.state._replace(value=jax.tree.map(jnp.asarray, value))
    if metrics["skipped"]:
        dump_batch(run, batch, step)
    run.control = ControlState.from_dict(
        hosts.from_first(lambda: control.after_step(run.control, metrics, config).to_dict())
    )
    now = time.perf_counter()
    metrics |= {
        "kl_coef": coefficient,
        "learning_rate": rate,
        "seconds/data_wait": records.seconds,
        "seconds/update": now - updating,
        "seconds/step": now - began,
    }
    metrics |= flops.speed(student, work, now - began)
    return Step(metrics, _histograms(rollout))


def _update(run: Run, batch: TrainBatch, settings: StepSettings, kl_coef: float, passes: int) -> dict[str, float]:
    """Every update of one batch; scalars are means over them (`skipped`: the share), but for the first one's gap."""
    student = run.student
    shared = {"decoder": student.decoder, "optimizer": run.optimizer, "settings": settings}
    told: list[dict[str, float]] = []
    if run.config.method == "sft":
        run.state, scalars = sft_step(run.state, student.params, student.automaton, batch, **shared)
        told.append({name: float(value) for name, value in scalars.items()})
    else:
        count = run.config.grpo.mini_batches
        parts = (batch,) if count == 1 else mini_batches(batch, count)
        for part in parts * passes:
            run.state, scalars = train_step(
                run.state, student.params, student.automaton, part, jnp.float32(kl_coef), **shared
            )
            told.append({name: float(value) for name, value in scalars.items()})
    mean = {name: float(np.mean([one[name] for one in told])) for name in told[0]}
    if "logprob_gap" in mean:
        mean["logprob_gap"] = told[0]["logprob_gap"]  # later ones measure how far the updates went, not the sampler
    return mean


def dump_batch(run: Run, batch: TrainBatch, step: int) -> None:
    """Writes the batch of an update that was not finite to `<workdir>/broken/step<N>.npz`, for whoever looks why."""
    folder = run.workdir / BROKEN
    leaves = jax.tree_util.tree_leaves_with_path(hosts.gather({"batch": batch._asdict(), "lora": run.state.lora}))
    arrays = {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
    if not hosts.is_first():
        return
    folder.mkdir(exist_ok=True)
    temporary = folder / f"step{step + 1}.tmp.npz"
    np.savez_compressed(temporary, **arrays)
    temporary.replace(folder / f"step{step + 1}.npz")


def _histograms(rollout: Rollout | None) -> dict[str, np.ndarray]:
    if rollout is None:
        return {}
    drawn = rollout.drawn
    values = {f"reward/{name}": drawn.column(name) for name in ("total", *COMPONENTS, "brevity")}
    values["completion_tokens"] = drawn.arrays["mask"].sum(-1).astype(np.float32)
    return {name: column[np.isfinite(column)] for name, column in values.items()}
