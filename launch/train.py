"""Train a student: `python launch/train.py --config=configs/smollm2_cpu.py --workdir=runs/demo`.

Any field can be overridden: `--config.grpo.kl_coef=0.1`. The same command again resumes from the last checkpoint.
`--reproduce=runs/demo --workdir=runs/again` repeats a run by its directory, and says whether it came out the same.
On several hosts the same command on each, with `--coordinator_address=host0:1234 --num_processes=2 --process_id=0`.
Exit code: 0 done, 2 a user's mistake, 3 stopped by a signal after saving, 4 not reproduced, 5 lost another host.
"""

import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from data_pipeline.load import DataError, make_episodes, make_stream, read_sample, read_split
from srl_jax import cli
from srl_jax.config import TrainConfig, read_config, validate
from srl_jax.floors import COMMON_TRACE_SAMPLE
from srl_jax.replay import ReplayError, replay_stream

_CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe: a file in configs/ with get_config().")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, metrics and the report go.")
_REPRODUCE = flags.DEFINE_string("reproduce", None, "Directory of a run to repeat, instead of --config.")
flags.mark_flag_as_required("workdir")
flags.register_multi_flags_validator(
    ["config", "reproduce"],
    lambda given: (given["config"] is None) != (given["reproduce"] is None),
    "give either --config, a recipe, or --reproduce, the directory of a run",
)
cli.define_host_flags()


def main() -> int:
    repeats = Path(_REPRODUCE.value) if _REPRODUCE.value else None
    config: TrainConfig = read_config(repeats) if repeats else _CONFIG.value
    validate(config)
    split = cli.join_hosts(config)
    held_out = read_split(config.data.dir, config.eval.split)
    if config.method == "replay":
        stream = replay_stream(config.replay.dir, shuffle=config.replay.shuffle, seed=config.seed)
    else:
        d, make = config.data, make_episodes if config.plays_episodes else make_stream
        stream = make(
            d.dir, "train", seed=config.seed, slice_weights=d.slice_weights or None, curriculum=d.curriculum,
            bucket=d.bucket, batch_size=d.prompts_per_step // split.get("hosts", 1), **split,
        )  # fmt: skip
    corpus = read_sample(config.data.dir, "train", COMMON_TRACE_SAMPLE)

    from srl_jax.train import NotReproduced, train  # the accelerator stack, only once everything else is right

    try:
        return 0 if train(config, _WORKDIR.value, stream, held_out, corpus, repeats=repeats) else 3
    except NotReproduced as difference:
        print(difference, file=sys.stderr)
        return 4


if __name__ == "__main__":
    cli.run(main, DataError, ReplayError)
