"""What a teacher is worth before a data set is built with it: some tasks asked, every answer judged and counted."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from data_pipeline.collect_traces import Collector
from data_pipeline.config import DataSetConfig
from data_pipeline.drift import Drift, Tally, compare
from data_pipeline.executor import Executor, cut
from data_pipeline.splits import split_rules
from data_pipeline.stages import Judging
from data_pipeline.tasks.catalogue import CATALOGUE
from data_pipeline.tasks.generated import generate
from data_pipeline.tasks.rule import Draft
from data_pipeline.teacher import Answer, NoAnswer
from data_pipeline.validate import Drop
from data_pipeline.write import replace_bytes

FILE = "survey.json"
_SHARD = 8


def tasks(config: DataSetConfig, count: int) -> list[Draft]:
    """`count` generated tasks of the training rules, the same ones a data set of this configuration begins with."""
    known = [rule for rule in CATALOGUE if rule.language in config.languages]
    rules = [rule for rule in split_rules(known, config.seed)["train"] if rule.scenes]
    rules = [rule for language in config.languages for rule in rules if rule.language == language]
    return [
        generate(rules[index % len(rules)], index // len(rules), config.seed, config.max_excerpt)
        for index in range(count if rules else 0)
    ]


def survey(config: DataSetConfig, collector: Collector, count: int, executor: Executor) -> Iterator[tuple[Draft, Any]]:
    """Asks and judges `count` tasks; yields (task, `validate.Verdict`), or (task, `NoAnswer`), as they are done."""
    drafts = tasks(config, count)
    answers = collector.collect(drafts)
    judging = Judging(config.max_trace)
    for part in cut(drafts, _SHARD):
        heard = [(draft, next(answers)) for draft in part]
        shards = [[pair] for pair in heard if isinstance(pair[1], Answer)]  # one each, so that all workers judge
        judged = iter([verdict for verdicts in executor.run(judging, shards) for verdict in verdicts])
        for draft, answer in heard:
            yield draft, answer if isinstance(answer, NoAnswer) else (answer, next(judged))


def count_up(judged: Iterable[tuple[Draft, Any]]) -> Tally:
    """The tally of a survey."""
    tally = Tally()
    for draft, outcome in judged:
        if isinstance(outcome, NoAnswer):
            tally.add(draft.task.slice, outcome.teacher, f"{Drop.NO_ANSWER}:{outcome.reason}")
        else:
            answer, verdict = outcome
            tally.add(draft.task.slice, answer.teacher, verdict.reason)
    return tally


def conclude(tally: Tally, folder: Path, context: Mapping[str, Any]) -> list[Drift]:
    """Writes the survey to `folder` and compares it with the one it replaces; that one is kept under a number."""
    path = folder / FILE
    drifts: list[Drift] = []
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        drifts = compare(Tally.from_list(before["tally"]), tally)
        earlier = len(list(folder.glob("survey-*.json")))
        replace_bytes(folder / f"survey-{earlier:03d}.json", path.read_bytes())
    value = {**context, "tally": tally.to_list(), "drift": [str(drift) for drift in drifts]}
    replace_bytes(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())
    return drifts
