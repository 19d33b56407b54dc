"""SRL three times as long as the demo, beside SFT on the same traces, no KL, and no dynamic sampling.

Command:  python launch/sweep.py --config=configs/sweep_stage2.py --out=runs/stage2
Hardware: 2 CPU cores, 8 GB.
Time:     twelve runs of 20 to 47 minutes; may be stopped and gone on with at any time.
Result:   reports/training/stage2.md

Its data set is the demo's: python launch/prepare_data.py --config=configs/data_demo.py --out=data/demo
The base's linear maps are in bfloat16, which takes two thirds of float32's time on CPUs with AMX,
seven tenths with AVX-512 bf16; without either drop it.
"""

from srl_jax.sweep import Sweep


def get_config() -> Sweep:
    return Sweep(
        base="configs/smollm2_cpu.py",
        seeds=(0, 1, 2),
        overrides={"steps": 30, "model.quantize": "bfloat16"},
        cells={
            "srl": {},
            "sft": {"method": "sft"},
            "lambda_0": {"grpo.kl_coef": 0.0},
            "no_dynamic_sampling": {"grpo.dynamic_sampling_min_std": 0.0},
        },
    )
