"""A PEFT adapter directory, read back: the other direction of `export.export_adapter`."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.flax import load_file

from srl_jax.model.decoder import Decoder, init_lora
from srl_jax.model.export import module_name
from srl_jax.model.hf import BadWeights

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
# What changes the meaning of A and B; none of it is ours.
_OTHER_FORMS = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out")


def read_adapter_config(path: Path) -> dict[str, Any]:
    """`adapter_config.json`; raises `BadWeights` for what is not a plain LoRA with rank, alpha and a base model."""
    file = path / CONFIG_FILE
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        kinds = {"r": int, "lora_alpha": (int, float), "base_model_name_or_path": str}
        wrong = [name for name, kind in kinds.items() if not isinstance(config[name], kind)]
    except (ValueError, KeyError, TypeError) as error:
        raise BadWeights(f"{file}: not the configuration of an adapter ({error!r}); export it again") from error
    wrong += [name for name in _OTHER_FORMS if config.get(name)]
    if config.get("peft_type") != "LORA" or wrong:
        raise BadWeights(f"{file}: {', '.join(wrong) or 'peft_type'} is not that of a plain LoRA; export it again")
    return config


def load_adapter(path: Path, decoder: Decoder) -> tuple[dict, dict[str, np.ndarray]]:
    """The `lora` collection (host arrays), and by table ("embedding", "head") the rows of added tokens, in id order.

    `decoder` has the adapter's rank. Raises `BadWeights` naming the tensor that is missing, left over or misshapen.
    """
    file = path / WEIGHTS_FILE
    tensors = load_file(file)
    abstract = jax.eval_shape(lambda: init_lora(decoder, jax.random.key(0)))

    def take(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name not in tensors:
            raise BadWeights(f"{file}: tensor {name!r} is missing; the adapter is of another model")
        array = np.asarray(tensors.pop(name), np.float32)
        if array.shape != shape:
            raise BadWeights(f"{file}: tensor {name!r} has shape {array.shape}, the base model implies {shape}")
        return array

    layers: dict[str, dict[str, np.ndarray]] = {}
    for name, pair in abstract["layers"].items():
        module = f"base_model.model.{module_name(decoder, name)}"
        layers[name] = {
            side: np.stack([
                take(f"{module.format(i=i)}.lora_{side.upper()}.weight", pair[side].shape[:0:-1]).T
                for i in range(pair[side].shape[0])
            ])
            for side in ("a", "b")
        }  # fmt: skip
    rows = {}
    for table, module in (("embedding", "model.embed_tokens"), ("head", "lm_head")):
        name = f"base_model.model.{module}.token_adapter.trainable_tokens_delta"
        if name in tensors:
            rows[table] = np.asarray(tensors.pop(name).astype(jnp.float32))
    if tensors:
        raise BadWeights(f"{file}: {len(tensors)} tensors are not ours, such as {min(tensors)!r}")
    return {"layers": layers}, rows
