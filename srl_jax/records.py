"""What is stored about a trace: typed records, one canonical byte form, versions checked on reading.

A record is canonical JSON (UTF-8, sorted keys, no spare white space; arrays as base64 of little-endian bytes), so
that the same record always gives the same bytes and a hash of them is a name for it. Reading is strict: unknown or
missing fields, wrong types, foreign versions and broken arrays raise `CorruptRecord` naming the field.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import functools
import json
import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np

from srl_jax.trace import ACTION_SCHEMA, LANGUAGES, StateUpdate, TraceError, parse_trace, render_trace, strict_json

# A changed action schema changes what a stored trace means, so it is part of the record's version.
SCHEMA_VERSION = f"srl-record/2+{ACTION_SCHEMA}"
EMBEDDING_DIM = 384  # all-MiniLM-L6-v2

_MAX_RECORD_BYTES = 256 * 1024 * 1024
_MAX_FREE_DEPTH = 60  # of the one field whose shape is free, env_report
_NORM_TOLERANCE = 1e-3
_LOGPROB_TOLERANCE = 1e-3  # a forced token's log-softmax may round just above 0


class CorruptRecord(ValueError):
    """Bytes that are not a record of this version, or a record that cannot be stored."""


@dataclass(frozen=True)
class Layout:
    """How an array field is stored; letters in `shape` stand for sizes that agree across one record's fields."""

    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class SourceFile:
    """One text file; `path` is relative to the repository's root, with forward slashes."""

    path: str
    text: str


@dataclass(frozen=True)
class TestSpec:
    """How success is decided: `expected_ids` must have passed; `files` are protected paths (tests, configuration)."""

    __test__ = False  # pytest would collect the class for its name

    runner: str
    expected_ids: tuple[str, ...]
    files: tuple[str, ...]


@dataclass(frozen=True)
class EpisodeStep:
    """Where a task stands in a longer episode: `step` of `steps`, counted from 1."""

    episode_id: str
    step: int
    steps: int


@dataclass(frozen=True)
class Task:
    """One step to solve.

    `files` is the whole small repository including tests, `context` the excerpts shown in the prompt, `expected` the
    changed files after the right edit. `slice` is what balances and splits reports (a language, or synthetic).
    In an episode `files` are what the step before left and `prior_state` is the state it ended with; a task of its own
    has no `episode`.
    """

    task_id: str
    instruction: str
    language: str
    slice: str
    rule: str
    difficulty: int
    source: Literal["generated", "real", "user"]
    files: tuple[SourceFile, ...]
    context: tuple[SourceFile, ...]
    prior_state: StateUpdate
    tests: TestSpec | None
    expected: tuple[SourceFile, ...]
    episode: EpisodeStep | None = None


@dataclass(frozen=True)
class Versions:
    """What a record was made and scored with: record schema, data set tag, reward."""

    schema: str
    dataset: str
    reward: str


@dataclass(frozen=True, eq=False)
class TeacherRecord:
    """Kind A, the default: a task and its teacher's canonical trace; the student samples live.

    `think_embedding` is float32 [384] of unit norm, `trace_quality` in [0, 1], `env_report` plain JSON data. Equal
    when the stored bytes are equal.
    """

    task: Task
    trace: str
    think_embedding: Annotated[np.ndarray, Layout("<f4", (EMBEDDING_DIM,))]
    trace_quality: float
    env_report: dict[str, Any]
    versions: Versions
    teacher: str

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TeacherRecord) and encode_record(self) == encode_record(other)

    def __hash__(self) -> int:
        return hash(encode_record(self))


@dataclass(frozen=True)
class SamplerSettings:
    """How completions were drawn; the log-probs are those of this very distribution."""

    temperature: float
    top_p: float
    top_k: int
    constrained: bool
    max_new_tokens: int  # the grammar's masks, and so the log-probs, depend on what is left of both budgets
    max_think_tokens: int


