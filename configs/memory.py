"""The runs of reports/memory.md: a model's true shape with random weights, a precision, a context.

Command:  python launch/profile_step.py --dry_run --row --config=configs/memory.py:qwen2.5-0.5b,nf4,4096
Hardware: any; nothing is read but shapes. With --measure as much memory as the row says.
Time:     half a minute a row on two cores.
Result:   a row of the table in reports/memory.md.

One group of four completions, prompt and completion half the context each, LoRA of rank 32 on every linear
map, full rematerialisation. Precisions: float32 and bfloat16; int8 and nf4 quantise the layers of a bfloat16 model.
"""

from srl_jax.config import TrainConfig


def get_config(which: str = "smollm2-135m,bfloat16,512") -> TrainConfig:
    model, precision, context = which.split(",")
    config = TrainConfig(steps=100)
    config.model.source = f"random:{model}"
    config.model.dtype = precision if precision in ("float32", "bfloat16") else "bfloat16"
    config.model.quantize = precision if precision in ("int8", "nf4") else "none"
    config.model.remat = "full"
    config.lora.rank, config.lora.alpha = 32, 32.0
    half = int(context) // 2
    config.data.prompts_per_step, config.data.max_prompt_tokens = 1, half
    config.sampling.max_new_tokens, config.sampling.max_think_tokens = half, half // 4
    config.grpo.group_size, config.grpo.micro_batch = 4, 1
    config.mesh.data = 1
    return config
