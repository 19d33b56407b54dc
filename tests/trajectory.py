"""Twenty steps of the tiny recipe on records that never change: the run behind tests/golden/tiny_trajectory.json.

`python -m tests.trajectory` prints it anew, for a change that is meant to move it.
"""

import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from configs.tiny import get_config
from srl_jax.config import TrainConfig
from srl_jax.replay import ReplayWriter, replay_stream
from srl_jax.run import Run
from srl_jax.steps import take_step
from tests.fakes import CountingStream

STEPS = 20
GOLDEN = Path(__file__).parent / "golden" / "tiny_trajectory.json"
# In the order of the golden file's rows, after the digest of what was sampled.
SHOWN = ("reward/total", "reward/action", "kl", "grad_norm", "entropy", "completion_tokens", "kept_groups")


def recipe() -> TrainConfig:
    """configs/tiny.py for twenty steps, without a sandbox, small enough for a test."""
    config = get_config()
    config.steps = STEPS
    config.data.prompts_per_step, config.data.max_prompt_tokens = 2, 192
    config.sampling.max_new_tokens, config.sampling.max_think_tokens = 64, 8
    config.optim.learning_rate = 5e-3  # so that twenty steps go somewhere
    config.grpo.max_extra_rollouts = 0  # every group that is drawn is in the batch, and so is stored
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


def run_live(config: TrainConfig, folder: Path) -> tuple[list[dict], dict]:
    """`run_steps` with its rollouts stored in `folder/replay`."""
    with ReplayWriter(folder / "replay") as recorder:
        return run_steps(config, folder / "run", CountingStream(), recorder)


def sampled(config: TrainConfig, folder: Path) -> list[str]:
    """For each step a digest of the tokens it sampled."""
    stream, digests = replay_stream(folder / "replay", shuffle=False, seed=0), []
    for _ in range(config.steps):
        digest = hashlib.sha256()
        for group in (next(stream) for _ in range(config.data.prompts_per_step)):
            digest.update(np.where(group.completion_mask, group.completion_ids, -1).astype("<i4").tobytes())
        digests.append(digest.hexdigest()[:16])
    return digests


def trajectory(metrics: list[dict], digests: list[str]) -> dict[str, list]:
    """What the golden file holds: for each step its digest and its `SHOWN` numbers."""
    rows = [[round(step[name], 7) + 0.0 for name in SHOWN] for step in metrics]  # + 0.0: no -0.0
    return {"columns": ["sampled", *SHOWN], "steps": [[one, *row] for one, row in zip(digests, rows, strict=True)]}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        told = trajectory(run_live(recipe(), Path(folder))[0], sampled(recipe(), Path(folder)))
    rows = ",\n".join(json.dumps(row) for row in told["steps"])
    sys.stdout.write(f'{{"columns": {json.dumps(told["columns"])}, "steps": [\n{rows}\n]}}\n')