@dataclass(frozen=True, eq=False)
class ReplayGroup:
    """Kind B: G stored completions of one prompt, enough to train on without sampling.

    P prompt tokens, T completion tokens, padded on the right; `completion_mask` is 1 on trained tokens, and nowhere in
    a row that was not scored. `grammar_states` is the automaton's state before each token, which tells another
    grammar. `policy_step` counts the updates of the policy that sampled, `policy_version` says of which run.
    `sampler_logprobs` are natural logarithms under the sampler's own (masked, tempered) distribution: the denominator
    of the off-policy ratio. It is never invented: a group without them cannot be stored. Equal when the stored bytes
    are equal.
    """

    task_id: str
    slice: str
    prompt_ids: Annotated[np.ndarray, Layout("<i4", ("P",))]
    completion_ids: Annotated[np.ndarray, Layout("<i4", ("G", "T"))]
    completion_mask: Annotated[np.ndarray, Layout("|b1", ("G", "T"))]
    sampler_logprobs: Annotated[np.ndarray, Layout("<f4", ("G", "T"))]
    grammar_states: Annotated[np.ndarray, Layout("<i4", ("G", "T"))]
    rewards: Annotated[np.ndarray, Layout("<f4", ("G",))]
    malformed: Annotated[np.ndarray, Layout("|b1", ("G",))]
    policy_version: str
    policy_step: int
    tokenizer: str  # Tokenizer.fingerprint
    sampler: SamplerSettings
    versions: Versions

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ReplayGroup) and encode_replay(self) == encode_replay(other)

    def __hash__(self) -> int:
        return hash(encode_replay(self))


def encode_record(record: TeacherRecord) -> bytes:
    """The record's canonical bytes; raises `CorruptRecord` for one that could not be read back."""
    data = _encode("teacher", record)
    _check_teacher_record(record)
    return data


def decode_record(data: bytes) -> TeacherRecord:
    """Reads `encode_record`'s bytes; raises `CorruptRecord`."""
    record = _decode("teacher", TeacherRecord, data)
    _check_teacher_record(record)
    return record


def task_to_json(task: Task) -> dict[str, Any]:
    """A task as plain JSON data, for files that are not records; raises `CorruptRecord` for one that is none."""
    return _to_json(task, Task, "task", {})


def task_from_json(value: Any) -> Task:
    """The inverse of `task_to_json`; raises `CorruptRecord`."""
    return _reader(Task)(value, (None, "task"), {})


def encode_replay(group: ReplayGroup) -> bytes:
    """The group's canonical bytes; raises `CorruptRecord`, in particular for one without log-probs or states."""
    for name, values in {"sampler_logprobs": group.sampler_logprobs, "grammar_states": group.grammar_states}.items():
        if values is None:
            raise CorruptRecord(f"{name} are missing; a group without them cannot be trained on: sample again")
    data = _encode("replay", group)
    _check_replay_group(group)
    return data


def decode_replay(data: bytes) -> ReplayGroup:
    """Reads `encode_replay`'s bytes; raises `CorruptRecord`."""
    group = _decode("replay", ReplayGroup, data)
    _check_replay_group(group)
    return group


def _check_teacher_record(record: TeacherRecord) -> None:
    task = record.task
    if task.language not in LANGUAGES:
        raise CorruptRecord(f"task.language is {task.language!r}; must be one of {', '.join(LANGUAGES)}")
    if task.difficulty < 1:
        raise CorruptRecord(f"task.difficulty is {task.difficulty}; must be 1 or more")
    if task.episode is not None and not 1 <= task.episode.step <= task.episode.steps:
        raise CorruptRecord(f"task.episode.step is {task.episode.step}; must lie in 1 .. {task.episode.steps}")
    if not 0 <= record.trace_quality <= 1:
        raise CorruptRecord(f"trace_quality is {record.trace_quality}; must lie in [0, 1]")
    norm = float(np.linalg.norm(np.asarray(record.think_embedding, np.float64)))  # float32 squares overflow
    if not abs(norm - 1) <= _NORM_TOLERANCE:
        raise CorruptRecord(f"think_embedding has norm {norm:.4f}; must be a unit vector")
    try:
        canonical = render_trace(parse_trace(record.trace))
    except TraceError as error:
        raise CorruptRecord(f"trace is malformed: {error}") from error
    if canonical != record.trace:
        raise CorruptRecord("trace is not in canonical form; store render_trace(parse_trace(text))")
    _check_schema(record.versions)


def _check_replay_group(group: ReplayGroup) -> None:
    if not group.prompt_ids.size or not group.completion_ids.size:
        raise CorruptRecord("prompt_ids and completion_ids must hold at least one token")
    if np.any(group.sampler_logprobs[np.asarray(group.completion_mask, dtype=bool)] > _LOGPROB_TOLERANCE):
        raise CorruptRecord("sampler_logprobs must be at most 0")
    if not group.sampler.temperature > 0:
        raise CorruptRecord(f"sampler.temperature is {group.sampler.temperature}; must be more than 0")
    _check_schema(group.versions)


