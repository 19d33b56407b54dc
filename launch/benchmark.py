"""Ours beside its floor and its peers, in turns: `python launch/benchmark.py --out=runs/bench --compare=hf,trl,tunix`.

Writes <out>/results.jsonl and <out>/results.md. Interrupted, the same command goes on with the round it was in. Peers
come with `make bench`; one that is not installed, or fails, keeps its row and says why. Times on a busy machine are
worth little: run it alone.
"""

import os
import shlex
import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from srl_jax import cli

_OUT = flags.DEFINE_string("out", "runs/bench", "Where rounds and results are kept.")
_PARTS = flags.DEFINE_list("parts", ["workloads"], "Among workloads, reward, grammar, tags, ablation.")
_WORKLOAD = flags.DEFINE_list("workload", ["w1", "w2", "w3"], "Among w1, w2, w3, tiny, gpu05b, gpu8b.")
_COMPARE = flags.DEFINE_list("compare", [], "Among hf, trl, tunix, and unforced: ours, a forced token at a time.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Alternating rounds of each race.", lower_bound=1)
_DATA = flags.DEFINE_string("data", "data/demo", "Data set whose dev split --parts=reward,tags read.")
_RECORDS = flags.DEFINE_integer("records", 32, "Dev records for --parts=reward,tags.", lower_bound=1)
_CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe whose steps --parts=reward takes.")


def main() -> int:
    # Several systems share one accelerator, so none may take all of its memory at the start.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    # Only here, since every worker process imports this file: those of torch need nothing of JAX.
    from data_pipeline.load import read_sample
    from srl_jax.bench import parts

    parts.run(
        parts.Request(
            out=Path(_OUT.value),
            parts=_PARTS.value,
            workloads=_WORKLOAD.value,
            compare=_COMPARE.value,
            rounds=_ROUNDS.value,
            command=shlex.join(["python", *sys.argv]),
            records=lambda: read_sample(_DATA.value, "dev", _RECORDS.value),
            config=_CONFIG.value,
        )
    )
    return 0


if __name__ == "__main__":
    from data_pipeline.errors import DataError
    from srl_jax.bench.worker import PartFailed

    cli.run(main, DataError, PartFailed)
