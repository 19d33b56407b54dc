"""What distinguishes one decoder-only model from another, as data.

One `ModelConfig` describes Llama 2/3.x, Qwen2/2.5, Qwen3, Gemma 2 and Gemma 3 (text); `decoder.py` reads it and
nothing else knows which family it runs. `from_hf` and `from_gguf` translate the two file formats' own words.
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
    activation: str = "silu"  # of the feed-forward's gate: "silu" or "gelu_tanh"
    post_norms: bool = False  # norms after attention and feed-forward too, before each residual sum (Gemma)
    embed_scale: float = 1.0  # multiplies the token embeddings, in their dtype
    query_scale: float | None = None  # multiplies the attention scores; None: head_dim ** -0.5
    attention_softcap: float | None = None  # scores become cap * tanh(scores / cap), before the mask
    final_softcap: float | None = None  # so do the logits, before any temperature
    # Per layer, how many positions a query sees, its own included; 0: all. Empty: every layer sees all.
    windows: tuple[int, ...] = ()
    local_rope_theta: float | None = None  # RoPE base of the windowed layers, unscaled; None: as everywhere

    def __post_init__(self):
        if self.n_heads % self.n_kv_heads:
            raise UnsupportedModel(f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}")
        if self.head_dim % 2:
            raise UnsupportedModel(f"head_dim={self.head_dim} is odd; rotary embeddings need an even head_dim")
        if self.windows and len(self.windows) != self.n_layers:
            raise UnsupportedModel(f"windows names {len(self.windows)} layers, the model has {self.n_layers}")

    @property
    def attention_scale(self) -> float:
        """What the attention scores are multiplied by."""
        return self.head_dim**-0.5 if self.query_scale is None else self.query_scale

    @property
    def norm_offset(self) -> float:
        """What Hugging Face files leave out of norm scales: Gemma stores w and multiplies by 1 + w."""
        return 1.0 if self.post_norms else 0.0

    @property
    def parameters(self) -> int:
        """Number of base weights, embedding counted once when tied."""
        d, h = self.d_model, self.head_dim
        attention = d * h * (2 * self.n_heads + 2 * self.n_kv_heads)
        per_layer = attention + 3 * d * self.d_ff + (4 if self.post_norms else 2) * d
        per_layer += (self.n_heads + 2 * self.n_kv_heads) * h if self.qkv_bias else 0
        per_layer += 2 * h if self.qk_norm else 0
        heads = 1 if self.tie_embeddings else 2
        return self.n_layers * per_layer + heads * self.vocab_size * d + d


_HF_FAMILIES = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
}
_GEMMA = ("gemma2", "gemma3")
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_tanh": "gelu_tanh"}


def _hf_rope(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None, float | None]:
    """RoPE base, its scaling, and the base of windowed layers where that differs."""
    # transformers 5 writes `rope_parameters` (theta inside, per kind of layer in Gemma 3); 4.x wrote `rope_theta`,
    # `rope_scaling` and `rope_local_base_freq`.
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    local = config.get("rope_local_base_freq")
    if "full_attention" in rope:
        windowed = rope.get("sliding_attention") or {}
        if windowed.get("rope_type", "default") != "default":
            raise UnsupportedModel("config.json: rope_parameters.sliding_attention must have rope_type default")
        local = windowed.get("rope_theta", local)
        rope = rope["full_attention"]
    theta = float(rope.get("rope_theta", config.get("rope_theta", 10_000.0)))
    local = None if local is None else float(local)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None, local
    if kind == "linear":
        return theta, RopeScaling("linear", float(rope["factor"])), local
    if kind == "llama3":
        scaling = RopeScaling(
            "llama3",
            float(rope["factor"]),
            float(rope["low_freq_factor"]),
            float(rope["high_freq_factor"]),
            int(rope["original_max_position_embeddings"]),
        )
        return theta, scaling, local
    raise UnsupportedModel(f"config.json: rope_type {kind!r} is not supported; use default, linear or llama3")


def _hf_windows(config: Mapping[str, Any], family: str) -> tuple[int, ...]:
    layers, window = int(config["num_hidden_layers"]), config.get("sliding_window")
    if family not in _GEMMA and not config.get("use_sliding_window"):
        return ()
    if window is None:
        return ()
    kinds = config.get("layer_types")
    if kinds is None and family in _GEMMA:
        # Older files say nothing, or name the distance between layers that see everything.
        period = int(config.get("sliding_window_pattern", 2 if family == "gemma2" else 6))
        kinds = ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(layers)]
    elif kinds is None:
        first = int(config["max_window_layers"])
        kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    unknown = set(kinds) - {"sliding_attention", "full_attention"}
    if unknown:
        raise UnsupportedModel(f"config.json: layer_types {sorted(unknown)}; known: sliding_ and full_attention")
    return tuple(int(window) if kind == "sliding_attention" else 0 for kind in kinds)


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
    gemma = family in _GEMMA
    # Early Gemma files carry a `hidden_act` that was never used beside the `hidden_activation` that is.
    field, usual = ("hidden_activation", "gelu_pytorch_tanh") if gemma else ("hidden_act", "silu")
    activation = config.get(field) or usual
    if activation not in _ACTIVATIONS:
        raise UnsupportedModel(f"config.json: {field} {activation!r} is not supported; {', '.join(_ACTIVATIONS)} are")
    for switch in ("mlp_bias", "use_bidirectional_attention", *(() if family == "qwen2" else ("attention_bias",))):
        if config.get(switch):
            raise UnsupportedModel(f"config.json: {switch}={config[switch]!r} is not supported for {family}")
    theta, scaling, local_theta = _hf_rope(config)
    n_heads, d_model = int(config["num_attention_heads"]), int(config["hidden_size"])
    common = ModelConfig(
        family=family,
        vocab_size=int(config["vocab_size"]),
        d_model=d_model,
        n_layers=int(config["num_hidden_layers"]),
        n_heads=n_heads,
        n_kv_heads=int(config.get("num_key_value_heads") or n_heads),
        head_dim=int(config.get("head_dim") or d_model // n_heads),
        d_ff=int(config["intermediate_size"]),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        tie_embeddings=bool(config.get("tie_word_embeddings", gemma)),
        qkv_bias=family == "qwen2",
        qk_norm=family in ("qwen3", "gemma3"),
        max_position=int(config.get("max_position_embeddings", 8192)),
        activation=_ACTIVATIONS[activation],
        windows=_hf_windows(config, family),
    )
    if not gemma:
        return common
    return dataclasses.replace(
        common,
        post_norms=True,
        embed_scale=d_model**0.5,
        query_scale=float(config["query_pre_attn_scalar"]) ** -0.5,
        attention_softcap=config.get("attn_logit_softcapping"),
        final_softcap=config.get("final_logit_softcapping"),
        local_rope_theta=local_theta,
    )


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` of a model: `from_hf(to_hf(config)) == config`, whatever file the model came from."""
    gemma, windowed = config.family in _GEMMA, any(config.windows)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        scaling = config.rope_scaling
        rope |= {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            rope |= {
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_position,
            }
    if config.local_rope_theta is not None:
        local = {"rope_type": "default", "rope_theta": config.local_rope_theta}
        rope = {"full_attention": rope, "sliding_attention": local}
    activation = next(name for name, ours in _ACTIVATIONS.items() if ours == config.activation)
    values = {
        "architectures": [next(name for name, family in _HF_FAMILIES.items() if family == config.family)],
        "model_type": "gemma3_text" if config.family == "gemma3" else config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.d_ff,
        "rope_parameters": rope,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.max_position,
        "hidden_activation" if gemma else "hidden_act": activation,
    }
    if windowed:
        kinds = ["sliding_attention" if window else "full_attention" for window in config.windows]
        values |= {"sliding_window": max(config.windows), "layer_types": kinds}
        values |= {} if gemma else {"use_sliding_window": True}
    if gemma:
        values |= {
            # An integer in every published file, and required to be one.
            "query_pre_attn_scalar": round(config.attention_scale**-2),
            "attn_logit_softcapping": config.attention_softcap,
            "final_logit_softcapping": config.final_softcap,
        }
    return values


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
