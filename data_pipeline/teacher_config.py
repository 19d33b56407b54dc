"""Reads `configs/teacher.yaml`: which teachers write traces, pinned down to what may change an answer."""

import dataclasses
import hashlib
import json
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from data_pipeline.errors import DataError
from srl_jax.records import SourceFile
from srl_jax.trace import Trace, TraceError, parse_action, parse_state, parse_trace, render_trace

VERSION = "srl-teacher/1"


@dataclass(frozen=True)
class Decoding:
    """How an answer is drawn. `extra_body` holds fields that only this server knows."""

    temperature: float = 0.3
    top_p: float = 0.9
    max_tokens: int = 1024
    max_think_tokens: int = 512
    seed: int | None = None
    extra_body: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Limits:
    """What may be asked of the endpoint. `requests_per_minute` 0 sets no pace of our own.

    `timeout_s` bounds the wait for the next piece of an answer and, five times over, for the whole of it. Attempts
    are spaced by `backoff_s`, doubling up to `max_wait_s`, or as the server's Retry-After says. After
    `stop_after_failures` tasks in a row without an answer the run stops.
    """

    concurrency: int = 8
    requests_per_minute: float = 0.0
    timeout_s: float = 60.0
    attempts: int = 6
    backoff_s: float = 1.0
    max_wait_s: float = 120.0
    stop_after_failures: int = 20


@dataclass(frozen=True)
class Price:
    """US dollars per million tokens."""

    prompt: float = 0.0
    completion: float = 0.0


@dataclass(frozen=True)
class TeacherSpec:
    """One teacher. `oracle` is the catalogue's own; `openai` any endpoint of that protocol.

    `model` is the name the server knows, `revision` the hash of the weights behind it, `tokenizer` "asset:<name>", a
    folder with tokenizer.json or a GGUF file. The key is read from the environment variable `api_key_env`.
    """

    name: str
    kind: Literal["openai", "oracle"]
    weight: float = 1.0
    base_url: str = ""
    api_key_env: str = ""
    model: str = ""
    revision: str = ""
    tokenizer: str = ""
    decoding: Decoding = field(default_factory=Decoding)
    limits: Limits = field(default_factory=Limits)
    price: Price = field(default_factory=Price)


@dataclass(frozen=True)
class Anchor:
    """A worked example: a request and its canonical answer."""

    language: str
    instruction: str
    state: str
    files: tuple[SourceFile, ...]
    answer: str


@dataclass(frozen=True)
class Paraphrasing:
    """A `share` of all rationales is rewritten by the endpoint called `teacher`; see `paraphrase`."""

    teacher: str
    share: float


@dataclass(frozen=True)
class TeacherConfig:
    """`system` and `anchors` are shown to every endpoint; `max_cost_usd` 0 sets no limit."""

    teachers: tuple[TeacherSpec, ...]
    system: str
    anchors: tuple[Anchor, ...]
    seed: int = 0
    max_cost_usd: float = 0.0
    paraphrase: Paraphrasing | None = None

    def fingerprint(self, spec: TeacherSpec) -> str:
        """SHA-256 hex of all that decides an answer of `spec`; where it runs, how fast and for how much do not."""
        pinned = {
            "version": VERSION,
            "model": spec.model,
            "revision": spec.revision,
            "tokenizer": spec.tokenizer,
            "decoding": dataclasses.asdict(spec.decoding),
            "system": self.system,
            "anchors": [dataclasses.asdict(anchor) for anchor in self.anchors],
        }
        return hashlib.sha256(json.dumps(pinned, sort_keys=True).encode()).hexdigest()


def load_teacher_config(path: Path) -> TeacherConfig:
    """Raises DataError naming the file, the field and what would be right."""
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; configs/teacher.yaml shows what one looks like") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not YAML: {error}") from None
    try:
        return _config(value)
    except _Wrong as error:
        raise DataError(f"{path}: {error}") from None


class _Wrong(Exception):
    pass


def _config(value: Any) -> TeacherConfig:
    known = {"version", "seed", "max_cost_usd", "teachers", "system", "anchors", "paraphrase"}
    value = _mapping(value, "the file", known, required=("version", "teachers", "system", "anchors"))
    if value["version"] != VERSION:
        raise _Wrong(f"version is {value['version']!r}; this program reads {VERSION!r}")
    teachers = tuple(
        _section(TeacherSpec, item, f"teachers[{i}]") for i, item in enumerate(_list(value["teachers"], "teachers"))
    )
    if not teachers:
        raise _Wrong("teachers is empty; name at least one")
    for i, spec in enumerate(teachers):
        _check_teacher(spec, f"teachers[{i}]")
    if len({spec.name for spec in teachers}) < len(teachers):
        raise _Wrong("teachers: two have the same name")
    if not isinstance(value["system"], str) or not value["system"].strip():
        raise _Wrong("system must be the text that tells a teacher its role")
    anchors = tuple(_anchor(item, f"anchors[{i}]") for i, item in enumerate(_list(value["anchors"], "anchors")))
    if not 2 <= len(anchors) <= 3:
        raise _Wrong(f"anchors holds {len(anchors)} examples; give 2 or 3")
    seed = _typed(value.get("seed", 0), int, "seed")
    cost = _typed(value.get("max_cost_usd", 0.0), float, "max_cost_usd")
    if not any(spec.weight > 0 for spec in teachers):
        raise _Wrong("teachers: one weight must be above 0")
    paraphrase = None
    if value.get("paraphrase") is not None:
        paraphrase = _section(Paraphrasing, value["paraphrase"], "paraphrase")
        if paraphrase.teacher not in {spec.name for spec in teachers if spec.kind == "openai"}:
            raise _Wrong(f"paraphrase.teacher is {paraphrase.teacher!r}; must be the name of an openai teacher")
        if not 0 < paraphrase.share <= 1:
            raise _Wrong(f"paraphrase.share is {paraphrase.share}; must lie in (0, 1]")
    return TeacherConfig(teachers, value["system"].strip(), anchors, seed, cost, paraphrase)


