"""A reward server's client, used like the RewardService that it stands for.

Connections are kept and reused.  What may pass (a server that restarts, is full or cannot be reached) is tried again
until `patience_s` is over, and then leaves the batch unscored, exactly as a failing sandbox does.  What will not pass
by itself (a wrong token, another reward or tokenizer, a request over the server's bounds) is a RemoteError.
"""

from __future__ import annotations

import contextlib
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

import httpx

from srl_jax.sandbox.service import Score, ScoreRequest
from srl_jax.sandbox.wire import Contract, RemoteError, WireError, decode_runners, decode_scores, encode_request

_PASSING = frozenset({408, 429, 500, 502, 503, 504})


@dataclass(frozen=True)
class ClientConfig:
    """`timeout_s` is what one attempt may take, `patience_s` all attempts at one batch together."""

    timeout_s: float = 150.0
    patience_s: float = 600.0
    first_pause_s: float = 0.2
    max_pause_s: float = 10.0
    max_pending_batches: int = 4


class RemoteRewardService:
    """Scores batches of completions on the server at `url`.  A context manager; thread-safe.

    With `execute` every well-formed completion is executed there and its report comes back; without, as the reward
    needs.  `connect` checks address, token and contract before any work depends on them.
    """

    def __init__(
        self, url: str, token: str, contract: Contract, *, execute: bool = False, config: ClientConfig | None = None
    ) -> None:
        self.config = config or ClientConfig()
        self._contract, self._execute = contract, execute
        self._http = httpx.Client(
            base_url=url,
            headers={"Authorization": f"Bearer {token}"},
            timeout=httpx.Timeout(self.config.timeout_s, connect=10.0),
            trust_env=False,  # no proxy of the environment's comes between
        )
        self._url = url
        self._batches = ThreadPoolExecutor(self.config.max_pending_batches, thread_name_prefix="reward-client")
        self._pending = threading.BoundedSemaphore(self.config.max_pending_batches)
        self._closed = threading.Event()
        self._counts: Counter[str] = Counter()
        self._counts_lock = threading.Lock()

    def __enter__(self) -> RemoteRewardService:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Drop what has not begun, end what waits for a server, close the connections."""
        self._closed.set()
        self._batches.shutdown(wait=True, cancel_futures=True)
        self._http.close()

    @property
    def counts(self) -> dict[str, int]:
        """Since the start: requests, malformed, unscored, not_executed (as RewardService), retries (of ours)."""
        with self._counts_lock:
            return dict(self._counts)

    def connect(self) -> frozenset[str]:
        """The server's test runners; RemoteError unless it answers, takes our token and means the same by a score."""
        try:
            self._post(encode_request([], self._contract, execute=self._execute), 0)
            return decode_runners(self._content(self._http.get("/v1/runners")))
        except (httpx.HTTPError, _Passing, WireError) as error:
            raise RemoteError(f"no reward server at {self._url}: {error or type(error).__name__}") from error

    def submit(self, items: Sequence[ScoreRequest]) -> Future[list[Score]]:
        """Score in the background; blocks while `max_pending_batches` batches are under way."""
        self._pending.acquire()
        try:
            future = self._batches.submit(self.score, list(items))
        except RuntimeError:
            self._pending.release()
            raise
        future.add_done_callback(lambda _: self._pending.release())
        return future

    def score(self, items: Sequence[ScoreRequest]) -> list[Score]:
        """One score per request, in order.  Raises RemoteError, CorruptRecord for a record that cannot be sent."""
        body = encode_request(items, self._contract, execute=self._execute)
        scores = self._score(body, len(items))
        self._count(
            requests=len(items),
            malformed=sum(score.reward is not None and score.reward.rejection is not None for score in scores),
            unscored=sum(score.reward is None for score in scores),
            not_executed=sum(score.unscored is not None for score in scores),
        )
        return scores

    def _score(self, body: bytes, count: int) -> list[Score]:
        deadline = time.monotonic() + self.config.patience_s
        pause = self.config.first_pause_s
        while True:
            try:
                return self._post(body, count)
            except (httpx.TransportError, _Passing, WireError) as error:
                reason = str(error) or type(error).__name__
            # Many clients of one server that restarts must not come back all at once.
            wait = random.uniform(pause / 2, pause)
            if time.monotonic() + wait > deadline or self._closed.wait(wait):
                return [Score(None, None, f"infrastructure: reward server {self._url}: {reason}")] * count
            self._count(retries=1)
            pause = min(2 * pause, self.config.max_pause_s)

    def _post(self, body: bytes, count: int) -> list[Score]:
        headers = {"Content-Type": "application/json"}
        return decode_scores(self._content(self._http.post("/v1/score", content=body, headers=headers)), count)

    def _content(self, response: httpx.Response) -> bytes:
        if response.status_code == httpx.codes.OK:
            return response.content
        said = response.text[:300]
        with contextlib.suppress(ValueError, KeyError, TypeError):
            said = json.loads(response.content)["error"]
        if response.status_code in _PASSING:
            raise _Passing(f"{response.status_code}: {said}")
        raise RemoteError(f"the reward server at {self._url} answered {response.status_code}: {said}")

    def _count(self, **counts: int) -> None:
        with self._counts_lock:
            self._counts.update(counts)


class _Passing(Exception):
    """An answer that another attempt may turn into scores."""
