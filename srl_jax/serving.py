"""A student behind an OpenAI-compatible endpoint: conversations in, traces out that always parse.

    POST /v1/chat/completions   one answer to one conversation, streamed or whole
    GET  /v1/models             the one model there is
    GET  /healthz               200 while the server takes requests

What waits together is sampled together; an answer depends on its own conversation, settings and seed alone, not on its
neighbours. Temperature and top_p, to two decimals, and the size of a batch are compiled in: what is new in these is
compiled once, and everybody waits for it. A streamed answer comes in one piece, when its batch is done. A client that
is gone before its batch begins is left out.
"""

import asyncio
import dataclasses
import json
import logging
import queue
import secrets
import threading
import time
from concurrent.futures import Future
from typing import Annotated, Any, Literal

import anyio.to_thread
import jax
import jax.numpy as jnp
import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from srl_jax.bounded_http import Load, Refused, ServerLimits, authorise
from srl_jax.sampling import SamplingConfig, sample
from srl_jax.student import Student, pad_prompts

log = logging.getLogger(__name__)

LIMITS = ServerLimits(max_body_bytes=1 << 20, max_total_bytes=64 << 20, max_requests=256)
_GATHER_S = 0.02  # how long the first of a batch waits for others
# top_p keeps of the likeliest so many tokens; beyond them a trained student has no mass worth keeping.
_TOP_K = 64
_LOOK_S = 1.0  # how often it is seen whether a client is still there


class Message(BaseModel):
    """One turn. Tags count as tags in what system and assistant say, as plain text in what a user says."""

    role: Literal["system", "user", "assistant"]
    content: str


