"""Stages on threads and on a real Ray cluster: the same results in the same order, also when a worker is killed."""

import os
import signal
import time
from pathlib import Path

import pytest

from data_pipeline.collect_traces import Collector
from data_pipeline.errors import DataError
from data_pipeline.executor import ATTEMPTS, LocalExecutor, RayExecutor, cut, in_order, open_executor, retried
from data_pipeline.quality import QualityConfig
from data_pipeline.stages import Judging, Kept, Scoring
from data_pipeline.tasks.catalogue import rule_named
from data_pipeline.tasks.generated import generate
from data_pipeline.teacher import Answer, OracleTeacher, TeacherMix
from srl_jax.records import encode_record
from srl_jax.sandbox.isolation import SandboxCrash
from srl_jax.sandbox.runner import Sandbox, SandboxConfig
from tests.fakes import HashEmbedder


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(SandboxConfig(slots=2)) as opened:
        yield opened


def shards():
    drafts = [generate(rule_named("python-rename-method"), index, 0, 300) for index in range(7)]
    with Collector(TeacherMix([OracleTeacher()], [1.0])) as collector:
        answers = list(collector.collect(drafts))
    answers[2] = Answer("<think>no", "t", cut="stray_text")
    answers[4] = Answer("As a language model,", "t")
    answers[5] = Answer(answers[6].text, "t")  # another task's answer
    return cut(list(zip(drafts, answers, strict=True)), 2)


def outcomes(executor):
    judging = Judging(2000)
    verdicts = [verdict for part in executor.run(judging, shards()) for verdict in part]
    kept = [
        Kept(draft.task, answer.text, verdict.trace.think, verdict.quality, verdict.env_report, answer.teacher)
        for (draft, answer), verdict in zip([pair for part in shards() for pair in part], verdicts, strict=True)
        if verdict.reason is None
    ]
    records = [row for part in executor.run(Scoring("t", HashEmbedder()), cut(kept, 2)) for row in part]
    return [verdict.reason for verdict in verdicts], [encode_record(record) for record in records]


def test_verdicts_come_in_order_and_keep_their_reasons(sandbox):
    reasons, records = outcomes(LocalExecutor(sandbox))
    assert reasons[:5] == [None, None, "malformed:stray_text", None, "malformed:missing_tag"]
    assert reasons[5].startswith(("action:", "wrong_diff")) and reasons[6] is None
    assert len(records) == 4


def test_only_a_few_shards_are_taken_ahead():
    taken = []

    def endless():
        for number in range(10**6):
            taken.append(number)
            yield number

    results = in_order(lambda shard: lambda: shard, endless(), workers=2)
    assert [next(results) for _ in range(3)] == [0, 1, 2] and len(taken) <= 10
    assert list(in_order(lambda shard: lambda: shard, range(3), workers=8)) == [0, 1, 2]


def test_low_quality_is_dropped_at_the_threshold(sandbox):
    draft, answer = shards()[0][0]
    idle = Answer(answer.text.replace(draft.think, "This is better, as everybody can see."), answer.teacher)
    judging = Judging(2000, QualityConfig(agreement=5.0, threshold=0.9))
    kept, dropped = judging(sandbox, [(draft, answer), (draft, idle)])
    assert kept.reason is None and kept.quality > 0.9
    assert dropped.reason == "low_quality" and dropped.quality < 0.5 and dropped.env_report["success"]


def test_an_executor_must_exist(sandbox):
    assert open_executor("local", sandbox).workers == 2
    with pytest.raises(DataError, match="--executor=slurm: must be local or ray"):
        open_executor("slurm", sandbox)


def test_a_crash_of_the_sandbox_is_retried_and_at_last_raised():
    results = iter([SandboxCrash("killed"), SandboxCrash("killed"), "fine"])

    def action():
        result = next(results)
        if isinstance(result, Exception):
            raise result
        return result

    assert ATTEMPTS == 3 and retried(action) == "fine"
    results = iter([SandboxCrash(str(number)) for number in range(9)])
    with pytest.raises(SandboxCrash, match="2"):
        retried(action)


# ------------------------------------------------------------------------------------------------------- on Ray


class Marked:
    """The judging stage; each shard leaves the process id of whoever works on it, and takes its time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, sandbox, shard):
        mark = self.folder / f"{shard[0][0].task.task_id.replace('/', '-')}.{os.getpid()}"
        mark.touch()
        time.sleep(0.5)
        return Judging(2000)(sandbox, shard)


@pytest.fixture(scope="module")
def cluster():
    pytest.importorskip("ray", reason="Ray is not installed: pip install -c third_party/constraints.txt ray")
    executor = RayExecutor(workers=3)
    yield executor
    executor.close()


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_ray_cluster_gives_the_same_bytes(cluster, sandbox):
    assert cluster.workers == 3
    assert outcomes(cluster) == outcomes(LocalExecutor(sandbox))


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_worker_killed_in_mid_run_changes_nothing(cluster, sandbox, tmp_path):
    plain = [verdict for part in LocalExecutor(sandbox).run(Judging(2000), shards()) for verdict in part]
    killed = []
    found = []
    for part in cluster.run(Marked(tmp_path), shards()):
        if not killed:  # the first shard is done: another is under way, and its worker dies
            running = {int(mark.suffix[1:]) for mark in tmp_path.iterdir()} - {os.getpid()}
            killed.append(max(running, key=lambda pid: _started(tmp_path, pid)))
            os.kill(killed[0], signal.SIGKILL)
        found += part
    assert found == plain
    workers = {int(mark.suffix[1:]) for mark in tmp_path.iterdir()}
    tried = [mark.stem for mark in tmp_path.iterdir()]
    assert killed[0] in workers and len(workers) >= 2
    assert len(tried) > len(set(tried)) == len(shards())  # the dead worker's shard was done again


def _started(folder: Path, pid: int) -> float:
    return max(mark.stat().st_mtime for mark in folder.glob(f"*.{pid}"))
