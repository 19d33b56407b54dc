"""Episodes on one's own state: errors stay where they were made, and each step is judged by its own part."""

import dataclasses

import pytest

from srl_jax.episodes import PROMPT_TOO_LONG, play, whole_episodes
from srl_jax.records import EpisodeStep, SourceFile, TeacherRecord, TestSpec
from srl_jax.sandbox import Sandbox
from srl_jax.sandbox.isolation import SandboxCrash
from srl_jax.sandbox.service import RewardService, Score, ScoreRequest
from srl_jax.trace import Action, StateUpdate, Trace, parse_trace, render_trace
from tests.fakes import HashEmbedder, teacher_record, tiny_config

STEPS = 3
SHOWN = "def run():\n    return old(1)\n"
MODULE = "def old(x):\n    return x\n\n\ndef new(x):\n    return x + 1\n\n\n" + SHOWN
TEST = (
    "import unittest\nfrom src.m{0} import run\n\n\nclass T{0}(unittest.TestCase):\n"
    "    def test_run(self):\n        self.assertEqual(run(), 2)\n"
)


def state(step: int) -> StateUpdate:
    return StateUpdate(tuple(f"m{n} calls new" for n in range(1, step + 1)), (), (), ("run tests",))


def trace(step: int, **changes) -> str:
    action = Action("python", "return old($X)", "return new($X)", (f"src/m{step}.py",))
    return render_trace(Trace("new adds one", dataclasses.replace(action, **changes), state(step)))


def an_episode(name: str = "e", steps: int = STEPS, tests: bool = True) -> list[TeacherRecord]:
    """Step n has run() of src/m<n>.py call new instead of old, which its own test asks for."""
    files = {f"src/m{n}.py": MODULE for n in range(1, steps + 1)} | {"src/__init__.py": "", "tests/__init__.py": ""}
    files |= {f"tests/test_m{n}.py": TEST.format(n) for n in range(1, steps + 1)}
    records = []
    for step in range(1, steps + 1):
        path = f"src/m{step}.py"
        done = [f"tests/test_m{n}.py" for n in range(1, step + 1)]
        ids = tuple(f"tests.test_m{n}.T{n}.test_run" for n in range(1, step + 1))
        after = MODULE.replace("return old", "return new")
        task = dataclasses.replace(
            teacher_record().task, task_id=f"{name}/{step}", instruction=f"In {path}: call new.", rule="call-new",
            slice="python/episodes", files=tuple(SourceFile(*file) for file in files.items()),
            context=(SourceFile(path, SHOWN),), prior_state=state(step - 1), expected=(SourceFile(path, after),),
            tests=TestSpec("unittest", ids, tuple(done)) if tests else None, episode=EpisodeStep(name, step, steps),
        )  # fmt: skip
        records.append(dataclasses.replace(teacher_record(), task=task, trace=trace(step)))
        files[path] = after
    return records


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox() as opened:
        yield opened


@pytest.fixture(scope="module")
def service(sandbox):
    with RewardService(HashEmbedder(), lambda text: len(text.split()), sandbox=sandbox) as opened:
        yield opened


def played(sandbox, service, said: dict[int, str], episodes=None, **options):
    """Plays with the teacher's answers but for the steps in `said`; also what was asked."""
    asked = []

    def answers(records):
        asked.extend(record.task for record in records)
        texts = [said.get(record.task.episode.step, record.trace) for record in records]
        return list(zip(texts, service.score(list(map(ScoreRequest, texts, records))), strict=True))

    return play(episodes or [an_episode()], answers, sandbox, tiny_config(), **options), asked


def test_the_teacher_succeeds_and_is_asked_what_the_data_set_asks(sandbox, service):
    items, asked = played(sandbox, service, {})
    assert [(item["step"], item["success"], item["reward"]) for item in items] == [(n, True, 1.0) for n in (1, 2, 3)]
    given = [record.task for record in an_episode()]
    for own, task in zip(asked, given, strict=True):
        assert {f.path: f.text for f in own.files} == {f.path: f.text for f in task.files}
        assert (own.context, own.prior_state, own.expected) == (task.context, task.prior_state, task.expected)
    assert [task.tests.expected_ids for task in asked] == [(f"tests.test_m{n}.T{n}.test_run",) for n in (1, 2, 3)]


