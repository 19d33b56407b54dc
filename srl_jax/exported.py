"""A student from the files that launch/export.py writes: a merged model, or a PEFT adapter over its base."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp

from srl_jax import assets
from srl_jax.config import ConfigError, MeshConfig, TrainConfig, validate
from srl_jax.model.adapter import CONFIG_FILE, load_adapter, read_adapter_config
from srl_jax.model.export import SETTINGS_FILE
from srl_jax.model.hf import BadWeights
from srl_jax.sharding import make_mesh
from srl_jax.student import Student, load_student


def load_exported(path: Path) -> tuple[TrainConfig, Student, dict | None]:
    """(how the student is prompted and sampled, the student, its adapters) from an exported directory, on one device.

    The settings are the run's where the export carries them, else the defaults: any model that transformers loads will
    do. A merged model has no adapters (None).

    Raises `ConfigError` for a directory that is no model or an adapter whose base is not here, and what
    `load_student` raises.
    """
    if (path / "checkpoints").is_dir():
        raise ConfigError("model.source", str(path), "is a run: give it as --workdir, or export it by launch/export.py")
    adapter = (path / CONFIG_FILE).is_file()
    if not adapter and not (path / "config.json").is_file():
        raise ConfigError("model.source", str(path), f"holds neither config.json nor {CONFIG_FILE}, so it is no export")
    config = _settings(path)
    if adapter:
        peft = read_adapter_config(path)
        config.model.source = peft["base_model_name_or_path"]
        config.lora.rank, config.lora.alpha = peft["r"], float(peft["lora_alpha"])
        if not config.model.source.startswith((assets.RANDOM, "asset:")) and not Path(config.model.source).exists():
            raise ConfigError(
                "model.source",
                config.model.source,
                f"the base model of {path / CONFIG_FILE} is not here; put its path there, or export with --base",
            )
    else:
        config.model.source, config.model.quantize = str(path), "none"
    config.mesh = MeshConfig(data=1)
    validate(config)
    student = load_student(config, make_mesh(devices=jax.devices()[:1]))
    if not adapter:
        return config, student, None
    lora, rows = load_adapter(path, student.decoder)
    ids = sorted(student.tokenizer.added_tag_ids)
    if any(len(table) != len(ids) for table in rows.values()):
        raise BadWeights(f"{path}: the adapter adds {len(next(iter(rows.values())))} tokens, its base lacks {len(ids)}")
    params = dict(student.params)
    for table, values in rows.items():
        params[table] = params[table].at[jnp.asarray(ids)].set(jnp.asarray(values, params[table].dtype))
    student = dataclasses.replace(student, params=params)
    return config, student, student.place_lora(lora)


def _settings(path: Path) -> TrainConfig:
    file = path / SETTINGS_FILE
    if not file.is_file():
        return TrainConfig()
    try:
        return TrainConfig.from_dict(json.loads(file.read_text(encoding="utf-8")))
    except ValueError as error:
        raise BadWeights(f"{file}: not the settings of a run ({error}); export it again") from error
