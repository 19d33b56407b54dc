"""A trained student to be used: the newest checkpoint of a run, or what launch/export.py wrote."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import jax

from srl_jax.checkpoint import CheckpointError
from srl_jax.config import MeshConfig, TrainConfig
from srl_jax.exported import load_exported
from srl_jax.run import Run
from srl_jax.student import Student


@contextlib.contextmanager
def open_trained(
    config: TrainConfig | None, path: Path, *, spread: bool = False
) -> Iterator[tuple[TrainConfig, Student, dict | None]]:
    """(how the student is prompted and sampled, the student, its adapters), on one device.

    `spread` keeps the run's own mesh where this machine has devices enough, for models that fit on no single one.

    With a `config`, `path` is the directory of its run, which is only read; without, an export, or any model that
    transformers loads. Raises `CheckpointError` for a run without a checkpoint, and what `Run` and `load_exported`
    raise.
    """
    if config is None:
        yield load_exported(path)
        return
    mesh = config.mesh
    if not spread or abs(mesh.data) * mesh.fsdp * mesh.tensor > jax.device_count():
        config = dataclasses.replace(config, mesh=MeshConfig(data=1))  # a few prompts do not split over devices
    # Nothing is scored here, so neither a sandbox nor the server that scored its training is needed.
    config = dataclasses.replace(
        config,
        sandbox=dataclasses.replace(config.sandbox, server=""),
        eval=dataclasses.replace(config.eval, execute=False),
        reward=dataclasses.replace(config.reward, execution=0.0, match_gate=0.0),
    )
    with Run(config, path, read_only=True) as run:
        if run.resume() is None:
            raise CheckpointError(f"{path}: no checkpoint to use; train first")
        yield config, run.student, run.state.lora
