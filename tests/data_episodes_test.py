"""Episodes: each step starts from what the step before left, in files, tests and state, and executes."""

from collections import Counter

import pytest

from data_pipeline.tasks.catalogue import CATALOGUE
from data_pipeline.tasks.episodes import MAX_STEPS, episode
from data_pipeline.tasks.generated import RUNNERS
from data_pipeline.teacher import OracleTeacher
from data_pipeline.validate import validate
from srl_jax.records import EpisodeStep
from srl_jax.sandbox.runner import Sandbox, SandboxConfig
from srl_jax.tokenizer import render_prompt
from srl_jax.trace import parse_trace

LANGUAGES = ("python", "javascript", "typescript", "java")


def rules_of(language):
    return [rule for rule in CATALOGUE if rule.language == language]


def episodes(language, count):
    return [episode(rules_of(language), index, 3, 400) for index in range(count)]


@pytest.mark.parametrize("language", LANGUAGES)
def test_an_episode_has_two_to_five_steps_and_is_the_same_every_time(language):
    drawn = episodes(language, 60)
    assert drawn == episodes(language, 60)
    assert set(map(len, drawn)) == {2, 3, 4, MAX_STEPS}
    assert len({repr([draft.task for draft in drafts]) for drafts in drawn}) == 60
    kinds = Counter(len({draft.rule.name for draft in drafts}) == 1 for drafts in drawn)
    assert min(kinds[True], kinds[False]) >= 10, "sweeps of one rule and rounds of several"
    assert episode(rules_of(language), 0, 4, 400) != drawn[0]


@pytest.mark.parametrize("language", LANGUAGES)
def test_each_step_starts_from_what_the_step_before_left(language):
    for drafts in episodes(language, 40):
        tasks = [draft.task for draft in drafts]
        assert [task.episode for task in tasks] == [
            EpisodeStep(tasks[0].episode.episode_id, step, len(tasks)) for step in range(1, len(tasks) + 1)
        ]
        edited = [task.context[0].path for task in tasks]
        assert len(set(edited)) == len(edited)
        assert [item for item in tasks[0].prior_state.next_focus if item.startswith("edit ")] == [
            f"edit {path}" for path in edited
        ]
        for before, after, draft in zip(tasks, tasks[1:], drafts, strict=False):
            changed = {file.path: file.text for file in before.expected}
            assert {f.path: f.text for f in after.files} == {**{f.path: f.text for f in before.files}, **changed}
            assert after.prior_state == parse_trace(OracleTeacher().write(draft)).state
            if after.tests:
                assert set(before.tests.expected_ids) < set(after.tests.expected_ids), "earlier tests go on passing"


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_state_carries_decisions_and_closes_issues(language):
    for drafts in episodes(language, 40):
        last = parse_trace(OracleTeacher().write(drafts[-1])).state
        first = drafts[0].task.prior_state
        for draft in drafts:
            trace = parse_trace(OracleTeacher().write(draft))
            path = draft.task.context[0].path
            issue = f"{path} is outdated"
            assert issue in draft.task.prior_state.open_issues and issue not in trace.state.open_issues
            assert trace.state.decisions[-1] in last.decisions and set(first.decisions) <= set(last.decisions)
            assert len(set(trace.state.constraints)) == len(trace.state.constraints), "nothing is listed twice"
            assert issue in render_prompt(draft.task), "the carried state is shown"
        assert not [item for item in last.next_focus if item.startswith("edit ")]


def test_every_step_executes_on_the_files_before_it():
    with Sandbox(SandboxConfig(slots=1)) as sandbox:
        for language in LANGUAGES:
            if RUNNERS.get(language, "unittest") in sandbox.runners:
                for draft in next(drafts for drafts in episodes(language, 40) if len(drafts) == 3):
                    verdict = validate(draft, OracleTeacher().write(draft), sandbox, 1200)
                    assert verdict.reason is None, (draft.task.task_id, verdict)


def test_rules_that_fit_nowhere_make_no_episode():
    assert episode([], 0, 0, 400) == []
    broken = [rule for rule in rules_of("java") if not rule.scenes[0].stands_before]
    assert broken and episode(broken, 0, 0, 400) == []
