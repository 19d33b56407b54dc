"""Published shapes of models a user may train, for random weights where the real ones are not at hand.

`model.source = "random:<name>"` gives a model of that shape: memory, compilation and speed are those of the real one.
"""

import dataclasses

from srl_jax.model.families import ModelConfig, RopeScaling

_QWEN2 = {"family": "qwen2", "vocab_size": 151_936, "rope_theta": 1e6, "norm_eps": 1e-6, "qkv_bias": True}

SHAPES = {
    # Every mechanism and few weights: the model of configs/tiny.py and of the tests. Its vocabulary is the tokenizer's.
    "tiny": ModelConfig("llama", 1, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, d_ff=128),
    "smollm2-135m": ModelConfig(
        "llama", 49_152, d_model=576, n_layers=30, n_heads=9, n_kv_heads=3, head_dim=64, d_ff=1536, rope_theta=1e5
    ),
    "qwen2.5-0.5b": ModelConfig(
        d_model=896, n_layers=24, n_heads=14, n_kv_heads=2, head_dim=64, d_ff=4864, max_position=32_768, **_QWEN2
    ),
    "qwen2.5-1.5b": ModelConfig(
        d_model=1536, n_layers=28, n_heads=12, n_kv_heads=2, head_dim=128, d_ff=8960, max_position=32_768, **_QWEN2
    ),
    "qwen3-4b": ModelConfig(
        "qwen3", 151_936, d_model=2560, n_layers=36, n_heads=32, n_kv_heads=8, head_dim=128, d_ff=9728,
        rope_theta=1e6, norm_eps=1e-6, qk_norm=True, max_position=40_960,
    ),
    "llama3.1-8b": ModelConfig(
        "llama", 128_256, d_model=4096, n_layers=32, n_heads=32, n_kv_heads=8, head_dim=128, d_ff=14_336,
        rope_theta=5e5, rope_scaling=RopeScaling("llama3", 8.0), tie_embeddings=False, max_position=131_072,
    ),
}  # fmt: skip


def tiny(vocab_size: int) -> ModelConfig:
    """The tiny shape with a vocabulary of its own."""
    return dataclasses.replace(SHAPES["tiny"], vocab_size=vocab_size)
