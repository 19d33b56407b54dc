"""Twenty steps of the tiny recipe on records that never change: the run behind tests/golden/tiny_trajectory.json.

`python -m tests.trajectory` prints it anew, for a change that is meant to move it.
"""

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from configs.tiny import get_config
from srl_jax.config import TrainConfig
from srl_jax.replay import ReplayWriter
from srl_jax.run import Run
from srl_jax.steps import take_step
from tests.fakes import CountingStream

STEPS = 20
GOLDEN = Path(__file__).parent / "golden" / "tiny_trajectory.json"
SHOWN = ("reward/total", "reward/action", "kl", "loss", "grad_norm", "entropy", "completion_tokens", "kept_groups")


def recipe() -> TrainConfig:
    """configs/tiny.py for twenty steps, without a sandbox, small enough for a test."""
    config = get_config()
    config.steps = STEPS
    config.data.max_prompt_tokens = 192
    config.sampling.max_new_tokens, config.sampling.max_think_tokens = 64, 8
    config.optim.learning_rate = 1e-2
    config.grpo.max_extra_rollouts = 0
    config.mesh.data = 1
    config.eval.execute = False
    return config


def run_steps(
    config: TrainConfig, workdir: Path, records: Iterator[Any], recorder: ReplayWriter | None = None
) -> tuple[list[dict], dict]:
    """The metrics of every step and the final adapters."""
    with Run(config, workdir) as run:
        metrics = [take_step(run, records, step, recorder).metrics for step in range(config.steps)]
        return metrics, run.state.lora


def shown(metrics: list[dict]) -> list[dict]:
    """What the golden file holds of each step."""
    return [{name: round(step[name], 7) for name in SHOWN} for step in metrics]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        trajectory = shown(run_steps(recipe(), Path(folder), CountingStream())[0])
    json.dump(trajectory, sys.stdout, indent=0)