def _check_teacher(spec: TeacherSpec, where: str) -> None:
    def demand(condition: bool, name: str, rule: str) -> None:
        if not condition:
            raise _Wrong(f"{where}.{name}: {rule}")

    demand(spec.name.strip() != "", "name", "must name the teacher")
    demand(0 <= spec.weight < float("inf"), "weight", f"is {spec.weight}; must be at least 0")
    if spec.kind == "oracle":
        return
    for name in ("base_url", "model", "revision", "tokenizer"):
        demand(getattr(spec, name).strip() != "", name, "must be given: it is part of what is pinned")
    demand(spec.base_url.startswith(("http://", "https://")), "base_url", f"{spec.base_url!r} is no http(s) address")
    decoding, limits = spec.decoding, spec.limits
    demand(0 <= decoding.temperature <= 2, "decoding.temperature", "must lie in [0, 2]")
    demand(0 < decoding.top_p <= 1, "decoding.top_p", "must lie in (0, 1]")
    demand(decoding.max_tokens >= 1, "decoding.max_tokens", "must be at least 1")
    demand(decoding.max_think_tokens >= 1, "decoding.max_think_tokens", "must be at least 1")
    for name in ("concurrency", "attempts", "stop_after_failures"):
        demand(getattr(limits, name) >= 1, f"limits.{name}", "must be at least 1")
    for name in ("timeout_s", "backoff_s", "max_wait_s"):
        demand(getattr(limits, name) > 0, f"limits.{name}", "must be above 0")
    demand(limits.requests_per_minute >= 0, "limits.requests_per_minute", "must be at least 0")
    demand(spec.price.prompt >= 0 and spec.price.completion >= 0, "price", "must not be negative")


def _anchor(value: Any, where: str) -> Anchor:
    names = ("language", "instruction", "state", "files", "think", "action", "state_update")
    value = _mapping(value, where, set(names), required=names)
    texts = {name: _typed(value[name], str, f"{where}.{name}") for name in ("language", "instruction", "think")}
    files = tuple(
        _section(SourceFile, item, f"{where}.files[{i}]")
        for i, item in enumerate(_list(value["files"], f"{where}.files"))
    )
    try:
        action = parse_action(json.dumps(value["action"]))
        state = parse_state(json.dumps(value["state_update"]))
        parse_state(json.dumps(value["state"]))
        answer = render_trace(Trace(texts["think"], action, state))
        parse_trace(answer)
    except (TraceError, TypeError) as error:
        raise _Wrong(f"{where} is no example to follow: {error}") from None
    state_json = json.dumps(value["state"], ensure_ascii=False, separators=(",", ":"))
    return Anchor(texts["language"], texts["instruction"].strip(), state_json, files, answer)


def _section(cls: type, value: Any, where: str) -> Any:
    """A dataclass from a YAML mapping, every value of its annotated type."""
    hints = typing.get_type_hints(cls)
    required = [
        item.name
        for item in dataclasses.fields(cls)
        if item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
    ]
    value = _mapping(value, where, set(hints), required=required)
    return cls(**{name: _typed(item, hints[name], f"{where}.{name}") for name, item in value.items()})


def _typed(value: Any, kind: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _section(kind, value, where)
    if typing.get_origin(kind) is Literal:
        if value not in typing.get_args(kind):
            raise _Wrong(f"{where} is {value!r}; must be one of {', '.join(typing.get_args(kind))}")
        return value
    origin = typing.get_origin(kind)
    allowed = typing.get_args(kind) if origin is types.UnionType else (origin or kind,)
    if float in allowed and type(value) is int:
        return float(value)
    if type(value) not in allowed:
        raise _Wrong(f"{where} is {value!r}; must be {' or '.join(item.__name__ for item in allowed)}")
    return value


def _mapping(value: Any, where: str, known: set[str], required: typing.Iterable[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _Wrong(f"{where} must be a mapping, not {type(value).__name__}")
    for name in value:
        if name not in known:
            raise _Wrong(f"{where} has no field {name!r}; it has {', '.join(sorted(known))}")
    for name in required:
        if name not in value:
            raise _Wrong(f"{where} lacks {name}")
    return value


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise _Wrong(f"{where} must be a list, not {type(value).__name__}")
    return value
