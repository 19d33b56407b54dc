"""SmolLM2-135M-Instruct on a laptop CPU: what `make demo` runs.

Command:  python launch/train.py --config=configs/smollm2_cpu.py --workdir=runs/demo
Hardware: 2 CPU cores, 6 GB.
Time:     about 13 minutes once the data set is there (reports/demo.md).
Result:   held-out reward .469 -> .594, .556, .590 on seeds 0, 1, 2; execution success 0 -> 2, 1, 6 of 48.
"""

from srl_jax.config import TrainConfig


def get_config() -> TrainConfig:
    config = TrainConfig(steps=10)
    config.model.remat = "dots"  # as fast as keeping every activation on two cores, in half the memory
    config.lora.rank, config.lora.alpha = 16, 16.0
    config.data.dir = "data/demo"
    config.data.prompts_per_step = 4
    config.data.max_prompt_tokens = 384
    config.data.few_shot = 1
    config.sampling.max_new_tokens, config.sampling.max_think_tokens = 128, 32
    config.grpo.group_size, config.grpo.micro_batch = 8, 1
    config.grpo.kl_coef = 0.01
    config.optim.learning_rate, config.optim.warmup_steps = 1e-3, 1
    config.optim.schedule = "constant"
    config.eval.max_tasks, config.eval.batch_size = 48, 16
    config.checkpoint.every = 5
    return config
