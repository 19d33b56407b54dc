"""What watches a run and turns its knobs: lambda against the KL, early stopping, broken updates, a sampler gone astray.

Plain numbers in, decisions out. `ControlState` is JSON in every checkpoint, so that a resumed run decides as an
uninterrupted one would.

The research notes lower lambda on a KL spike. Lambda is what holds the KL, so lowering it feeds the spike: the
default here is to raise it, and `kl_response="lower"` is the notes' literal form.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Self

from srl_jax.config import TrainConfig

_SMOOTHING = 0.8  # weight of the past in the smoothed KL and spread: about the last five steps
_REACH = 32.0  # lambda stays within this factor of its configured value


class Diverged(RuntimeError):
    """Going on is pointless: update after update was not finite, or not made of what the policy would have sampled."""


@dataclasses.dataclass(frozen=True)
class ControlState:
    """Everything the controllers remember."""

    factor: float = 1.0  # what lambda is multiplied by
    kl: float | None = None  # smoothed, per token
    spread: float | None = None  # smoothed standard deviation of rewards within a group
    broken: int = 0  # updates in a row that were skipped
    gap: float | None = None  # between the log-probs of sampler and trainer, of the last step that told one
    apart: int = 0  # steps in a row whose gap was too wide
    judged_step: int = 0  # of the last held-out evaluation
    best_reward: float | None = None
    best_step: int = 0
    setbacks: int = 0  # held-out evaluations since the best one
    stopped: str = ""  # why training ended before its last step

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return dataclasses.asdict(self)


def kl_coef(state: ControlState, step: int, config: TrainConfig) -> float:
    """Lambda of the update that follows `step` finished ones: configured value, decay and controller together."""
    share = 1.0 - (1.0 - config.control.kl_coef_decay_to) * step / config.steps
    return config.grpo.kl_coef * share * state.factor


def after_step(state: ControlState, metrics: Mapping[str, float | None], config: TrainConfig) -> ControlState:
    """The state after one update with these metrics; each may be missing.

    They are `kl`, `reward/group_std`, `skipped`, and `logprob_gap`, of which the canary lives: the mean difference
    per token between the log-probs that the sampler gave and those that the trainer finds for the same policy.
    """
    c = config.control
    kl, spread = _smooth(state.kl, metrics.get("kl")), _smooth(state.spread, metrics.get("reward/group_std"))
    factor = state.factor
    if c.kl_target and kl is not None and kl > c.kl_target:
        factor = factor * c.kl_factor if c.kl_response == "raise" else factor / c.kl_factor
    elif c.vanishing_spread and spread is not None and spread < c.vanishing_spread:
        factor = factor / c.kl_factor
    elif factor > 1.0:
        factor = max(1.0, factor / c.kl_factor)
    else:
        factor = min(1.0, factor * c.kl_factor)
    stopped = state.stopped
    if c.kl_stop and kl is not None and kl > c.kl_stop:
        stopped = f"the KL per token, smoothed, reached {kl:.4f}, beyond control.kl_stop={c.kl_stop:g}"
    gap, apart = state.gap, state.apart
    measured = metrics.get("logprob_gap")
    # Replayed log-probs are an older policy's; a batch without a token left has a gap of 0. Neither says anything.
    if config.method == "srl" and measured and math.isfinite(measured):
        gap, apart = measured, apart + 1 if measured > c.gap_stop else 0
    return dataclasses.replace(
        state,
        factor=min(max(factor, 1.0 / _REACH), _REACH),
        kl=kl,
        spread=spread,
        broken=state.broken + 1 if metrics.get("skipped") == 1.0 else 0,
        gap=gap,
        apart=apart,
        stopped=stopped,
    )


def after_evaluation(state: ControlState, step: int, reward: float | None, config: TrainConfig) -> ControlState:
    """The state after the student of `step` earned the mean held-out `reward` (None: nothing could be scored).

    The same evaluation a second time, as after a resume, changes nothing. `best_step == step` says that it is the
    best so far.
    """
    if step <= state.judged_step or reward is None:
        return state
    if state.best_reward is None or reward > state.best_reward:
        return dataclasses.replace(state, judged_step=step, best_reward=reward, best_step=step, setbacks=0)
    setbacks = state.setbacks + 1
    stopped = state.stopped
    if config.control.patience and setbacks >= config.control.patience:
        stopped = (
            f"{setbacks} held-out evaluations in a row did not beat the reward {state.best_reward:.4f} of step "
            f"{state.best_step} (control.patience={config.control.patience})"
        )
    return dataclasses.replace(state, judged_step=step, setbacks=setbacks, stopped=stopped)


def check_broken(state: ControlState, config: TrainConfig, dumps: object) -> None:
    """Raises `Diverged` when `control.max_broken_updates` steps in a row had every update skipped; `dumps` is where
    they lie."""
    if state.broken >= config.control.max_broken_updates:
        raise Diverged(
            f"{state.broken} steps in a row had only updates of a non-finite loss or gradient; the adapters are those "
            f"before them. The batches are in {dumps}; lower optim.learning_rate, or raise control.max_broken_updates "
            "to go on"
        )


def check_gap(state: ControlState, config: TrainConfig) -> None:
    """Raises `Diverged` when the gap was beyond `control.gap_stop` for `control.gap_steps` steps in a row.

    Ratios are then of two different distributions, so gradients are of neither, and nothing else in a run's metrics
    would tell.
    """
    c = config.control
    if c.gap_stop and state.apart >= c.gap_steps:
        raise Diverged(
            f"for {state.apart} steps in a row the sampler's log-probs were not the trainer's: {state.gap:.4g} apart "
            f"per token on average, beyond control.gap_stop={c.gap_stop:g}; adapters are not in use on one side, or "
            "weights, kernels or masks differ. Checkpoints are kept; try model.attention=xla and model.dtype=float32, "
            "or raise control.gap_stop to go on"
        )


def _smooth(past: float | None, value: float | None) -> float | None:
    if value is None or not math.isfinite(value):
        return past
    return value if past is None else _SMOOTHING * past + (1.0 - _SMOOTHING) * value
