"""A teacher behind any OpenAI-compatible endpoint: streamed, paced, retried, paid for."""

import contextlib
import dataclasses
import email.utils
import json
import logging
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import openai

from data_pipeline.errors import DataError
from data_pipeline.stream_guard import StreamGuard
from data_pipeline.tasks.rule import Draft
from data_pipeline.teacher import Answer, NoAnswer
from data_pipeline.teacher_config import Price, TeacherConfig, TeacherSpec
from srl_jax import assets
from srl_jax.records import SourceFile, Task
from srl_jax.tokenizer import load_tokenizer
from srl_jax.trace import TAGS, render_state

log = logging.getLogger(__name__)

_WHOLE_ANSWER = 5  # times timeout_s
# What may pass by itself. A broken stream, a wrong content type and rubbish in it all end up here.
_PASSING = (openai.APIConnectionError, openai.InternalServerError, openai.RateLimitError, openai.ConflictError)
_BROKEN_STREAM = (httpx2.HTTPError, httpx2.StreamError, openai.APIError, json.JSONDecodeError, UnicodeDecodeError)
# What no repetition mends, for any task.
_FATAL = (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError)


class _HalfStream(Exception):
    """The stream ended before the answer did."""


class _Rubbish(Exception):
    """Well-formed JSON that is no piece of an answer."""