class Asked(BaseModel):
    """The body of a request; what OpenAI's clients may send besides has no meaning here and is passed over."""

    model_config = ConfigDict(strict=True)

    model: str
    messages: Annotated[list[Message], Field(min_length=1, max_length=64)]
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None
    n: Literal[1] = 1
    stream: bool = False

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, value: Any) -> Any:
        return {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value


@dataclasses.dataclass(frozen=True)
class Said:
    """An answer. `finished` tells a whole trace from one that the budget cut, which the grammar does not allow."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    finished: bool


@dataclasses.dataclass(frozen=True)
class _Waiting:
    ids: list[int]
    seed: int
    settings: SamplingConfig
    answer: Future[Said]


class Batcher:
    """Samples what waits, up to `rows` conversations at a time, in a thread of its own; a context manager."""

    def __init__(self, student: Student, lora: dict | None, *, max_prompt_tokens: int, rows: int = 8) -> None:
        self._student, self._variables = student, student.sampling_variables(lora)
        self._width, self._rows = max_prompt_tokens, rows
        self._queue: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="batcher")

    def __enter__(self) -> "Batcher":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the batch that is being sampled; what still waits is cancelled."""
        self._closing = True
        self._queue.put(None)
        self._thread.join()

    def submit(self, asked: Asked) -> Future[Said]:
        """The answer to come; raises `Refused` for what does not fit."""
        student = self._student
        ids = student.tokenizer.encode_conversation((turn.role, turn.content) for turn in asked.messages)
        if len(ids) > self._width:
            raise Refused(400, f"the conversation has {len(ids)} tokens, this server reads {self._width}")
        budget = student.sampling.max_new_tokens
        for name in ("max_tokens", "max_completion_tokens"):
            if (given := getattr(asked, name)) is not None and given < budget:
                raise Refused(400, f"{name} is {given}; a trace has the {budget} tokens that the student learnt with")
        temperature, top_p = round(asked.temperature, 2), max(0.01, round(asked.top_p, 2))
        if temperature == 0.0:
            top_p = 1.0
        top_k = _TOP_K if top_p < 1.0 else 0
        settings = dataclasses.replace(student.sampling, temperature=temperature, top_k=top_k, top_p=top_p)
        seed = secrets.randbits(32) if asked.seed is None else asked.seed
        waiting = _Waiting(ids, seed, settings, Future())
        self._queue.put(waiting)
        return waiting.answer

    def _work(self) -> None:
        held: list[_Waiting] = []
        while self._gather(held):
            alike = [one for one in held if one.settings == held[0].settings][: self._rows]
            held = [one for one in held if all(one is not taken for taken in alike)]
            alike = [one for one in alike if one.answer.set_running_or_notify_cancel()]
            if not alike:
                continue
            try:
                answers = self._sample(alike)
            except Exception as error:  # a failed batch is its own requests' affair; the next one is served
                for one in alike:
                    one.answer.set_exception(error)
            else:
                for one, said in zip(alike, answers, strict=True):
                    one.answer.set_result(said)
        while not self._queue.empty():
            held += filter(None, [self._queue.get()])
        for one in held:
            one.answer.cancel()

    def _gather(self, held: list[_Waiting]) -> bool:
        """Adds to `held` what comes within `_GATHER_S` of the first, a batch at most; False when it is to end."""
        deadline = time.monotonic() + _GATHER_S
        while len(held) < self._rows and not self._closing:
            try:
                more = self._queue.get(timeout=max(0.0, deadline - time.monotonic()) if held else None)
            except queue.Empty:
                break
            if more is None:
                return False
            if not held:
                deadline = time.monotonic() + _GATHER_S
            held.append(more)
        return not self._closing

    def _sample(self, batch: list[_Waiting]) -> list[Said]:
        student = self._student
        size = 1 << (len(batch) - 1).bit_length()  # few shapes to compile: powers of two
        rows = batch + [batch[-1]] * (size - len(batch))
        tokens, lengths = pad_prompts([row.ids for row in rows], self._width, student.tokenizer.pad_id)
        drawn = sample(
            student.decoder, self._variables, student.automaton, tokens, lengths,
            jnp.stack([jax.random.key(row.seed) for row in rows]),
            group_size=1, settings=batch[0].settings, pad_id=student.tokenizer.pad_id,
        )  # fmt: skip
        ids, mask, finished = (np.asarray(x)[:, 0] for x in (drawn.tokens, drawn.mask, drawn.finished))
        return [
            Said(
                student.tokenizer.decode_trace(ids[i, mask[i]].tolist()), len(one.ids), int(mask[i].sum()),
                bool(finished[i]),
            )
            for i, one in enumerate(batch)
        ]  # fmt: skip


def make_app(batcher: Batcher, *, name: str, token: str = "", limits: ServerLimits = LIMITS) -> FastAPI:
    """The application. With a `token` it is asked for as bearer token; without one everybody is answered."""
    app = FastAPI(title="srl_jax student", openapi_url=None)
    load = Load()

    async def take(request: Request) -> Response:
        if token:
            authorise(request, token)
        async with load.taken(request, limits) as body:
            try:
                asked = Asked.model_validate_json(bytes(body))
            except ValidationError as error:
                first = error.errors(include_url=False, include_input=False)[0]
                field = ".".join(map(str, first["loc"])) or "the body"
                raise Refused(400, f"{field}: {first['msg']}") from error
            if asked.model != name:
                raise Refused(404, f"the model here is {name!r}, not {asked.model[:100]!r}")
            # Many tokens to count are no work for the event loop.
            answer = asyncio.wrap_future(await anyio.to_thread.run_sync(batcher.submit, asked))
            whole = _reply(name, await _told(request, answer))
        if asked.stream:
            return Response(_events(whole), media_type="text/event-stream")
        return JSONResponse(whole)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        try:
            return await take(request)
        except Refused as refusal:
            return _error(refusal)

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        try:
            if token:
                authorise(request, token)
        except Refused as refusal:
            return _error(refusal)
        return JSONResponse({"object": "list", "data": [{"id": name, "object": "model", "owned_by": "srl_jax"}]})

    @app.get("/healthz")
    async def healthz() -> Response:
        return JSONResponse({"status": "ok"})

    return app


def _reply(name: str, said: Said) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{secrets.token_hex(12)}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": name,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": said.text},
                "finish_reason": "stop" if said.finished else "length",
            }
        ],
        "usage": {
            "prompt_tokens": said.prompt_tokens,
            "completion_tokens": said.completion_tokens,
            "total_tokens": said.prompt_tokens + said.completion_tokens,
        },
    }


def _events(whole: dict[str, Any]) -> str:
    """The same answer as server-sent events: its text, how it ended, the end."""
    choice = whole["choices"][0]
    pieces = []
    for delta, finish in ((choice["message"], None), ({}, choice["finish_reason"])):
        piece = {"index": 0, "delta": delta, "finish_reason": finish}
        chunk = {**whole, "object": "chat.completion.chunk", "choices": [piece]}
        if finish is None:
            chunk.pop("usage")
        pieces.append(json.dumps(chunk, ensure_ascii=False))
    return "".join(f"data: {piece}\n\n" for piece in (*pieces, "[DONE]"))


async def _told(request: Request, answer: asyncio.Future[Said]) -> Said:
    """The answer, unless the client goes first; raises `Refused` where there is none."""
    while not answer.done():
        await asyncio.wait([answer], timeout=_LOOK_S)
        if not answer.done() and await request.is_disconnected():
            answer.cancel()
            raise Refused(499, "the client is gone")
    if answer.cancelled():
        raise Refused(503, "the server is stopping")
    if (error := answer.exception()) is not None:
        log.error("a batch failed", exc_info=error)
        raise Refused(500, "sampling failed; the server's log says why")
    return answer.result()


def _error(refusal: Refused) -> Response:
    kind = "invalid_request_error" if refusal.status < 500 else "server_error"
    body = {"error": {"message": refusal.reason, "type": kind}}
    return JSONResponse(body, refusal.status, dict(refusal.headers))
