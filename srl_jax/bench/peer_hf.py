"""transformers' `generate` and a GRPO update written by hand in torch and peft: what a careful user writes himself.

Better than most such loops: adapters are merged for sampling, the reference is the same model with adapters off, and
logits are computed for completion positions only.
"""

from pathlib import Path

import peft
import torch
import transformers

from srl_jax.bench.worker import Gate
from srl_jax.bench.workload import Workload, advantages, has_weights, prompts

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def load(workload: Workload, directory: Path) -> transformers.PreTrainedModel:
    dtype = getattr(torch, workload.dtype)
    config = transformers.AutoConfig.from_pretrained(directory)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if has_weights(directory):
        return transformers.AutoModelForCausalLM.from_pretrained(directory, config=config, dtype=dtype).to(device)
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)


def lora(workload: Workload) -> peft.LoraConfig:
    return peft.LoraConfig(
        r=workload.lora_rank, lora_alpha=workload.lora_rank, target_modules=LINEAR, task_type="CAUSAL_LM"
    )


def run(gate: Gate, workload: Workload, directory: Path) -> None:
    model = peft.get_peft_model(load(workload, directory), lora(workload))
    device = next(model.parameters()).device
    prompt = torch.tensor(prompts(workload, directory), dtype=torch.long, device=device)
    rows = prompt.repeat_interleave(workload.group_size, dim=0)
    gains = torch.tensor(advantages(workload).reshape(-1), device=device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    settings = transformers.GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_new_tokens=workload.new_tokens,
        max_new_tokens=workload.new_tokens,
        eos_token_id=0,
        pad_token_id=0,
        use_cache=True,
    )
    while True:
        with gate.part("rollout") as part:
            model.eval()
            model.merge_adapter()
            whole = model.generate(rows, attention_mask=torch.ones_like(rows), generation_config=settings)
            model.unmerge_adapter()
            part.tokens = whole[:, rows.shape[1] :].numel()
            device_memory()
        with gate.part("update") as part:
            model.train()
            _update(model, optimizer, workload, whole, gains)
            part.extra = device_memory()


def device_memory() -> dict[str, float]:
    """Waits for the accelerator, where there is one; the peak use of its memory."""
    if not torch.cuda.is_available():
        return {}
    torch.cuda.synchronize()
    return {"peak_device_mb": torch.cuda.max_memory_allocated() / 2**20}


def _logprobs(model: peft.PeftModel, tokens: torch.Tensor, new: int) -> torch.Tensor:
    """Log-probs [rows, new] of the last `new` tokens."""
    scores = model(tokens, logits_to_keep=new + 1, use_cache=False).logits[:, :-1].float()
    return torch.gather(scores.log_softmax(-1), 2, tokens[:, -new:, None])[..., 0]


def _update(
    model: peft.PeftModel,
    optimizer: torch.optim.Optimizer,
    workload: Workload,
    tokens: torch.Tensor,
    gains: torch.Tensor,
) -> None:
    """One optimiser step on the clipped surrogate with the k3 penalty, in micro-batches, reference included."""
    for start in range(0, workload.rows, workload.micro_batch):
        part, gain = tokens[start : start + workload.micro_batch], gains[start : start + workload.micro_batch]
        with torch.no_grad(), model.disable_adapter():
            reference = _logprobs(model, part, workload.new_tokens)
        logprobs = _logprobs(model, part, workload.new_tokens)
        ratio = (logprobs - logprobs.detach()).exp()
        surrogate = torch.minimum(ratio * gain[:, None], ratio.clamp(0.8, 1.2) * gain[:, None])
        gap = reference - logprobs
        (-(surrogate - 0.04 * (gap.exp() - gap - 1)).sum() / workload.tokens).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
