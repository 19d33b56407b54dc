"""The ablations of the research notes around smollm2_cpu.py, each against the unchanged recipe; SFT among them.

Command:  python launch/sweep.py --config=configs/sweep_ablations.py --out=runs/ablations
Hardware: 2 CPU cores, 8 GB; with GPUs --parallel and --devices share the cells out.
Time:     seeds * cells runs of smollm2_cpu.py (see reports/demo.md); may be stopped and gone on with at any time.
          --seeds=0 --cells=srl,soft_state --override=steps=6 --override=eval.max_tasks=24 makes it a smaller one.
Result:   at a reduced size in reports/training/stage2.md.

In files of their own, since they need data sets of their own: a withheld language (sweep_languages.py) and the
teacher's temperature (sweep_teacher.py).
"""

from srl_jax.sweep import Sweep


def get_config() -> Sweep:
    return Sweep(
        base="configs/smollm2_cpu.py",
        seeds=(0, 1, 2),
        cells={
            "srl": {},
            "sft": {"method": "sft"},
            "lambda_0.05": {"grpo.kl_coef": 0.05},
            "lambda_0.1": {"grpo.kl_coef": 0.1},
            "action_only": {"reward.action_weight": 1.0, "reward.state_weight": 0.0, "reward.think_weight": 0.0},
            "no_state": {"reward.action_weight": 0.7, "reward.state_weight": 0.0, "reward.think_weight": 0.3},
            "brevity_off": {"reward.brevity_penalty": 0.0},
            "brevity_strong": {"reward.brevity_penalty": 0.5},
            # Malformed output does not occur under the grammar, so its handling is compared without it.
            "free": {"sampling.constrained": False},
            "free_malformed_0.1": {"sampling.constrained": False, "reward.malformed": -0.1},
            "free_penalize": {"sampling.constrained": False, "grpo.malformed_advantage": "penalize"},
            "soft_state": {"reward.state_match": "soft"},
            "no_dynamic_sampling": {"grpo.dynamic_sampling_min_std": 0.0},
            "textual_tags": {"model.atomic_tags": False},
            "train_on_python": {"data.slice_weights": {"python/generated": 1.0, "python/real": 1.0}},
            "lr_3e-4": {"optim.learning_rate": 3e-4},
            "lr_3e-3": {"optim.learning_rate": 3e-3},
        },
    )
