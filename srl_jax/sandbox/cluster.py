"""Rewards from the hosts of a Ray cluster: an actor on each, used like the RewardService that it holds.

Needs the extra "ray".  A batch is cut by group over the actors; what a lost actor had in hand goes to another, and
Ray starts it anew.  What no actor could answer is unscored, exactly as where one sandbox fails.
"""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from types import TracebackType

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RaySystemError

from srl_jax.config import TrainConfig
from srl_jax.sandbox.hosting import open_host
from srl_jax.sandbox.service import Score, ScoreRequest
from srl_jax.sandbox.wire import Contract, RemoteError

MAX_PENDING_BATCHES = 4
_LOST = (RayActorError, RaySystemError, GetTimeoutError)


class Host:
    """What runs on another machine: `open_host`, kept open for the actor's life."""

    def __init__(self, config: TrainConfig) -> None:
        self._stack = ExitStack()  # kept: what it holds is closed when it goes
        self._host = self._stack.enter_context(open_host(config))

    def about(self) -> tuple[Contract, frozenset[str]]:
        """What its scores depend on, and the test runners it has."""
        return self._host.contract, self._host.runners

    def score(self, items: list[ScoreRequest], execute: bool) -> list[Score]:
        """One score per request, in order."""
        return self._host.services[execute].score(items)


class Cluster:
    """`hosts` actors, each with `config.sandbox.workers` slots and as many CPUs.  A context manager; thread-safe.

    `address` is an existing cluster's ("auto", "ray://host:10001"), None to begin one here.  `timeout_s` is what an
    actor may take for its part of a batch, its start included.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        hosts: int,
        address: str | None = None,
        timeout_s: float = 600.0,
        retries: int = 2,
        host: type = Host,
    ) -> None:
        if hosts < 1:
            raise ValueError(f"hosts is {hosts}, must be at least 1")
        self._timeout_s, self._retries = timeout_s, retries
        self._ours = not ray.is_initialized()
        if self._ours:
            ray.init(address=address, log_to_driver=False, include_dashboard=False if address is None else None)
        actor = ray.remote(num_cpus=config.sandbox.workers, max_restarts=-1, scheduling_strategy="SPREAD")(host)
        # Two batches at once, so that one's slow execution does not hold up another.
        self._actors = [actor.options(max_concurrency=2).remote(config) for _ in range(hosts)]
        self._turn = itertools.count()
        self.threads = ThreadPoolExecutor(MAX_PENDING_BATCHES, thread_name_prefix="reward-cluster")

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the actors, and the cluster where it was begun here."""
        self.threads.shutdown(wait=True, cancel_futures=True)
        for actor in self._actors:
            ray.kill(actor)
        if self._ours:
            ray.shutdown()

    def connect(self, contract: Contract) -> frozenset[str]:
        """The test runners that every host has; RemoteError unless all answer and mean the same by a score."""
        try:
            answers = ray.get([actor.about.remote() for actor in self._actors], timeout=self._timeout_s)
        except _LOST as error:
            raise RemoteError(f"a host of the cluster does not start: {error}") from error
        for theirs, _ in answers:
            if difference := contract.difference(theirs.to_dict()):
                raise RemoteError(f"a host of the cluster and this run disagree: {difference}")
        return frozenset.intersection(*[runners for _, runners in answers])

    def service(self, *, execute: bool) -> ClusterRewardService:
        """A service over these actors; with `execute` every well-formed completion is executed."""
        return ClusterRewardService(self, execute)

    def score(self, items: list[ScoreRequest], execute: bool) -> tuple[list[Score], int]:
        """(one score per request, in order; how often a part had to be asked again)."""
        parts = [list(part) for _, part in itertools.groupby(items, key=lambda item: id(item.record))]
        asked = [self._next().score.remote(part, execute) for part in parts]
        scores: list[Score] = []
        retries = 0
        for part, answer in zip(parts, asked, strict=True):
            for attempt in range(self._retries + 1):
                try:
                    scores += ray.get(answer, timeout=self._timeout_s)
                    break
                except _LOST as error:
                    if attempt == self._retries:
                        reason = f"infrastructure: a host of the cluster was lost: {type(error).__name__}"
                        scores += [Score(None, None, reason)] * len(part)
                        break
                    retries += 1
                    answer = self._next().score.remote(part, execute)
        return scores, retries

    def _next(self) -> ray.actor.ActorHandle:
        return self._actors[next(self._turn) % len(self._actors)]


class ClusterRewardService:
    """What training and evaluation ask of a reward service (service.ScoresCompletions), of a cluster's hosts."""

    def __init__(self, cluster: Cluster, execute: bool) -> None:
        self._cluster, self._execute = cluster, execute
        self._pending = threading.BoundedSemaphore(MAX_PENDING_BATCHES)
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    @property
    def counts(self) -> dict[str, int]:
        """Since the start: requests, malformed, unscored, not_executed (as RewardService), retries (of parts)."""
        with self._lock:
            return dict(self._counts)

    def submit(self, items: Sequence[ScoreRequest]) -> Future[list[Score]]:
        """Score in the background; blocks while MAX_PENDING_BATCHES are under way."""
        self._pending.acquire()
        try:
            future = self._cluster.threads.submit(self.score, list(items))
        except RuntimeError:
            self._pending.release()
            raise
        future.add_done_callback(lambda _: self._pending.release())
        return future

    def score(self, items: Sequence[ScoreRequest]) -> list[Score]:
        """One score per request, in order."""
        scores, retries = self._cluster.score(list(items), self._execute)
        with self._lock:
            self._counts.update(
                requests=len(items),
                malformed=sum(score.reward is not None and score.reward.rejection is not None for score in scores),
                unscored=sum(score.reward is None for score in scores),
                not_executed=sum(score.unscored is not None for score in scores),
                retries=retries,
            )
        return scores
