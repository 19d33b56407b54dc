"""Qwen2.5-Coder-1.5B-Instruct on a TPU v5e-8 slice (8 chips of 16 GB).

Command:  python launch/train.py --config=configs/qwen2_5_coder_1_5b_v5e8.py --workdir=runs/qwen-tpu \
              --config.model.source=/path/to/Qwen2.5-Coder-1.5B-Instruct
Hardware: one TPU v5e-8 host (install the `tpu` extra); see docs/tpu.md.
Time:     not measured: no TPU was at hand.
Result:   not measured. The run's jitted functions lower for TPU in the tests.

Each chip holds the whole base in bfloat16 (3.1 GB) and its eighth of the prompts, so nothing but the adapters'
gradients crosses between chips. docs/tpu.md says when to shard weights instead.
"""

from srl_jax.config import TrainConfig


def get_config() -> TrainConfig:
    config = TrainConfig(steps=400)
    config.model.source = "models/Qwen2.5-Coder-1.5B-Instruct"
    config.model.dtype = "bfloat16"
    config.model.remat = "full"
    config.lora.rank, config.lora.alpha = 32, 32.0
    config.data.dir = "data/demo"
    config.data.prompts_per_step, config.data.max_prompt_tokens, config.data.few_shot = 32, 1024, 1
    config.sampling.max_new_tokens, config.sampling.max_think_tokens = 512, 256
    config.grpo.group_size, config.grpo.micro_batch, config.grpo.max_extra_rollouts = 8, 8, 1
    config.grpo.kl_coef = 0.05
    config.optim.learning_rate, config.optim.warmup_steps = 2e-5, 10
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = 8, 1, 1
    config.eval.max_tasks, config.eval.batch_size, config.eval.every = 128, 32, 50
    config.checkpoint.every = 20
    config.sandbox.workers = 16
    return config
