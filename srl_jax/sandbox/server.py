"""The reward service over HTTP, for hosts that must not run foreign code themselves.

    POST /v1/score   completions and their records in, scores out (wire.py); bearer token
    GET  /v1/runners the test runners that executions can use here; bearer token
    GET  /metrics    Prometheus text; bearer token
    GET  /healthz    200 while the server takes requests; no token, no content worth one

Everything a client sends is bounded before it is looked at: bytes of one body, bytes of all bodies at once, the time a
client may take to send its headers and its body, and how many requests wait.  What is over a bound gets an answer that
says so (413, 408, 503), never a silent hang.  Scores are pure functions of the request, so a client may repeat one.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import anyio
import anyio.to_thread
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily
from uvicorn.protocols.http.h11_impl import H11Protocol

from srl_jax.sandbox.service import RewardService
from srl_jax.sandbox.wire import Contract, WireError, decode_request, encode_scores

MIN_TOKEN_LENGTH = 16


@dataclass(frozen=True)
class ServerLimits:
    """`threads` requests are scored at once; up to `max_requests` are taken, the others wait inside the server.

    Clients read an answer after they have sent their body, so what is left of one that is refused is read and thrown
    away, for `discard_s` at most.
    """

    max_body_bytes: int = 32 << 20
    max_total_bytes: int = 512 << 20
    max_requests: int = 1024
    header_s: float = 30.0
    body_s: float = 30.0
    discard_s: float = 2.0
    threads: int = 4


class _Refused(Exception):
    """An answer other than 200, with the sentence that the client is shown."""

    def __init__(self, status: int, reason: str, **headers: str) -> None:
        super().__init__(reason)
        self.status, self.reason, self.headers = status, reason, headers


def make_app(
    services: Mapping[bool, RewardService],
    contract: Contract,
    *,
    token: str,
    runners: frozenset[str] = frozenset(),
    limits: ServerLimits | None = None,
) -> FastAPI:
    """The application.  `services[True]` executes every well-formed completion, `services[False]` as rewards need;
    `runners` is `Sandbox.runners`.

    Raises ValueError for a token too short to be a secret.
    """
    if len(token) < MIN_TOKEN_LENGTH:
        raise ValueError(f"the token has {len(token)} characters, must have at least {MIN_TOKEN_LENGTH}")
    limits = limits or ServerLimits()
    expected = f"Bearer {token}".encode()
    app = FastAPI(title="srl_jax reward server", openapi_url=None)
    registry = CollectorRegistry()
    answered = Counter("srl_reward_requests", "Scoring requests by HTTP status", ["status"], registry=registry)
    seconds = Histogram("srl_reward_request_seconds", "From the headers to the answer", registry=registry)
    under_way = Gauge("srl_reward_requests_under_way", "Requests taken and not yet answered", registry=registry)
    held = Gauge("srl_reward_body_bytes", "Bytes of bodies held", registry=registry)
    registry.register(_ServiceCounts(services))
    slots = anyio.CapacityLimiter(limits.threads)
    load = _Load()

    def authorise(request: Request) -> None:
        if not hmac.compare_digest(request.headers.get("authorization", "").encode(), expected):
            raise _Refused(401, "the bearer token is missing or wrong", **{"WWW-Authenticate": "Bearer"})

    def answer(body: bytes) -> bytes:
        try:
            asked = decode_request(body)
        except WireError as error:
            raise _Refused(400, str(error)) from error
        if difference := contract.difference(asked.contract):
            raise _Refused(409, f"server and client disagree: {difference}")
        return encode_scores(services[asked.execute].score(asked.items))

    async def take(request: Request) -> Response:
        authorise(request)
        if load.requests >= limits.max_requests:
            raise _Refused(503, f"{load.requests} requests are under way; come back later", **{"Retry-After": "1"})
        load.requests += 1
        body = bytearray()
        try:
            await _read(request, body, load, limits)
            return Response(
                await anyio.to_thread.run_sync(answer, bytes(body), limiter=slots), media_type="application/json"
            )
        finally:
            load.requests -= 1
            load.bytes -= len(body)

    @app.post("/v1/score")
    async def score(request: Request) -> Response:
        started = time.monotonic()
        try:
            response = await take(request)
        except _Refused as refusal:
            response = JSONResponse({"error": refusal.reason}, refusal.status, dict(refusal.headers))
        answered.labels(str(response.status_code)).inc()
        seconds.observe(time.monotonic() - started)
        return response

    @app.get("/v1/runners")
    async def known_runners(request: Request) -> Response:
        try:
            authorise(request)
        except _Refused as refusal:
            return JSONResponse({"error": refusal.reason}, refusal.status, dict(refusal.headers))
        return JSONResponse({"runners": sorted(runners)})

    @app.get("/healthz")
    async def healthz() -> Response:
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        try:
            authorise(request)
        except _Refused as refusal:
            return JSONResponse({"error": refusal.reason}, refusal.status, dict(refusal.headers))
        under_way.set(load.requests)
        held.set(load.bytes)
        return Response(generate_latest(registry), media_type="text/plain; version=0.0.4")

    return app


@dataclass
class _Load:
    """What is under way; touched by the event loop's thread alone."""

    requests: int = 0
    bytes: int = 0


