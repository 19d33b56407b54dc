"""Rewards from Ray actors: the same scores, and a host that dies loses nothing.  Runs where ray is installed."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="ray is not installed (extra 'ray'): the cluster's tests are left out")

import ray

from srl_jax.config import TrainConfig
from srl_jax.rewards import RewardConfig
from srl_jax.sandbox.cluster import Cluster
from srl_jax.sandbox.hosting import open_host
from srl_jax.sandbox.service import RewardService, ScoreRequest
from srl_jax.sandbox.wire import Contract, RemoteError
from srl_jax.trace import parse_trace, render_trace
from tests.sandbox_soak import WordEmbedder, record

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
CONTRACT = Contract("tokenizer", RewardConfig())


class QuickHost:
    """A host without tokenizer and sandbox, which take long to open; the last test has the real one.

    It imports no JAX either (tests.fakes would), since each actor is a process that imports this module.
    """

    def __init__(self, config):
        self._service = RewardService(WordEmbedder(), lambda text: len(text.split()))
        self._slow = Path(config.data.dir)

    def about(self):
        return CONTRACT, frozenset({"unittest", str(os.getpid())})

    def score(self, items, execute):
        if (self._slow / "slow").exists():
            (self._slow / f"busy-{os.getpid()}").touch()
            time.sleep(3)
        return self._service.score(items)


@pytest.fixture(scope="module", autouse=True)
def ray_here(tmp_path_factory):
    # A short path: Ray puts sockets below it.
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=80 << 20)
    yield
    ray.shutdown()


@pytest.fixture
def config(tmp_path):
    config = TrainConfig()
    config.data.dir, config.sandbox.workers, config.model.source = str(tmp_path), 1, "random:tiny"
    return config


def items(count=4):
    found = []
    for number in range(count):
        task = record(number)
        other = render_trace(dataclasses.replace(parse_trace(task.trace), think=f"another thought {number}"))
        found += [ScoreRequest(text, task) for text in (task.trace, other, "malformed", "\ud800 lone")]
    return found


def test_the_same_as_here(config):
    with RewardService(WordEmbedder(), lambda text: len(text.split())) as local:
        expected = local.score(items())
    with Cluster(config, hosts=2, host=QuickHost) as cluster:
        assert cluster.connect(CONTRACT) == {"unittest"}, "what only one host has is not the cluster's"
        service = cluster.service(execute=False)
        assert service.score(items()) == expected
        assert service.submit(items()).result(60) == expected
        assert service.score([]) == []
        assert service.counts["requests"] == 32 and service.counts["malformed"] == 16
        with pytest.raises(RemoteError, match="tokenizer"):
            cluster.connect(Contract("another", RewardConfig()))


def test_a_host_that_dies_in_mid_batch_loses_nothing(config, tmp_path):
    (tmp_path / "slow").touch()
    with Cluster(config, hosts=2, host=QuickHost) as cluster:
        cluster.connect(CONTRACT)
        service = cluster.service(execute=False)
        future = service.submit(items())
        deadline = time.monotonic() + 30
        while not (busy := list(tmp_path.glob("busy-*"))) and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(int(busy[0].name.partition("-")[2]), signal.SIGKILL)
        (tmp_path / "slow").unlink()
        scores = future.result(90)
        assert service.counts["retries"] > 0
    with RewardService(WordEmbedder(), lambda text: len(text.split())) as local:
        assert scores == local.score(items())


def test_hosts_that_stay_away_leave_the_batch_unscored(config, tmp_path):
    (tmp_path / "slow").touch()
    with Cluster(config, hosts=1, host=QuickHost, timeout_s=0.3, retries=1) as cluster:
        scores = cluster.service(execute=False).score(items(1))
    assert all(score.reward is None and score.unscored.startswith("infrastructure") for score in scores)


def test_a_real_host_executes(config):
    with open_host(config) as here:
        contract, isolation = here.contract, here.isolation
    with Cluster(config, hosts=1) as cluster:
        assert "unittest" in cluster.connect(contract)
        task = record(0)
        answers = []
        service = cluster.service(execute=True)
        threads = [
            threading.Thread(target=lambda: answers.extend(service.score([ScoreRequest(task.trace, task)])))
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    assert [(score.reward.total, score.match_f1) for score in answers] == [(1.0, 1.0)] * 2
    assert all(score.report.success and score.report.isolation == isolation for score in answers)
