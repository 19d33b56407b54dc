"""Random small models of transformers, one for every family and corner case, and greedy text by our decoder."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from srl_jax.model.decoder import Decoder, encode_prompts, init_cache, logits

_SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CASES = {
    "llama-untied": (transformers.LlamaConfig, {"tie_word_embeddings": False}),
    "llama-tied-mha": (transformers.LlamaConfig, {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama-rope-scaling": (transformers.LlamaConfig, {"rope_parameters": _LLAMA3_ROPE}),
    "llama-linear-rope": (
        transformers.LlamaConfig,
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "qwen2": (transformers.Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3-wide-heads": (transformers.Qwen3Config, {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen2-windows": (
        transformers.Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1, "tie_word_embeddings": False},
    ),
    # Windows shorter than the 8 prompt tokens of the greedy test, so that one spans prompt and completion.
    "gemma2": (
        transformers.Gemma2Config,
        {"head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 0.8,
         "final_logit_softcapping": 2.0},
    ),
    "gemma3": (
        transformers.Gemma3TextConfig,
        {"head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 24,
         "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
         "rope_parameters": {
             "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
             "full_attention": {"rope_type": "linear", "rope_theta": 5e3, "factor": 8.0},
         }},
    ),
}  # fmt: skip


def peer(name: str, **changes) -> transformers.PreTrainedModel:
    kind, extra = CASES[name]
    torch.manual_seed(0)
    config = kind(**{**_SMALL, **extra, **changes})
    # "eager" is the one implementation that knows soft caps.
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():  # biases and norms start at 0 and 1, where a forgotten one would not show
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def greedy(config, params, prompts, steps):
    """Greedy text through the shared prefix and the KV cache."""
    decoder = Decoder(config)
    lengths = jnp.full(prompts.shape[0], prompts.shape[1])
    prefix = encode_prompts(decoder, {"params": params}, prompts, lengths)

    def step(carry, i):
        token, cache = carry
        (hidden, _), new = decoder.apply(
            {"params": params, "cache": cache},
            token[:, None],
            jnp.broadcast_to(prompts.shape[1] - 1 + i, (prompts.shape[0], 1)),
            prefix,
            jnp.broadcast_to(i, (prompts.shape[0],)),
            mutable=["cache"],
        )
        token = jnp.argmax(logits(config, params, hidden)[:, 0], axis=-1)
        return (token, new["cache"]), token

    cache = init_cache(config, prompts.shape[0], steps, jnp.float32)
    _, tokens = jax.lax.scan(step, (jnp.asarray(prompts[:, -1]), cache), jnp.arange(steps))
    return np.asarray(tokens).T
