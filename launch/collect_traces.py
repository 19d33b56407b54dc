"""Ask teachers for traces, judge them, count what is wrong:
`python launch/collect_traces.py --config=configs/data_demo.py --teacher=configs/teacher.yaml --store=data/teacher`.

Every answer is kept in --store for ever; the same command goes on where it was stopped, and prepare_data.py with the
same --teacher and --store uses what is there. Exit code: 0 done, 2 a mistake in flags, files or endpoint.
"""

from pathlib import Path

from absl import flags
from ml_collections import config_flags
from rich.console import Console
from rich.progress import track

from data_pipeline.collect_traces import open_collector, spending
from data_pipeline.config import DataSetConfig, validate
from data_pipeline.drift import report
from data_pipeline.errors import DataError
from data_pipeline.executor import LocalExecutor
from data_pipeline.limits import open_sandbox
from data_pipeline.raw_store import RawStore
from data_pipeline.survey import conclude, count_up, survey
from srl_jax import cli

_CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe of a data set, for its tasks.")
_TEACHER = flags.DEFINE_string("teacher", None, "Teachers, such as configs/teacher.yaml.")
_STORE = flags.DEFINE_string("store", None, "Folder of the answers.")
_TASKS = flags.DEFINE_integer("tasks", 200, "How many tasks.", lower_bound=1)
flags.mark_flags_as_required(["config", "teacher", "store"])


def main() -> int:
    config, folder = _CONFIG.value, Path(_STORE.value)
    validate(config)
    with open_sandbox(config.workers) as sandbox, open_collector(_TEACHER.value, folder) as asked:
        judged = survey(config, asked, _TASKS.value, LocalExecutor(sandbox))
        tally = count_up(track(judged, "ask and judge", total=_TASKS.value))
    with RawStore(folder) as store:
        spent = spending(store)
    drifts = conclude(tally, folder, {"tasks": _TASKS.value, "dataset": config.tag, "spending": spent})
    console = Console(soft_wrap=True)
    for line in report(tally):
        console.print(line, markup=False, highlight=False)
    for name, numbers in spent.items():
        console.print(name + ": " + ", ".join(f"{value:g} {what}" for what, value in numbers.items()), markup=False)
    for drift in drifts:
        console.print(f"warning: {drift}", markup=False)
    return 0


if __name__ == "__main__":
    cli.run(main, DataError, section=DataSetConfig)
