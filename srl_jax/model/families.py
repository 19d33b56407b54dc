"""What distinguishes one decoder-only model from another, as data.

One `ModelConfig` describes Llama 2/3.x, Qwen2/2.5 and Qwen3 shapes; `decoder.py` reads it and nothing else knows
which family it runs. `from_hf` and `from_gguf` translate the two file formats' own words.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any


class UnsupportedModel(ValueError):
    """The file describes an architecture or option the decoder does not implement; the message names it."""


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's frequency-dependent RoPE stretch (`kind="llama3"`), or a plain division (`kind="linear"`)."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shapes and switches of a decoder. Letters are the project's: V, D, L, N, K, H, F (see architecture notes).

    Hashable, so that it can be a static argument of a jitted function.
    """

    family: str
    vocab_size: int  # V, the six tag rows included once the tokenizer is known
    d_model: int  # D
    n_layers: int  # L
    n_heads: int  # N
    n_kv_heads: int  # K
    head_dim: int  # H
    d_ff: int  # F
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    qkv_bias: bool = False
    qk_norm: bool = False
    max_position: int = 8192

    def __post_init__(self):
        if self.n_heads % self.n_kv_heads:
            raise UnsupportedModel(f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}")
        if self.head_dim % 2:
            raise UnsupportedModel(f"head_dim={self.head_dim} is odd; rotary embeddings need an even head_dim")

    @property
    def parameters(self) -> int:
        """Number of base weights, embedding counted once when tied."""
        d, h = self.d_model, self.head_dim
        attention = d * h * (2 * self.n_heads + 2 * self.n_kv_heads)
        per_layer = attention + 3 * d * self.d_ff + 2 * d
        per_layer += (self.n_heads + 2 * self.n_kv_heads) * h if self.qkv_bias else 0
        per_layer += 2 * h if self.qk_norm else 0
        heads = 1 if self.tie_embeddings else 2
        return self.n_layers * per_layer + heads * self.vocab_size * d + d


_HF_FAMILIES = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}


def _hf_rope(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    # transformers 5 writes `rope_parameters` (theta inside); 4.x wrote `rope_theta` and `rope_scaling`.
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta", config.get("rope_theta", 10_000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling("linear", float(rope["factor"]))
    if kind == "llama3":
        return theta, RopeScaling(
            "llama3",
            float(rope["factor"]),
            float(rope["low_freq_factor"]),
            float(rope["high_freq_factor"]),
            int(rope["original_max_position_embeddings"]),
        )
    raise UnsupportedModel(f"config.json: rope_type {kind!r} is not supported; use default, linear or llama3")


def from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """`ModelConfig` of a Hugging Face `config.json` (already parsed).

    Raises `UnsupportedModel` naming the architecture or field that the decoder does not implement.
    """
    architectures = config.get("architectures") or ["(none)"]
    family = _HF_FAMILIES.get(architectures[0])
    if family is None:
        near = difflib.get_close_matches(architectures[0], _HF_FAMILIES, n=1, cutoff=0.0)
        raise UnsupportedModel(
            f"config.json: architecture {architectures[0]!r} is not supported; supported: "
            f"{', '.join(sorted(_HF_FAMILIES))} (nearest: {near[0]})"
        )
    if config.get("hidden_act", "silu") != "silu":
        raise UnsupportedModel(f"config.json: hidden_act {config['hidden_act']!r} is not supported for {family}")
    if config.get("use_sliding_window"):
        raise UnsupportedModel("config.json: use_sliding_window=true is not supported")
    if family == "llama" and (config.get("attention_bias") or config.get("mlp_bias")):
        raise UnsupportedModel("config.json: attention_bias or mlp_bias in a Llama model is not supported")
    theta, scaling = _hf_rope(config)
    n_heads = int(config["num_attention_heads"])
    return ModelConfig(
        family=family,
        vocab_size=int(config["vocab_size"]),
        d_model=int(config["hidden_size"]),
        n_layers=int(config["num_hidden_layers"]),
        n_heads=n_heads,
        n_kv_heads=int(config.get("num_key_value_heads") or n_heads),
        head_dim=int(config.get("head_dim") or config["hidden_size"] // n_heads),
        d_ff=int(config["intermediate_size"]),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        max_position=int(config.get("max_position_embeddings", 8192)),
    )


def from_gguf(fields: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> ModelConfig:
    """`ModelConfig` of a GGUF file's metadata (`{key: value}`) and its tensors' shapes, rows first."""
    family = fields["general.architecture"]
    if family not in ("llama", "qwen2", "qwen3"):
        raise UnsupportedModel(f"GGUF: architecture {family!r} is not supported; supported: llama, qwen2, qwen3")
    if fields.get(f"{family}.rope.scaling.type", "none") not in ("none", ""):
        raise UnsupportedModel(f"GGUF: {family}.rope.scaling.type is not supported; load the safetensors instead")
    d_model, n_heads = int(fields[f"{family}.embedding_length"]), int(fields[f"{family}.attention.head_count"])
    return ModelConfig(
        family=family,
        vocab_size=shapes["token_embd.weight"][0],
        d_model=d_model,
        n_layers=int(fields[f"{family}.block_count"]),
        n_heads=n_heads,
        n_kv_heads=int(fields.get(f"{family}.attention.head_count_kv", n_heads)),
        head_dim=int(fields.get(f"{family}.attention.key_length", d_model // n_heads)),
        d_ff=int(fields[f"{family}.feed_forward_length"]),
        rope_theta=float(fields.get(f"{family}.rope.freq_base", 10_000.0)),
        norm_eps=float(fields[f"{family}.attention.layer_norm_rms_epsilon"]),
        tie_embeddings="output.weight" not in shapes,
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        max_position=int(fields.get(f"{family}.context_length", 8192)),
    )


def tiny(vocab_size: int) -> ModelConfig:
    """The random small model of the tests and of `configs/tiny.py`: every mechanism, few weights."""
    return ModelConfig(
        family="llama", vocab_size=vocab_size, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, d_ff=128
    )
