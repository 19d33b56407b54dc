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

import time
from collections.abc import Iterator, Mapping

import anyio
import anyio.to_thread
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily

from srl_jax.bounded_http import MIN_TOKEN_LENGTH, Load, Refused, ServerLimits, authorise
from srl_jax.sandbox.service import RewardService
from srl_jax.sandbox.wire import Contract, WireError, decode_request, encode_scores


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
    app = FastAPI(title="srl_jax reward server", openapi_url=None)
    registry = CollectorRegistry()
    answered = Counter("srl_reward_requests", "Scoring requests by HTTP status", ["status"], registry=registry)
    seconds = Histogram("srl_reward_request_seconds", "From the headers to the answer", registry=registry)
    under_way = Gauge("srl_reward_requests_under_way", "Requests taken and not yet answered", registry=registry)
    held = Gauge("srl_reward_body_bytes", "Bytes of bodies held", registry=registry)
    registry.register(_ServiceCounts(services))
    slots = anyio.CapacityLimiter(limits.threads)
    load = Load()

    def answer(body: bytes) -> bytes:
        try:
            asked = decode_request(body)
        except WireError as error:
            raise Refused(400, str(error)) from error
        if difference := contract.difference(asked.contract):
            raise Refused(409, f"server and client disagree: {difference}")
        return encode_scores(services[asked.execute].score(asked.items))

    async def take(request: Request) -> Response:
        authorise(request, token)
        async with load.taken(request, limits) as body:
            return Response(
                await anyio.to_thread.run_sync(answer, bytes(body), limiter=slots), media_type="application/json"
            )

    @app.post("/v1/score")
    async def score(request: Request) -> Response:
        started = time.monotonic()
        try:
            response = await take(request)
        except Refused as refusal:
            response = JSONResponse({"error": refusal.reason}, refusal.status, dict(refusal.headers))
        answered.labels(str(response.status_code)).inc()
        seconds.observe(time.monotonic() - started)
        return response

    @app.get("/v1/runners")
    async def known_runners(request: Request) -> Response:
        try:
            authorise(request, token)
        except Refused as refusal:
            return JSONResponse({"error": refusal.reason}, refusal.status, dict(refusal.headers))
        return JSONResponse({"runners": sorted(runners)})

    @app.get("/healthz")
    async def healthz() -> Response:
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        try:
            authorise(request, token)
        except Refused as refusal:
            return JSONResponse({"error": refusal.reason}, refusal.status, dict(refusal.headers))
        under_way.set(load.requests)
        held.set(load.bytes)
        return Response(generate_latest(registry), media_type="text/plain; version=0.0.4")

    return app


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