async def _read(request: Request, body: bytearray, load: _Load, limits: ServerLimits) -> None:
    """Collect the body, counting it in `load` as it comes; raises _Refused over any bound."""
    too_large = _Refused(
        413, f"the body is over {limits.max_body_bytes} bytes; send fewer items at once", Connection="close"
    )
    announced = request.headers.get("content-length", "0")
    if not announced.isdecimal() or int(announced) > limits.max_body_bytes:
        await _discard(request, limits.discard_s)
        raise too_large
    try:
        async with asyncio.timeout(limits.body_s):
            async for chunk in request.stream():
                if len(body) + len(chunk) > limits.max_body_bytes:
                    await _discard(request, limits.discard_s)
                    raise too_large
                if load.bytes + len(chunk) > limits.max_total_bytes:
                    raise _Refused(503, "too many bytes are under way; come back later", **{"Retry-After": "1"})
                body += chunk
                load.bytes += len(chunk)
    except TimeoutError as error:
        raise _Refused(408, f"the body took longer than {limits.body_s} s", Connection="close") from error


async def _discard(request: Request, seconds: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            async for _ in request.stream():
                pass


class _ServiceCounts:
    """The services' own counts as a Prometheus collector."""

    def __init__(self, services: Mapping[bool, RewardService]) -> None:
        self._services = services

    def collect(self) -> Iterator[CounterMetricFamily]:
        family = CounterMetricFamily(
            "srl_reward_completions", "Counts of the reward service", labels=["count", "executing"]
        )
        for executing, service in self._services.items():
            for name, value in service.counts.items():
                family.add_metric([name, str(executing).lower()], value)
        yield family


def protocol(limits: ServerLimits) -> type[H11Protocol]:
    """Uvicorn's HTTP protocol, which waits for a request's headers for ever, with a bound on that wait."""

    class Bounded(H11Protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self.loop.call_later(limits.header_s, self._close_if_idle, None)

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self.loop.call_later(limits.header_s, self._close_if_idle, self.cycle)

        def _close_if_idle(self, served: object) -> None:
            # Still at the request that it had when the time began: nothing complete has come since.
            if self.cycle is served and not self.transport.is_closing():
                self.transport.close()

    return Bounded


def make_server(app: FastAPI, *, host: str, port: int, limits: ServerLimits | None = None) -> uvicorn.Server:
    """A server for `app`; `.run()` serves until SIGINT or SIGTERM, then finishes what it has taken."""
    limits = limits or ServerLimits()
    return uvicorn.Server(
        uvicorn.Config(
            app,
            host=host,
            port=port,
            http=protocol(limits),
            ws="none",
            lifespan="off",
            log_level="warning",
            access_log=False,
            server_header=False,
            backlog=2048,
            timeout_keep_alive=int(limits.header_s),
        )
    )
