"""Qwen2.5-Coder-1.5B-Instruct on two RTX 5090s (32 GB each, no NVLink).

Command:  python launch/train.py --config=configs/qwen2_5_coder_1_5b_2gpu.py --workdir=runs/qwen \
              --config.model.source=/path/to/Qwen2.5-Coder-1.5B-Instruct
Hardware: two GPUs of 24 GB or more (install the `cuda12` or `cuda13` extra); 32 GB of host memory.
Time:     not measured: no such machine was at hand.
Result:   not measured. The recipe's shapes, sharding and settings are validated by the tests on virtual devices.

Each GPU holds the whole base in bfloat16 (3.1 GB) and its half of the prompts: over PCIe, splitting weights would cost
more than it saves at this size, so the mesh is `data` only. The adapters' gradients (148 MB in float32) are all that
crosses between the cards.
"""

from srl_jax.config import TrainConfig


def get_config() -> TrainConfig:
    config = TrainConfig(steps=400)
    config.model.source = "models/Qwen2.5-Coder-1.5B-Instruct"
    config.model.dtype = "bfloat16"
    config.lora.rank, config.lora.alpha = 32, 32.0
    config.data.dir = "data/demo"
    config.data.prompts_per_step, config.data.max_prompt_tokens, config.data.few_shot = 16, 1024, 1
    config.sampling.max_new_tokens, config.sampling.max_think_tokens = 512, 256
    config.grpo.group_size, config.grpo.micro_batch, config.grpo.max_extra_rollouts = 8, 4, 1
    config.grpo.kl_coef = 0.05
    config.optim.learning_rate, config.optim.warmup_steps = 2e-5, 10
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = 2, 1, 1
    config.eval.max_tasks, config.eval.batch_size, config.eval.every = 128, 32, 50
    config.checkpoint.every = 20
    config.sandbox.workers = 8
    return config