class Pace:
    """When the next request may start: not faster than the limit, and not before a Retry-After is over."""

    def __init__(self, per_minute: float) -> None:
        self._spacing = 60 / per_minute if per_minute else 0.0
        self._next = 0.0
        self._lock = threading.Lock()

    def wait(self) -> None:
        with self._lock:
            start = max(self._next, time.monotonic())
            self._next = start + self._spacing
        time.sleep(max(0.0, start - time.monotonic()))

    def hold(self, seconds: float) -> None:
        """Nobody starts for so long."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)


class EndpointTeacher:
    """One teacher of `teacher.yaml`; see `teacher.Teacher` for the contract."""

    def __init__(self, config: TeacherConfig, spec: TeacherSpec) -> None:
        key = os.environ.get(spec.api_key_env, "") if spec.api_key_env else "none"
        if not key:
            raise DataError(f"teacher {spec.name}: the environment variable {spec.api_key_env} holds no key; set it")
        self._config, self._spec = config, spec
        self.version = config.fingerprint(spec)
        self.name = f"{spec.name}@{self.version[:12]}"
        self.concurrency = spec.limits.concurrency
        decoding = dataclasses.asdict(spec.decoding)
        pinned = {"kind": spec.kind, "model": spec.model, "revision": spec.revision, "tokenizer": spec.tokenizer}
        self.pinned = {**pinned, "decoding": decoding, "fingerprint": self.version}
        self._tokenizer = _load_tokenizer(spec.tokenizer)
        self._pace = Pace(spec.limits.requests_per_minute)
        # Whoever asks: a paraphrasing writer has threads of its own for each teacher that it stands behind.
        self._slots = threading.BoundedSemaphore(self.concurrency)
        self._failures, self._failures_lock = 0, threading.Lock()
        # Retries are ours: the client knows nothing of streams that break half way, nor of the other threads.
        self._client = openai.OpenAI(
            base_url=spec.base_url, api_key=key, max_retries=0, timeout=httpx2.Timeout(spec.limits.timeout_s)
        )

    def request(self, draft: Draft) -> str:
        return json.dumps(self.messages(draft.task), ensure_ascii=False, sort_keys=True)

    def answer(self, draft: Draft) -> Answer:
        return self.ask(self.messages(draft.task))

    def ask(self, messages: list[dict[str, str]], tags: tuple[str, ...] = TAGS, *, variant: int = 0) -> Answer:
        """The answer to any conversation, read up to the last of `tags`; raises as `answer` does.

        `variant` is added to the pinned seed, where there is one, for another answer to the same question.
        """
        with self._slots:
            return self._ask(messages, tags, variant)

    def _ask(self, messages: list[dict[str, str]], tags: tuple[str, ...], variant: int) -> Answer:
        limits, started = self._spec.limits, time.monotonic()
        prompt, read, wasted, reason = sum(self._count(message["content"]) for message in messages), 0, 0, ""
        for attempt in range(1, limits.attempts + 1):
            self._pace.wait()
            guard = StreamGuard(self._count, self._spec.decoding.max_think_tokens, tags)
            delay = min(limits.max_wait_s, limits.backoff_s * 2 ** (attempt - 1)) * random.uniform(0.5, 1.5)
            try:
                served, ended = self._stream(messages, guard, variant)
            except _FATAL as error:
                raise DataError(
                    f"teacher {self._spec.name}: {self._spec.base_url} answers {error.status_code} ({_brief(error)}); "
                    "check base_url, model and the key"
                ) from error
            except _PASSING as error:
                reason = _reason(error)
                if isinstance(error, openai.APIStatusError) and (asked := retry_after(error)) is not None:
                    delay = min(asked, limits.max_wait_s)
                    self._pace.hold(delay)  # everyone's: the limit is the account's, not this request's
            except openai.APIStatusError as error:  # this one task is refused, too long a prompt for instance
                reason = _reason(error)
                break
            except _BROKEN_STREAM as error:
                reason = "timeout" if isinstance(error, httpx2.TimeoutException) else "broken_stream"
            except _HalfStream:
                reason = "half_stream"
            except _Rubbish:
                reason = "rubbish"
            else:
                self._count_failures(0)
                completion, read = self._count(guard.text), read + prompt
                return Answer(
                    guard.text,
                    self.name,
                    guard.cut or ("length" if ended == "length" else ""),
                    read,
                    completion,
                    wasted,
                    attempt,
                    _cost(self._spec.price, read, completion + wasted),
                    round(time.monotonic() - started, 3),
                    served,
                )
            if guard.text:  # the prompt was read and something was written: both are paid for
                read, wasted = read + prompt, wasted + self._count(guard.text)
            log.info("teacher %s: %s, attempt %d of %d", self._spec.name, reason, attempt, limits.attempts)
            if attempt < limits.attempts:
                time.sleep(delay)
        self._count_failures(1, reason)
        raise NoAnswer(
            self.name,
            reason,
            attempts=attempt,
            prompt_tokens=read,
            wasted_tokens=wasted,
            cost_usd=_cost(self._spec.price, read, wasted),
        )

    def _stream(self, messages: list[dict[str, str]], guard: StreamGuard, variant: int) -> tuple[str, str]:
        """Feeds the guard until it has enough; (the model that answered, the server's finish reason)."""
        decoding, limits = self._spec.decoding, self._spec.limits
        extra = {} if decoding.seed is None else {"seed": decoding.seed + variant}
        deadline = time.monotonic() + _WHOLE_ANSWER * limits.timeout_s
        served = ended = ""
        stream = self._client.chat.completions.create(
            model=self._spec.model,
            messages=messages,
            stream=True,
            temperature=decoding.temperature,
            top_p=decoding.top_p,
            max_tokens=decoding.max_tokens,
            extra_body={**extra, **decoding.extra_body},
        )
        with contextlib.closing(stream):  # closing tells the server to stop writing
            for chunk in stream:
                model, pieces = _read(chunk)
                served = model or served
                if time.monotonic() > deadline:
                    raise httpx2.ReadTimeout(f"not complete after {_WHOLE_ANSWER * limits.timeout_s:g} s")
                for text, finish in pieces:
                    ended = finish or ended
                    if text and not guard.feed(text):
                        return served, ended
        if not ended:
            raise _HalfStream
        return served, ended

    def messages(self, task: Task) -> list[dict[str, str]]:
        """The conversation that asks for the answer to a task."""
        messages = [{"role": "system", "content": self._config.system}]
        for anchor in self._config.anchors:
            shown = _request(anchor.language, anchor.instruction, anchor.state, anchor.files)
            messages.append({"role": "user", "content": shown})
            messages.append({"role": "assistant", "content": anchor.answer})
        asked = _request(task.language, task.instruction, render_state(task.prior_state), task.context)
        return [*messages, {"role": "user", "content": asked}]

    def _count(self, text: str) -> int:
        # Half a surrogate pair, which a teacher may well write, is nothing that a tokenizer takes.
        return len(self._tokenizer(text.encode("utf-8", "replace").decode())) if text else 0

    def _count_failures(self, more: int, reason: str = "") -> None:
        with self._failures_lock:
            self._failures = self._failures + more if more else 0
            if self._failures >= self._spec.limits.stop_after_failures:
                raise DataError(
                    f"teacher {self._spec.name}: {self._failures} tasks in a row got no answer, the last for {reason}; "
                    f"see to {self._spec.base_url} and run the same command again, what was answered is kept"
                )


def _read(chunk: Any) -> tuple[str, list[tuple[str, str]]]:
    """A chunk's model and its pieces of (text, finish reason). The client checks no types, so this does."""
    try:
        model = chunk.model if isinstance(chunk.model, str) else ""
        pieces = [(choice.delta.content or "", choice.finish_reason or "") for choice in chunk.choices or ()]
    except (AttributeError, TypeError) as error:
        raise _Rubbish from error
    if not all(isinstance(part, str) for piece in pieces for part in piece):
        raise _Rubbish
    return model, pieces


def _request(language: str, instruction: str, state: str, files: tuple[SourceFile, ...]) -> str:
    shown = "".join(f"\n{file.path}:\n{file.text.strip(chr(10))}" for file in files)
    return f"Task ({language}): {instruction}\nState: {state}{shown}"


def _load_tokenizer(name: str) -> Callable[[str], list[int]]:
    kind, _, asset = name.partition(":")
    return load_tokenizer(assets.fetch(asset) if kind == "asset" else Path(name)).encode_text


def retry_after(error: openai.APIStatusError) -> float | None:
    """Seconds the server asks to wait for, from either header and either form; None when it does not say."""
    headers = error.response.headers
    with contextlib.suppress(ValueError):
        if "retry-after-ms" in headers:
            return max(0.0, float(headers["retry-after-ms"]) / 1000)
    asked = headers.get("retry-after")
    if asked is None:
        return None
    with contextlib.suppress(ValueError):
        seconds = float(asked)
        return max(0.0, seconds) if seconds < float("inf") else None
    with contextlib.suppress(ValueError):
        return max(0.0, email.utils.parsedate_to_datetime(asked).timestamp() - time.time())
    return None


def _reason(error: openai.APIError) -> str:
    if isinstance(error, openai.APIStatusError):
        return f"http_{error.status_code}"
    return "timeout" if isinstance(error, openai.APITimeoutError) else "connection"


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _cost(price: Price, prompt_tokens: int, completion_tokens: int) -> float:
    return round((prompt_tokens * price.prompt + completion_tokens * price.completion) / 1e6, 9)
