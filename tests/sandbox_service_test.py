"""The reward service: every request answered once, in order, and infrastructure never mistaken for the policy."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from srl_jax.embedding import load_embedder
from srl_jax.records import SCHEMA_VERSION, SourceFile, Task, TeacherRecord, TestSpec, Versions
from srl_jax.rewards import REWARD_VERSION, RewardConfig
from srl_jax.sandbox import EngineResult, EnvReport, Sandbox, SandboxConfig, SandboxCrash, SandboxUnavailable, Status
from srl_jax.sandbox.service import RewardService, Score, ScoreRequest, ServiceConfig, execution_key
from srl_jax.trace import Action, Rejection, StateUpdate, Trace, render_trace

ACTION = Action("python", "old($X)", "new($X)", ("app.py",))
STATE = StateUpdate(("rename old",), ("keep tests",), (), ("run tests",))
FILES = (
    SourceFile("app.py", "def new(x):\n    return x\n\n\ndef f(x):\n    return old(x)\n"),
    SourceFile(
        "tests/test_app.py",
        "import unittest\nfrom app import f\n\n\nclass T(unittest.TestCase):\n    def test_f(self):\n"
        "        self.assertEqual(f(1), 1)\n",
    ),
)
TASK = Task(
    task_id="t1", instruction="rename old to new", language="python", slice="python", rule="rename", difficulty=1,
    source="generated", files=FILES, context=FILES[:1], prior_state=StateUpdate.empty(),
    tests=TestSpec("unittest", ("tests.test_app.T.test_f",), ("tests/test_app.py",)),
    expected=(SourceFile("app.py", FILES[0].text.replace("old(x)", "new(x)")),),
)  # fmt: skip
THINK = "The old call is gone, so rename it."


class WordEmbedder:
    """A stand-in that counts words into 384 buckets; test_the_real_embedder_agrees has the real one."""

    def __init__(self):
        self.calls: list[list[str]] = []

    def embed(self, texts):
        self.calls.append(list(texts))
        rows = np.zeros((len(texts), 384), np.float32)
        for row, text in zip(rows, texts, strict=True):
            for word in text.split():
                row[sum(map(ord, word)) % 384] += 1
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def teacher_record(embedder, **changes):
    return TeacherRecord(
        task=dataclasses.replace(TASK, **changes),
        trace=render_trace(Trace(THINK, ACTION, STATE)),
        think_embedding=embedder.embed([THINK])[0],
        trace_quality=1.0,
        env_report={},
        versions=Versions(SCHEMA_VERSION, "test", REWARD_VERSION),
        teacher="catalogue",
    )


def completion(think=THINK, action=ACTION, state=STATE):
    return render_trace(Trace(think, action, state))


def words(text):
    return len(text.split())


def report(success=True, status=Status.OK):
    return EnvReport(success, status, "", "", 1, 0, "not_run", (), (), "", None, 0.1, "a fake")


def descendants(pid):
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = task.read_text().split()
        except OSError:
            continue  # the thread is gone
        for child in children:
            found += [int(child), *descendants(int(child))]
    return found


def comm(pid):
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


class FakeSandbox:
    """Executes by calling `answer`; the real sandbox stands in TestRealExecution."""

    def __init__(self, answer, slots=2):
        self.config = SandboxConfig(slots=slots)
        self.answer = answer
        self.calls = 0
        self._lock = threading.Lock()

    def execute(self, action, files, *, tests, expected):
        with self._lock:
            self.calls += 1
            call = self.calls
        return self.answer(call)

    def apply(self, action, files, *, protected):
        return EngineResult(Status.OK, files, places=frozenset({("app.py", 0, 1)}))


@pytest.fixture
def record():
    return teacher_record(WordEmbedder())


def service(sandbox=None, reward=None, **config):
    return RewardService(
        WordEmbedder(), words, reward=reward or RewardConfig(), sandbox=sandbox, config=ServiceConfig(**config)
    )


class TestScores:
    def test_in_order_and_once_each(self, record):
        texts = [completion(), "nonsense", completion(action=dataclasses.replace(ACTION, replacement="newer($X)")), ""]
        with service() as rewards:
            scores = rewards.score([ScoreRequest(text, record) for text in texts])
        assert [score.reward.total for score in scores][:2] == [1.0, -0.2]
        assert scores[1].reward.rejection is Rejection.MISSING_TAG
        assert scores[1].reward.action is None
        # lev("newer($X)", "new($X)") = 1 - 2/9; the other three of four fields are equal.
        assert scores[2].reward.action == pytest.approx(0.3 + 0.7 * (3 + 7 / 9) / 4)
        assert scores[3].reward.total == -0.2
        assert all(score.report is None and score.unscored is None for score in scores)

    def test_an_empty_batch(self):
        with service() as rewards:
            assert rewards.score([]) == []

    def test_thinks_are_embedded_once_per_batch_and_only_when_they_differ(self, record):
        with service() as rewards:
            rewards.score([ScoreRequest(completion(think=t), record) for t in (THINK, "a b", "a b", "c")])
            assert rewards._embedder.calls == [["a b", "c"]]

    def test_lengths_are_the_callers_tokens(self, record):
        # 24 words against 8: 24 / (1.5 * 8) - 1 = 1, so the penalty is 0.2, and the cosine of a repetition is 1.
        with service() as rewards:
            score = rewards.score([ScoreRequest(completion(think=" ".join([THINK] * 3)), record)])[0]
        assert score.reward.brevity == pytest.approx(0.2)
        assert score.reward.think == pytest.approx(0.8)

    def test_submit_answers_the_same_later(self, record):
        items = [ScoreRequest(completion(), record), ScoreRequest("x", record)]
        with service() as rewards:
            futures = [rewards.submit(items) for _ in range(3)]
            assert all(future.result() == rewards.score(items) for future in futures)

    def test_submit_waits_when_too_much_is_pending(self, record):
        gate = threading.Event()
        slow = FakeSandbox(lambda call: gate.wait(5) and report())
        with service(slow, max_pending_batches=2, cache_entries=0) as rewards:
            items = [ScoreRequest(completion(), record)]
            futures = [rewards.submit(items) for _ in range(2)]
            third = threading.Thread(target=lambda: futures.append(rewards.submit(items)))
            third.start()
            third.join(0.2)
            assert third.is_alive()
            gate.set()
            third.join(5)
            assert len(futures) == 3
            assert all(future.result()[0].report for future in futures)

    def test_a_batch_uses_the_slots_that_the_one_before_has_left(self, record):
        both = threading.Barrier(2, timeout=5)  # broken, and the future's result with it, where only one comes
        with service(FakeSandbox(lambda call: both.wait() is not None and report()), cache_entries=0) as rewards:
            futures = [rewards.submit([ScoreRequest(completion(), record)]) for _ in range(2)]
            assert all(future.result()[0].report for future in futures)

    def test_an_execution_weight_needs_a_sandbox(self):
        with pytest.raises(ValueError, match="execution"):
            service(reward=RewardConfig(execution=0.2))

    @pytest.mark.parametrize("bad", [{"deadline_s": 0}, {"retries": -1}, {"max_pending_batches": 0}])
    def test_bad_configuration_is_named(self, bad):
        with pytest.raises(ValueError, match=next(iter(bad))):
            ServiceConfig(**bad)

    def test_the_real_embedder_agrees(self, record):
        real = load_embedder()
        record = dataclasses.replace(record, think_embedding=real.embed([THINK])[0])
        close, far = "old no longer exists; rename the call", "Bananas are yellow."
        with RewardService(real, words) as rewards:
            scores = rewards.score([ScoreRequest(completion(think=t), record) for t in (THINK, close, far)])
        thinks = [score.reward.think for score in scores]
        assert thinks[0] == 1.0
        assert thinks[0] > thinks[1] > 0.4 > thinks[2] >= 0


class TestInfrastructure:
    WITH_EXECUTION = RewardConfig(execution=0.2, action_weight=0.4, state_weight=0.2)

    def test_a_crash_is_retried(self, record):
        def answer(call):
            if call < 3:
                raise SandboxCrash("lost")
            return report()

        with service(FakeSandbox(answer), self.WITH_EXECUTION, retries=2) as rewards:
            score = rewards.score([ScoreRequest(completion(), record)])[0]
            assert rewards.counts["retries"] == 2
        assert score.reward.total == 1.0
        assert score.report == report()

    @pytest.mark.parametrize(
        ("error", "calls"),
        [(SandboxCrash("lost"), 2), (OSError(11, "no process"), 2), (SandboxUnavailable("node", "none"), 1)],
    )
    def test_what_stays_broken_is_unscored_never_zero(self, record, error, calls):
        def answer(call):
            raise error

        sandbox = FakeSandbox(answer)
        items = [ScoreRequest(completion(), record), ScoreRequest("malformed", record)]
        with service(sandbox, self.WITH_EXECUTION, retries=1) as rewards:
            scores = rewards.score(items)
            assert rewards.counts["unscored"] == 1
        assert scores[0].reward is None
        assert scores[0].unscored.startswith("infrastructure")
        assert scores[1].reward.total == -0.2  # malformed text needs no sandbox
        assert sandbox.calls == calls

    def test_a_reward_that_does_not_need_execution_survives_its_loss(self, record):
        def answer(call):
            raise SandboxCrash("lost")

        with service(FakeSandbox(answer), retries=0) as rewards:
            score = rewards.score([ScoreRequest(completion(), record)])[0]
        assert (score.reward.total, score.report) == (1.0, None)
        assert score.unscored.startswith("infrastructure")

    def test_a_bad_repository_is_the_records_fault(self, record):
        def answer(call):
            raise ValueError("repository path '/etc' is not relative")

        with service(FakeSandbox(answer), self.WITH_EXECUTION) as rewards:
            score = rewards.score([ScoreRequest(completion(), record)])[0]
        assert score == Score(None, None, "record: repository path '/etc' is not relative")

    def test_the_deadline_is_kept(self, record):
        slow = FakeSandbox(lambda call: time.sleep(0.5) or report(), slots=1)
        items = [
            ScoreRequest(completion(action=dataclasses.replace(ACTION, replacement=f"new{i}($X)")), record)
            for i in range(8)
        ]
        with service(slow, self.WITH_EXECUTION, deadline_s=1.2) as rewards:
            started = time.monotonic()
            scores = rewards.score(items)
            assert time.monotonic() - started < 2
        assert [score.reward is None for score in scores] == [score.unscored is not None for score in scores]
        assert 1 <= sum(score.reward is not None for score in scores) <= 3
        assert slow.calls <= 4  # what was still queued at the deadline is not run any more

    def test_how_long_each_execution_waited_for_a_slot_is_told(self, record):
        sandbox = FakeSandbox(lambda call: time.sleep(0.3) or report(), slots=1)
        actions = [dataclasses.replace(ACTION, replacement=f"new{i}($X)") for i in range(3)]
        items = [ScoreRequest(text, record) for text in [*(completion(action=a) for a in actions), "malformed"]]
        with service(sandbox, self.WITH_EXECUTION) as rewards:
            waited = [score.queued_s for score in rewards.score(items)]
            again = [score.queued_s for score in rewards.score(items)]
        assert waited[0] >= 0 and waited[1] > waited[0] + 0.2 and waited[2] > waited[1] + 0.2 and waited[3] is None
        assert again == [None] * 4, "nothing was begun for these"
        with service(sandbox, self.WITH_EXECUTION, deadline_s=0.2) as rewards:
            _, late = rewards.score(items[:2])
        assert late.unscored.startswith("deadline") and late.queued_s > 0.1, "until it was given up"

    def test_the_verdict_counts(self, record):
        config = RewardConfig(execution=0.2, action_weight=0.4, state_weight=0.2)
        for success, total in ((True, 1.0), (False, 0.8)):
            with service(FakeSandbox(lambda call, success=success: report(success)), config) as rewards:
                assert rewards.score([ScoreRequest(completion(), record)])[0].reward.total == pytest.approx(total)


class TestCache:
    def test_equal_executions_run_once_even_at_once(self, record):
        sandbox = FakeSandbox(lambda call: time.sleep(0.1) or report())
        with service(sandbox) as rewards:
            items = [ScoreRequest(completion(think=f"thought {i}"), record) for i in range(6)]
            first = rewards.score(items)
            assert rewards.score(items) == first
            # Eleven executions; the teacher's matches are not asked for, since its action is the students'.
            assert rewards.counts["cached"] == 11
        assert sandbox.calls == 1

    def test_timeouts_and_failures_are_not_remembered(self, record):
        answers = [report(False, Status.TIMEOUT), SandboxCrash("lost"), report()]

        def answer(call):
            if isinstance(answers[call - 1], SandboxCrash):
                raise answers[call - 1]
            return answers[call - 1]

        sandbox = FakeSandbox(answer)
        with service(sandbox, retries=0) as rewards:
            scores = [rewards.score([ScoreRequest(completion(), record)])[0] for _ in range(4)]
        assert [s.report and s.report.status for s in scores] == [Status.TIMEOUT, None, Status.OK, Status.OK]
        assert sandbox.calls == 3

    @pytest.mark.parametrize(
        "change",
        [
            {"files": (*FILES, SourceFile("x.py", ""))},
            {"expected": ()},
            {"tests": None},
            {"tests": dataclasses.replace(TASK.tests, expected_ids=("other",))},
        ],
    )
    def test_the_key_covers_all_that_matters(self, change):
        assert execution_key(ACTION, TASK) != execution_key(ACTION, dataclasses.replace(TASK, **change))
        assert execution_key(ACTION, TASK) == execution_key(ACTION, dataclasses.replace(TASK, task_id="t2"))
        assert execution_key(ACTION, TASK) != execution_key(dataclasses.replace(ACTION, pattern="old($Y)"), TASK)

    def test_the_cache_is_bounded(self, record):
        sandbox = FakeSandbox(lambda call: report())
        with service(sandbox, cache_entries=2) as rewards:
            for name in ("a", "b", "c", "a"):
                action = dataclasses.replace(ACTION, replacement=f"{name}($X)")
                rewards.score([ScoreRequest(completion(action=action), record)])
        assert sandbox.calls == 4


class TestMatchF1:
    """The teacher matches old(x) alone, once; broader patterns match more places."""

    GATED = RewardConfig(match_gate=0.8)

    def scores(self, record, patterns, config):
        actions = [dataclasses.replace(ACTION, pattern=p, replacement=r) for p, r in patterns]
        with Sandbox(SandboxConfig(slots=2)) as sandbox, service(sandbox, config) as rewards:
            return rewards.score([ScoreRequest(completion(action=a), record) for a in actions] + [
                ScoreRequest("malformed", record)
            ])  # fmt: skip

    def test_is_reported_and_gates_the_action_part(self):
        more = SourceFile("app.py", FILES[0].text + "\n\ndef g(x):\n    return id(x) + abs(x)\n")
        record = teacher_record(WordEmbedder(), files=(more, FILES[1]), expected=(), tests=None)
        patterns = [("old($X)", "new($X)"), ("old(x)", "new(x)"), ("$F($X)", "new($X)"), ("gone($X)", "new($X)")]
        free = self.scores(record, patterns, RewardConfig())
        gated = self.scores(record, patterns, self.GATED)
        broad = 2 * 1 / (1 + 3)  # `$F($X)` matches the teacher's one place and two others
        assert [score.match_f1 for score in free] == pytest.approx([1.0, 1.0, broad, 0.0, None])
        assert [score.match_f1 for score in gated] == [score.match_f1 for score in free]
        assert [score.match_precision for score in free] == pytest.approx([1.0, 1.0, 1 / 3, 0.0, None])
        assert [score.match_recall for score in free] == [1.0, 1.0, 1.0, 0.0, None]
        for one, other, factor in zip(free[:4], gated[:4], (1, 1, broad / 0.8, 0), strict=True):
            assert other.reward.action == one.reward.action
            lost = 0.5 * one.reward.action * (1 - factor)
            assert other.reward.total == pytest.approx(one.reward.total - lost)
        assert gated[4].reward.total == -0.2

    def test_a_gate_needs_a_sandbox(self):
        with pytest.raises(ValueError, match="match_gate"):
            service(reward=self.GATED)

    @pytest.mark.parametrize("action", [dataclasses.replace(ACTION, replacement="newer($X)"), ACTION])
    def test_a_teacher_that_times_out_leaves_the_item_unscored(self, record, action):
        slow = FakeSandbox(lambda call: report(False, Status.TIMEOUT) if action == ACTION else report())
        slow.apply = lambda action, files, protected: EngineResult(Status.TIMEOUT, files)
        with service(slow, self.GATED, retries=1) as rewards:
            score = rewards.score([ScoreRequest(completion(action=action), record)])[0]
        assert score.reward is None
        assert "teacher" in score.unscored


class TestRealExecution:
    def test_right_wrong_and_malformed(self, record):
        wrong = dataclasses.replace(ACTION, replacement="newer($X)")
        nothing = dataclasses.replace(ACTION, pattern="nothing($X)")
        texts = [completion(), completion(action=wrong), completion(action=nothing), "malformed"]
        config = RewardConfig(execution=0.2, action_weight=0.4, state_weight=0.2)
        with Sandbox(SandboxConfig(slots=2)) as sandbox, service(sandbox, config) as rewards:
            scores = rewards.score([ScoreRequest(text, record) for text in texts])
        assert [score.report and score.report.success for score in scores] == [True, False, False, None]
        assert scores[0].reward.total == pytest.approx(1.0)
        assert scores[1].report.tests_failed == ("tests.test_app.T.test_f",)
        assert scores[2].report.status is Status.NO_MATCH
        assert scores[3].reward.total == -0.2

    def test_killing_sandboxes_at_random_loses_and_falsifies_nothing(self, record):
        stop = threading.Event()
        killed = []

        def reaper():
            # Every bwrap of this process, and its namespace's init, at random moments; fewer than the retries of one
            # item, so that however slow the machine is, nothing runs out of them.
            dice = random.Random(0)
            while len(killed) < 12 and not stop.wait(dice.uniform(0.1, 0.5)):
                ours = [pid for pid in descendants(os.getpid()) if comm(pid).startswith(("bwrap", "python"))]
                if ours:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(dice.choice(ours), signal.SIGKILL)
                        killed.append(1)

        items = [
            ScoreRequest(completion(action=dataclasses.replace(ACTION, replacement=f"new($X) or {i}")), record)
            for i in range(16)
        ] + [ScoreRequest("malformed", record)]
        config = RewardConfig(execution=0.2, action_weight=0.4, state_weight=0.2)
        with Sandbox(SandboxConfig(slots=2)) as sandbox, service(sandbox, config, retries=20) as rewards:
            calm = rewards.score(items)
        thread = threading.Thread(target=reaper)
        with Sandbox(SandboxConfig(slots=2)) as sandbox, service(sandbox, config, retries=20) as rewards:
            thread.start()
            try:
                scores = rewards.score(items)
            finally:
                stop.set()
                thread.join()
            retries = rewards.counts["retries"]
        assert killed
        assert retries
        # The supervisor's child is a python too: a test run whose child was shot is cut, which is no lie about it.
        for score, before in zip(scores, calm, strict=True):
            assert score.reward == before.reward or (score.report and score.report.tests == "cut")

    def test_many_threads_get_their_own_answers(self, record):
        def one(i):
            action = dataclasses.replace(ACTION, replacement=f"new({i}) or new($X)")
            with_action = ScoreRequest(completion(action=action), record)
            score = rewards.score([with_action])[0]
            return f"new({i}) or new(x)" in score.report.diff

        with Sandbox(SandboxConfig(slots=2)) as sandbox, service(sandbox) as rewards, ThreadPoolExecutor(6) as pool:
            assert all(pool.map(one, range(12)))