def _check_schema(versions: Versions) -> None:
    if versions.schema != SCHEMA_VERSION:
        raise CorruptRecord(
            f"versions.schema is {versions.schema!r}, this program reads {SCHEMA_VERSION!r}; "
            "run launch/prepare_data.py migrate --out=<its folder>"
        )


def _encode(kind: str, record: Any) -> bytes:
    value = {"kind": kind, "record": _to_json(record, type(record), "", {})}
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, sort_keys=True, separators=(",", ":"))
        return text.encode("utf-8")
    except (TypeError, ValueError) as error:  # NaN, lone surrogates, objects that are not JSON
        raise CorruptRecord(f"the record cannot be stored: {error}") from error


def _decode(kind: str, cls: type, data: bytes) -> Any:
    try:
        text = data.decode("utf-8")
        value = strict_json(text, max_bytes=_MAX_RECORD_BYTES, max_depth=None)
    except (UnicodeDecodeError, TraceError) as error:
        raise CorruptRecord(f"not a record: {error}; the file is damaged, prepare the data again") from error
    if not isinstance(value, dict) or value.keys() != {"kind", "record"}:
        raise CorruptRecord("not a record: expected an object with kind and record")
    if value["kind"] != kind:
        raise CorruptRecord(f"expected a {kind} record, found {str(value['kind'])[:40]!r}")
    # Before the fields are looked at: another version's fields differ, and the version is what to name then.
    versions = value["record"].get("versions") if isinstance(value["record"], dict) else None
    if isinstance(versions, dict) and isinstance(versions.get("schema"), str):
        _check_schema(Versions(versions["schema"], "", ""))
    return _reader(cls)(value["record"], None, {})


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


def _to_json(value: Any, kind: Any, path: str, sizes: dict[str, int]) -> Any:
    """`value` as JSON data, checked against its annotation `kind`."""
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, kind):
            raise CorruptRecord(f"{path or 'record'} is a {type(value).__name__}, must be {kind.__name__}")
        fields = vars(value)
        return {name: _to_json(fields[name], hint, _join(path, name), sizes) for name, hint in _hints(kind).items()}
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return _array_to_json(value, arguments[1], path, sizes)
    if origin is types.UnionType:
        return None if value is None else _to_json(value, arguments[0], path, sizes)
    if origin is tuple:
        if not isinstance(value, tuple | list):
            raise CorruptRecord(f"{path} is a {type(value).__name__}, must be a tuple")
        return [_to_json(item, arguments[0], f"{path}[{i}]", sizes) for i, item in enumerate(value)]
    if kind is float and type(value) is int:
        return float(value)
    return _plain(value, kind, path)


# Where in a record a value stands: (the place of its parent, its name or index). Only errors spell it out.
Place = tuple["Place | None", str | int]
Reader = Callable[[Any, "Place | None", dict[str, int]], Any]


def _spelled(place: Place | None) -> str:
    if place is None:
        return ""
    parent, name = place
    return f"{_spelled(parent)}[{name}]" if isinstance(name, int) else _join(_spelled(parent), name)


@functools.cache
def _reader(kind: Any) -> Reader:
    """The inverse of `_to_json` for values annotated `kind`, its branches taken once instead of at every record."""
    if dataclasses.is_dataclass(kind):
        return _object_reader(kind)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return lambda value, place, sizes: _array_from_json(value, arguments[1], _spelled(place), sizes)
    if origin is types.UnionType:
        inner = _reader(arguments[0])
        return lambda value, place, sizes: None if value is None else inner(value, place, sizes)
    if origin is tuple:
        return _list_reader(arguments[0])
    if kind is str or kind is int or kind is bool:
        return lambda value, place, _: value if type(value) is kind else _plain(value, kind, _spelled(place))
    return lambda value, place, _: _plain(value, kind, _spelled(place))


def _object_reader(cls: type) -> Reader:
    readers = {name: _reader(hint) for name, hint in _hints(cls).items()}

    def read(value: Any, place: Place | None, sizes: dict[str, int]) -> Any:
        if not isinstance(value, dict):
            raise CorruptRecord(f"{_spelled(place) or 'record'} must be an object, not {type(value).__name__}")
        if value.keys() != readers.keys():
            odd = min(value.keys() ^ readers.keys())
            state = "unknown" if odd in value else "missing"
            where = _spelled((place, odd[:40]))
            raise CorruptRecord(f"{where} is {state}; the record was made by another version")
        return cls(*[reader(value[name], (place, name), sizes) for name, reader in readers.items()])

    return read


