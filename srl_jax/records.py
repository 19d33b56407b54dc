"""What is stored about a trace: typed records, one canonical byte form, versions checked on reading.

A record is canonical JSON (UTF-8, sorted keys, no spare white space; arrays as base64 of little-endian bytes), so
that the same record always gives the same bytes and a hash of them is a name for it. Reading is strict: unknown or
missing fields, wrong types, foreign versions and broken arrays raise `CorruptRecord` naming the field.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np

from srl_jax.trace import ACTION_SCHEMA, LANGUAGES, StateUpdate, TraceError, parse_trace, render_trace, strict_json
from srl_jax.typed_json import CorruptRecord, Layout, from_json, to_json

# A changed action schema changes what a stored trace means, so it is part of the record's version.
SCHEMA_VERSION = f"srl-record/2+{ACTION_SCHEMA}"
EMBEDDING_DIM = 384  # all-MiniLM-L6-v2

_MAX_RECORD_BYTES = 256 * 1024 * 1024
_NORM_TOLERANCE = 1e-3
_LOGPROB_TOLERANCE = 1e-3  # a forced token's log-softmax may round just above 0


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
    return to_json(task, Task, "task")


def task_from_json(value: Any) -> Task:
    """The inverse of `task_to_json`; raises `CorruptRecord`."""
    return from_json(value, Task, "task")


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
    norm = math.sqrt(np.square(record.think_embedding, dtype=np.float64).sum())  # float32 squares overflow
    if not abs(norm - 1) <= _NORM_TOLERANCE:
        raise CorruptRecord(f"think_embedding has norm {norm:.4f}; must be a unit vector")
    try:
        canonical = render_trace(parse_trace(record.trace))
    except TraceError as error:
        raise CorruptRecord(f"trace is malformed: {error}") from error
    if canonical != record.trace:
        raise CorruptRecord("trace is not in canonical form; store render_trace(parse_trace(text))")
    _check_schema(record.versions.schema)


def _check_replay_group(group: ReplayGroup) -> None:
    if not group.prompt_ids.size or not group.completion_ids.size:
        raise CorruptRecord("prompt_ids and completion_ids must hold at least one token")
    if np.any(group.sampler_logprobs[np.asarray(group.completion_mask, dtype=bool)] > _LOGPROB_TOLERANCE):
        raise CorruptRecord("sampler_logprobs must be at most 0")
    if not group.sampler.temperature > 0:
        raise CorruptRecord(f"sampler.temperature is {group.sampler.temperature}; must be more than 0")
    _check_schema(group.versions.schema)


def _check_schema(schema: str) -> None:
    if schema != SCHEMA_VERSION:
        raise CorruptRecord(
            f"versions.schema is {schema!r}, this program reads {SCHEMA_VERSION!r}; "
            "run launch/prepare_data.py migrate --out=<its folder>"
        )


def _encode(kind: str, record: Any) -> bytes:
    value = {"kind": kind, "record": to_json(record, type(record))}
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
        _check_schema(versions["schema"])
    return from_json(value["record"], cls)
