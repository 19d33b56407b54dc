"""Train a student: `python launch/train.py --config=configs/smollm2_cpu.py --workdir=runs/demo`.

Any field can be overridden: `--config.grpo.kl_coef=0.1`. The same command again resumes from the last checkpoint.
Exit code: 0 done, 2 a mistake in flags, data or model, 3 stopped by a signal after saving.
"""

from absl import flags
from ml_collections import config_flags

from data_pipeline.load import DataError, make_stream, read_sample, read_split
from srl_jax import cli
from srl_jax.config import validate
from srl_jax.floors import COMMON_TRACE_SAMPLE

_CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe: a file in configs/ with get_config().")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, metrics and the report go.")
flags.mark_flags_as_required(["config", "workdir"])


def main() -> int:
    config = _CONFIG.value
    validate(config)
    held_out = read_split(config.data.dir, config.eval.split)
    stream = make_stream(
        config.data.dir,
        "train",
        seed=config.seed,
        slice_weights=config.data.slice_weights or None,
        curriculum=config.data.curriculum,
        bucket=config.data.bucket,
        batch_size=config.data.prompts_per_step,
    )
    corpus = read_sample(config.data.dir, "train", COMMON_TRACE_SAMPLE)

    from srl_jax.train import train  # the accelerator stack, only once everything else is right

    return 0 if train(config, _WORKDIR.value, stream, held_out, corpus) else 3


if __name__ == "__main__":
    cli.run(main, DataError)