def _list_reader(kind: Any) -> Reader:
    item_reader = _reader(kind)

    def read(value: Any, place: Place | None, sizes: dict[str, int]) -> Any:
        if not isinstance(value, list):
            raise CorruptRecord(f"{_spelled(place)} must be a list, not {type(value).__name__}")
        return tuple([item_reader(item, (place, i), sizes) for i, item in enumerate(value)])

    return read


def _plain(value: Any, kind: Any, path: str) -> Any:
    """Strings, numbers, booleans, literals and free JSON objects: the same in memory and in JSON."""
    if typing.get_origin(kind) is Literal:
        if value not in typing.get_args(kind):
            raise CorruptRecord(f"{path} is {value!r:.40}; must be one of {', '.join(typing.get_args(kind))}")
        return value
    if typing.get_origin(kind) is dict:
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise CorruptRecord(f"{path} must be an object with string keys")
        if _deeper_than(value, _MAX_FREE_DEPTH):
            raise CorruptRecord(f"{path} is nested more than {_MAX_FREE_DEPTH} deep")
        return dict(value)
    if type(value) is not kind:  # exact: True is not an int here, nor 1 a float
        raise CorruptRecord(f"{path} is a {type(value).__name__}, must be {kind.__name__}")
    if kind is float and not math.isfinite(value):
        raise CorruptRecord(f"{path} is {value}; must be finite")
    return value


def _deeper_than(value: Any, levels: int) -> bool:
    layer = [value]
    for _ in range(levels + 1):
        items = [item for part in layer for item in (part.values() if isinstance(part, Mapping) else part)]
        layer = [item for item in items if isinstance(item, Mapping | list | tuple)]
        if not layer:
            return False
    return True


def _array_to_json(value: Any, layout: Layout, path: str, sizes: dict[str, int]) -> Any:
    wanted = np.dtype(layout.dtype)
    array = np.asarray(value)
    if array.dtype.kind not in {"f": "f", "i": "iu", "b": "b"}[wanted.kind]:
        raise CorruptRecord(f"{path} has dtype {array.dtype}, must be {wanted}")
    with np.errstate(over="ignore"):  # what overflows becomes infinity and is refused below
        converted = np.ascontiguousarray(array, dtype=wanted)
    if wanted.kind == "i" and not np.array_equal(converted, array):
        raise CorruptRecord(f"{path} holds integers that do not fit {wanted}")
    _check_shape(array.shape, layout.shape, path, sizes)
    _check_finite(converted, path)
    return {"shape": list(array.shape), "data": base64.b64encode(converted.tobytes()).decode("ascii")}


def _array_from_json(value: Any, layout: Layout, path: str, sizes: dict[str, int]) -> np.ndarray:
    wanted = np.dtype(layout.dtype)
    if not isinstance(value, dict) or value.keys() != {"shape", "data"} or not isinstance(value["data"], str):
        raise CorruptRecord(f"{path} must be an object with shape and data")
    shape = value["shape"]
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise CorruptRecord(f"{path}.shape must be a list of sizes")
    _check_shape(tuple(shape), layout.shape, path, sizes)
    try:
        raw = binascii.a2b_base64(value["data"], strict_mode=True)
    except (binascii.Error, ValueError) as error:
        raise CorruptRecord(f"{path}.data is not base64: {error}") from error
    if len(raw) != math.prod(shape) * wanted.itemsize:
        raise CorruptRecord(f"{path}.data holds {len(raw)} bytes, its shape {shape} needs another number")
    if wanted.kind == "b" and raw.translate(None, b"\0\1"):
        raise CorruptRecord(f"{path}.data holds a byte that is neither 0 nor 1")
    array = np.frombuffer(raw, dtype=wanted).reshape(shape).copy()
    _check_finite(array, path)
    return array


def _check_finite(array: np.ndarray, path: str) -> None:
    if array.dtype.kind == "f" and not np.all(np.isfinite(array)):
        raise CorruptRecord(f"{path} holds NaN or infinity")


def _check_shape(shape: tuple[int, ...], wanted: tuple[int | str, ...], path: str, sizes: dict[str, int]) -> None:
    if len(shape) != len(wanted):
        raise CorruptRecord(f"{path} has shape {shape}, must have {len(wanted)} axes {wanted}")
    for size, want in zip(shape, wanted, strict=True):
        expected = want if isinstance(want, int) else sizes.setdefault(want, size)
        if size != expected:
            raise CorruptRecord(f"{path} has shape {shape}, must be {wanted} with {want} = {expected}")


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
