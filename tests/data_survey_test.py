"""A survey of a teacher: tasks asked, answers judged in the real sandbox, counts, and drift since the one before."""

import json

import pytest

from data_pipeline.collect_traces import Collector, Spending
from data_pipeline.config import DataSetConfig
from data_pipeline.executor import LocalExecutor
from data_pipeline.limits import open_sandbox
from data_pipeline.raw_store import RawStore
from data_pipeline.survey import conclude, count_up, survey, tasks
from data_pipeline.teacher import Answer, NoAnswer, OracleTeacher, TeacherMix

CONFIG = DataSetConfig(languages=("python",))


class Sloppy(OracleTeacher):
    """Right for the first task, silent at the second, and wrong in its own way for all others."""

    name = version = "sloppy/1"

    def __init__(self, habit, cut=""):
        self.habit, self.cut, self.first = habit, cut, [draft.task.task_id for draft in tasks(CONFIG, 2)]

    def answer(self, draft):
        if draft.task.task_id == self.first[0]:
            return super().answer(draft)
        if draft.task.task_id == self.first[1]:
            raise NoAnswer(self.name, "timeout", attempts=6, prompt_tokens=0, wasted_tokens=0, cost_usd=0.0)
        return Answer(self.habit, self.name, cut=self.cut)


@pytest.fixture(scope="module")
def executor():
    with open_sandbox(2) as sandbox:
        yield LocalExecutor(sandbox)


def surveyed(executor, teacher, store):
    with Collector(TeacherMix([teacher], [1.0]), store) as collector:
        return count_up(survey(CONFIG, collector, 40, executor))


def test_counts_and_drift_are_those_of_what_was_said(executor, tmp_path):
    first = surveyed(executor, Sloppy("As a language model,"), RawStore(tmp_path / "a"))
    assert (first.judged, first.kept) == (40, 1)
    assert first.groups()["teacher sloppy/1"][1] == {"malformed:missing_tag": 38, "no_answer:timeout": 1}
    assert conclude(first, tmp_path, {"tasks": 40}) == []
    same = surveyed(executor, Sloppy("As a language model,"), RawStore(tmp_path / "a"))
    assert conclude(same, tmp_path, {"tasks": 40}) == []

    second = surveyed(executor, Sloppy("S", cut="stray_text"), RawStore(tmp_path / "b"))
    drifts = conclude(second, tmp_path, {"tasks": 40})
    assert {(drift.where, drift.reason, drift.before, drift.after) for drift in drifts} == {
        (where, reason, *shares)
        for where in ("slice python/generated", "teacher sloppy/1")
        for reason, shares in {
            "malformed:missing_tag": (0.95, 0.0),
            "malformed:stray_text": (0.0, 0.95),
        }.items()
    }
    value = json.loads((tmp_path / "survey.json").read_text())
    assert value["tally"] == second.to_list() and len(value["drift"]) == 4 and value["tasks"] == 40
    assert sorted(path.name for path in tmp_path.glob("survey-*")) == ["survey-000.json", "survey-001.json"]
    with RawStore(tmp_path / "b") as store:
        spent = Spending()
        for line in [*store.answers(), *store.failures()]:
            spent.add(line["teacher"], line)
        assert spent.to_dict()["sloppy/1"] == {
            "answers": 39, "failures": 1, "attempts": 45, "prompt_tokens": 0, "completion_tokens": 0,
            "wasted_tokens": 0, "cost_usd": 0.0,
        }  # fmt: skip


def test_the_tasks_are_those_a_data_set_begins_with():
    assert [draft.task.task_id for draft in tasks(CONFIG, 5)] == [draft.task.task_id for draft in tasks(CONFIG, 9)[:5]]
    assert {draft.task.language for draft in tasks(CONFIG, 9)} == {"python"}
    assert tasks(DataSetConfig(languages=("java",)), 0) == []
