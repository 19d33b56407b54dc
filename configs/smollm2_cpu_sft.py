"""The baseline of smollm2_cpu.py: supervised fine-tuning on the same traces, adapters and budget, without rollouts.

Command:  python launch/train.py --config=configs/smollm2_cpu_sft.py --workdir=runs/sft
Hardware: 2 CPU cores, 8 GB.
Time:     a step is the update of smollm2_cpu.py without its sampling: 45 to 85 s on one core of an AMD EPYC with its
          products in bfloat16 (reports/training/stage2.md).
Result:   at thirty steps in reports/training/stage2.md.

Each step reads 4 * 8 teacher traces, as many as the other recipe samples completions, for as many steps; a trace has
about 110 tokens, a sampled completion 108 to 126.
"""

from configs.smollm2_cpu import get_config as srl_config
from srl_jax.config import TrainConfig


def get_config() -> TrainConfig:
    config = srl_config()
    config.method = "sft"
    return config
