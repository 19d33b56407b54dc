"""A random two-layer model on the demo data: every moving part in seconds; it learns nothing worth reading.

Command:  python launch/train.py --config=configs/tiny.py --workdir=runs/tiny
Hardware: any CPU, 2 GB.
Time:     under a minute once the data set exists (`make demo` builds it in data/demo).
Result:   4 steps, a parse rate of 1.0 under the grammar, rewards near those of random text (about 0.2).
"""

from srl_jax.config import TrainConfig


def get_config() -> TrainConfig:
    config = TrainConfig(steps=4)
    config.model.source = "random:tiny"
    config.lora.rank, config.lora.alpha = 4, 4.0
    config.data.prompts_per_step = 4
    config.data.max_prompt_tokens = 512
    config.data.few_shot = 0
    config.sampling.max_new_tokens, config.sampling.max_think_tokens = 96, 16
    config.grpo.group_size, config.grpo.micro_batch = 4, 2
    config.optim.learning_rate = 1e-3
    config.eval.max_tasks, config.eval.batch_size = 8, 8
    config.checkpoint.every = 1
    return config
