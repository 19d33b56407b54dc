"""What a language that is never trained on costs: all three, or Python alone, both tested on all three.

Command:  python launch/sweep.py --config=configs/sweep_languages.py --out=runs/languages
Hardware: 2 CPU cores, 8 GB, Node and a JDK; with GPUs --parallel and --devices share the cells out.
Time:     six runs of smollm2_cpu.py (see reports/demo.md); may be stopped and gone on with at any time.
Result:   at a reduced size in reports/training/stage2.md. The rows to look at are those of JavaScript and Java,
          in the table by slice.

Its data set: python launch/prepare_data.py --config=configs/data_languages.py --out=data/languages
"""

from srl_jax.sweep import Sweep


def get_config() -> Sweep:
    return Sweep(
        base="configs/smollm2_cpu.py",
        seeds=(0, 1, 2),
        overrides={"data.dir": "data/languages", "eval.max_tasks": 96},
        cells={
            "all_languages": {},
            "python_only": {"data.slice_weights": {"python/generated": 1.0, "python/episodes": 1.0}},
        },
    )
