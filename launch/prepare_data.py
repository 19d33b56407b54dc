"""Build a data set: `python launch/prepare_data.py --config=configs/data_demo.py --out=data/demo`.

Any field can be overridden: `--config.train=100`. A build that was interrupted goes on; a data set that is there is
replaced only when the new one is complete. `--teacher=configs/teacher.yaml --store=data/teacher` asks teachers
instead of the catalogue's oracle; `--executor=ray` runs the stages on a cluster. Instead of building, `migrate`,
`rescore`, `verify` or `bench` as the first word works on the data set in --out. Exit code: 0 done, 2 a user's mistake.
"""

import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags
from rich.console import Console
from rich.table import Table

from data_pipeline import commands
from data_pipeline.collect_traces import open_collector
from data_pipeline.config import DataSetConfig
from data_pipeline.errors import DataError
from data_pipeline.pipeline import prepare
from srl_jax import cli

_CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe: a file in configs/ with get_config().")
_OUT = flags.DEFINE_string("out", None, "Folder of the data set.", required=True)
_TEACHER = flags.DEFINE_string("teacher", None, "Who writes the traces, such as configs/teacher.yaml.")
_STORE = flags.DEFINE_string("store", None, "Folder that keeps every answer of a teacher.")
_EXECUTOR = flags.DEFINE_string("executor", "local", "Where stages run: local or ray.")
_CLUSTER = flags.DEFINE_string("cluster", "", 'Address of a Ray cluster, such as "auto"; empty starts one here.')
_QUALITY = flags.DEFINE_string("quality", "", "rescore: weights and threshold, such as execution=0.5,threshold=0.7.")
_COMMAND = sys.argv.pop(1) if sys.argv[1:2] and sys.argv[1] in commands.COMMANDS else "build"


def main() -> int:
    out, console = Path(_OUT.value), Console(soft_wrap=True)
    if _COMMAND != "build":
        console.print(commands.run(_COMMAND, out, _QUALITY.value), markup=False)
        return 0
    if _CONFIG.value is None:
        raise DataError("--config is missing: name a recipe, such as --config=configs/data_demo.py")
    collector = open_collector(
        Path(_TEACHER.value) if _TEACHER.value else None, Path(_STORE.value) if _STORE.value else None
    )
    manifest = prepare(_CONFIG.value, out, collector=collector, executor=_EXECUTOR.value, cluster=_CLUSTER.value)
    table = Table("split", "slice", "records", "wanted", title=f"{out}: {manifest['dataset']}")
    for split, content in manifest["splits"].items():
        for name, entry in content["slices"].items():
            table.add_row(split, name, str(entry["records"]), str(entry["wanted"]))
    console.print(table)
    for name, reasons in manifest["rejections"].items():
        console.print(f"{name}: dropped " + ", ".join(f"{count} {reason}" for reason, count in reasons.items()))
    for language in manifest["languages_left_out"]:
        console.print(f"notice: {language} left out, this machine cannot run its tests")
    return 0


if __name__ == "__main__":
    cli.run(main, DataError, section=DataSetConfig)
