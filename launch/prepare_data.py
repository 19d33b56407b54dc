"""Build a data set: `python launch/prepare_data.py --config=configs/data_demo.py --out=data/demo`.

Any field can be overridden: `--config.train=100`. A run that was interrupted starts again; a data set that is there is
replaced only when the new one is complete. Exit code: 0 done, 2 a mistake in flags, configuration or target.
"""

from pathlib import Path

from absl import flags
from ml_collections import config_flags
from rich.console import Console
from rich.table import Table

from data_pipeline.config import DataSetConfig
from data_pipeline.errors import DataError
from data_pipeline.pipeline import prepare
from srl_jax import cli

_CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe: a file in configs/ with get_config().")
_OUT = flags.DEFINE_string("out", None, "Folder of the data set.")
flags.mark_flags_as_required(["config", "out"])


def main() -> int:
    manifest = prepare(_CONFIG.value, Path(_OUT.value))
    table = Table("split", "slice", "records", "wanted", title=f"{_OUT.value}: {manifest['dataset']}")
    for split, content in manifest["splits"].items():
        for name, entry in content["slices"].items():
            table.add_row(split, name, str(entry["records"]), str(entry["wanted"]))
    console = Console()
    console.print(table)
    for name, reasons in manifest["rejections"].items():
        console.print(f"{name}: dropped " + ", ".join(f"{count} {reason}" for reason, count in reasons.items()))
    for language in manifest["languages_left_out"]:
        console.print(f"notice: {language} left out, this machine cannot run its tests")
    return 0


if __name__ == "__main__":
    cli.run(main, DataError, section=DataSetConfig)
