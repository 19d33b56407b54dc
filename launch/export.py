"""Export a run's student: `python launch/export.py --workdir=runs/demo --form=merged --out=exported`.

--form=merged writes one model for transformers or any server that reads its files; --form=adapter writes a PEFT
adapter for the base model named by --base (default: the run's own model.source).
Exit code: 0 done, 2 a mistake in flags or run.
"""

from pathlib import Path

from absl import flags

from srl_jax import cli
from srl_jax.config import read_config

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.")
_OUT = flags.DEFINE_string("out", None, "Directory to write; must not exist or be empty.")
_FORM = flags.DEFINE_enum("form", "merged", ["merged", "adapter"], "One whole model, or the adapters alone.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of a merged model's weights.")
_BASE = flags.DEFINE_string("base", None, "Path or Hub name of the base model, written into an adapter.")
flags.mark_flags_as_required(["workdir", "out"])


def main() -> int:
    workdir, out = Path(_WORKDIR.value), Path(_OUT.value)
    config = read_config(workdir)
    settings = config.to_dict()

    from srl_jax.model.export import export_adapter, export_merged  # JAX, only once everything else is right
    from srl_jax.trained import open_trained

    with open_trained(config, workdir, spread=True) as (_, student, lora):
        model = (student.decoder, student.params, lora, student.tokenizer)
        if _FORM.value == "merged":
            export_merged(out, *model, dtype=_DTYPE.value, settings=settings)
        else:
            export_adapter(out, *model, base=_BASE.value or config.model.source, settings=settings)
    print(out)
    return 0


if __name__ == "__main__":
    cli.run(main)
