"""An HTTP server that bounds what its clients can take: bytes, time, and how many requests wait.

What is over a bound gets an answer that says so (401, 408, 413, 503), never a silent hang. The reward service
(sandbox/server.py) and a served student (serving.py) stand on this.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import socket
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import uvicorn
from fastapi import FastAPI, Request
from uvicorn.protocols.http.h11_impl import H11Protocol

from srl_jax.config import ConfigError

MIN_TOKEN_LENGTH = 16
_BACKLOG = 2048


@dataclass(frozen=True)
class ServerLimits:
    """Up to `max_requests` are taken; the reward service works on `threads` of them at once, the others wait inside.

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


class Refused(Exception):
    """An answer other than 200, with the sentence that the client is shown."""

    def __init__(self, status: int, reason: str, **headers: str) -> None:
        super().__init__(reason)
        self.status, self.reason, self.headers = status, reason, headers


def authorise(request: Request, token: str) -> None:
    """Raises `Refused` for a request without the bearer token."""
    expected = f"Bearer {token}".encode()
    if not hmac.compare_digest(request.headers.get("authorization", "").encode(), expected):
        raise Refused(401, "the bearer token is missing or wrong", **{"WWW-Authenticate": "Bearer"})


@dataclass
class Load:
    """What is under way; touched by the event loop's thread alone."""

    requests: int = 0
    bytes: int = 0

    @contextlib.asynccontextmanager
    async def taken(self, request: Request, limits: ServerLimits) -> AsyncIterator[bytearray]:
        """The request's body, counted as under way until the block ends; raises `Refused` over any bound."""
        if self.requests >= limits.max_requests:
            raise Refused(503, f"{self.requests} requests are under way; come back later", **{"Retry-After": "1"})
        self.requests += 1
        body = bytearray()
        try:
            await _read(request, body, self, limits)
            yield body
        finally:
            self.requests -= 1
            self.bytes -= len(body)


async def _read(request: Request, body: bytearray, load: Load, limits: ServerLimits) -> None:
    """Collect the body, counting it in `load` as it comes; raises `Refused` over any bound."""
    too_large = Refused(
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
                    raise Refused(503, "too many bytes are under way; come back later", **{"Retry-After": "1"})
                body += chunk
                load.bytes += len(chunk)
    except TimeoutError as error:
        raise Refused(408, f"the body took longer than {limits.body_s} s", Connection="close") from error


async def _discard(request: Request, seconds: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            async for _ in request.stream():
                pass


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


class _Server(uvicorn.Server):
    """Returns after the signal that stopped it; uvicorn's own raises it once more, and the process dies of it."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        with super().capture_signals():
            yield
            self._captured_signals.clear()


def listen(host: str, port: int) -> socket.socket:
    """The socket for `make_server(...).run(sockets=[...])`; raises `ConfigError` where the address is not to be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise ConfigError("", "--port", f"{host}:{port} is not to be had ({error.strerror}); give another") from error


def make_server(
    app: FastAPI, *, host: str = "127.0.0.1", port: int = 0, limits: ServerLimits | None = None
) -> uvicorn.Server:
    """A server for `app`; `.run()` serves until SIGINT or SIGTERM, then finishes what it has taken and returns."""
    limits = limits or ServerLimits()
    return _Server(
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
            backlog=_BACKLOG,
            timeout_keep_alive=int(limits.header_s),
        )
    )