def test_a_failed_step_stays_failed_and_costs_the_others_nothing(sandbox, service):
    items, asked = played(sandbox, service, {1: trace(1, pattern="return gone($X)")})
    assert [(item["success"], item["status"]) for item in items] == [(False, "no_match"), (True, "ok"), (True, "ok")]
    assert all({f.path: f.text for f in task.files}["src/m1.py"] == MODULE for task in asked)


def test_the_state_that_comes_back_is_the_one_that_was_written(sandbox, service):
    forgetful = parse_trace(trace(1))
    forgetful = render_trace(dataclasses.replace(forgetful, state=StateUpdate(("I forgot",), (), (), ())))
    items, asked = played(sandbox, service, {1: forgetful})
    assert asked[1].prior_state == StateUpdate(("I forgot",), (), (), ())
    assert items[0]["success"] and items[0]["state"] < 1.0, "the code is right, the state is not"


def test_what_was_broken_too_much_is_shown_and_found_broken(sandbox, service):
    # One step rewrites every file: its own comes out right, but more has changed; the next has nothing left to do.
    items, asked = played(sandbox, service, {1: trace(1, files=("src/*.py",))})
    assert [item["success"] for item in items] == [False, False, False]
    assert [item["status"] for item in items] == ["ok", "no_match", "no_match"]
    assert asked[1].context[0].text == SHOWN.replace("old", "new")


def test_a_malformed_answer_changes_nothing(sandbox, service):
    items, asked = played(sandbox, service, {2: "no trace"})
    assert [item["rejection"] for item in items] == [None, "missing_tag", None]
    assert asked[2].prior_state == state(1) and items[1]["reward"] == -0.2
    config = tiny_config()
    assert items[1]["success"] is None and not config.eval.execute, "nobody asked for execution"


def test_a_prompt_that_does_not_fit_is_a_failure_without_a_reward(sandbox, service):
    items, asked = played(sandbox, service, {}, fits=lambda task: len(task.prior_state.decisions) != 1)
    assert [item["success"] for item in items] == [True, False, False]
    assert items[1]["status"] == PROMPT_TOO_LONG and items[1]["reward"] is None
    assert [task.episode.step for task in asked] == [1], "the state stays, so the third does not fit either"


def test_what_could_not_be_judged_is_not_known(sandbox):
    answers = lambda records: [(record.trace, Score(None, None, "infrastructure: gone")) for record in records]
    items = play([an_episode()], answers, sandbox, tiny_config())
    assert [(item["success"], item["reward"]) for item in items] == [(None, None)] * 3


def test_an_isolation_that_fails_once_is_tried_again_and_a_last_step_leads_nowhere(sandbox):
    class Shaky:
        tries = 0

        def apply(self, *given, **options):
            self.tries += 1
            if self.tries == 1:
                raise SandboxCrash("gone")
            return sandbox.apply(*given, **options)

    shaky = Shaky()
    answers = lambda records: [(record.trace, Score(None, None, "not asked")) for record in records]
    items = play([an_episode()], answers, shaky, tiny_config())
    assert len(items) == STEPS and shaky.tries == STEPS  # one failed, and nothing follows the last

    class Gone:
        def apply(self, *given, **options):
            raise SandboxCrash("gone")

    with pytest.raises(SandboxCrash):
        play([an_episode()], answers, Gone(), tiny_config())


def test_episodes_of_different_length_are_played_side_by_side(sandbox, service):
    items, asked = played(sandbox, service, {}, [an_episode("long"), an_episode("short", steps=2)])
    assert [task.task_id for task in asked] == ["long/1", "short/1", "long/2", "short/2", "long/3"]
    assert [item["episode_id"] for item in items] == ["long", "short", "long", "short", "long"]
    assert all(item["success"] for item in items)
    assert play([], lambda records: [], sandbox, tiny_config()) == []


def test_only_whole_episodes_are_played():
    whole, cut = an_episode("whole"), an_episode("cut")
    found = whole_episodes([cut[0], whole[2], teacher_record(), whole[0], cut[2], whole[1]])
    assert [[record.task.task_id for record in steps] for steps in found] == [["whole/1", "whole/2", "whole/3"]]
