"""Export a run's student: `python launch/export.py --workdir=runs/demo --form=merged --out=exported`.

--form=merged writes one model for transformers or any server that reads its files; --form=adapter writes a PEFT
adapter for the base model named by --base (default: the run's own model.source).
Exit code: 0 done, 2 a mistake in flags or run.
"""

import json
from pathlib import Path

from absl import flags

from srl_jax import cli
from srl_jax.config import ConfigError, TrainConfig

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.")
_OUT = flags.DEFINE_string("out", None, "Directory to write; must not exist or be empty.")
_FORM = flags.DEFINE_enum("form", "merged", ["merged", "adapter"], "One whole model, or the adapters alone.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of a merged model's weights.")
_BASE = flags.DEFINE_string("base", None, "Path or Hub name of the base model, written into an adapter.")
flags.mark_flags_as_required(["workdir", "out"])


def main() -> int:
    workdir, out = Path(_WORKDIR.value), Path(_OUT.value)
    if not (workdir / "config.json").is_file():
        raise ConfigError("", str(workdir), "holds no config.json, so it is not a run; give a --workdir of train.py")
    config = TrainConfig.from_dict(json.loads((workdir / "config.json").read_text()))
    settings = config.to_dict()
    config.eval.execute, config.reward.execution = False, 0.0  # nothing is run, so no sandbox is needed

    from srl_jax.checkpoint import CheckpointError  # the accelerator stack, only once everything else is right
    from srl_jax.model.export import export_adapter, export_merged
    from srl_jax.run import Run

    with Run(config, workdir, read_only=True) as run:
        if run.resume() is None:
            raise CheckpointError(f"{workdir}: no checkpoint to export; train first")
        model = (run.student.decoder, run.student.params, run.state.lora, run.student.tokenizer)
        if _FORM.value == "merged":
            export_merged(out, *model, dtype=_DTYPE.value, settings=settings)
        else:
            export_adapter(out, *model, base=_BASE.value or config.model.source, settings=settings)
    print(out)
    return 0


if __name__ == "__main__":
    cli.run(main)
