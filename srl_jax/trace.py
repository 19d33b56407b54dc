"""What a trace is: its three blocks, the strict parser and the canonical text.

A trace is `<think>…</think><action>{JSON}</action><state_update>{JSON}</state_update>`, each tag exactly once
and in this order, only white space between blocks. Thinking before acting, step by step, is the SRL paper's
(arXiv 2510.25992); the `<state_update>` block and the action schema `srl-action/1` are this project's own.

Parsing rejects, it never repairs: whatever is wrong becomes one `Rejection`, and counting those is how schema
drift is noticed. The checks here are textual. Whether a pattern really parses and binds its metavariables in the
language's syntax tree is decided by ast-grep itself, in the sandbox.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import orjson

ACTION_SCHEMA = "srl-action/1"
TAGS = ("<think>", "</think>", "<action>", "</action>", "<state_update>", "</state_update>")
STOP = TAGS[-1]

LANGUAGES = ("python", "javascript", "typescript", "tsx", "java")
_MAX_LANGUAGE_CHARS = max(map(len, LANGUAGES))
MAX_PATTERN_CHARS = 2000
MAX_REPLACEMENT_CHARS = 4000
MAX_BRACKET_DEPTH = 64
MAX_FILES = 16
MAX_STATE_ITEMS = 16
MAX_STATE_ITEM_CHARS = 300
MAX_JSON_BYTES = 16 * 1024
MAX_JSON_DEPTH = 8

_TAG = re.compile("(" + "|".join(map(re.escape, TAGS)) + ")")
_SURROGATE = re.compile("[\ud800-\udfff]")
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
# The closing quote is optional so that an unterminated string is swallowed to the end: linear, never a retry.
_JSON_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)
_NAME = r"[A-Z_][A-Z0-9_]*"
# ast-grep takes only a whole identifier as a metavariable in a pattern (`x$A` and `$Abc` are not) ...
_PATTERN_METAVARIABLE = re.compile(rf"(?<![\w$])(\${{1,3}})({_NAME})(?!\w)")
# ... but expands the longest `$NAME` anywhere in a replacement (`x$A` and `$Abc` both expand `$A`).
_REPLACEMENT_METAVARIABLE = re.compile(rf"(\$+)({_NAME})")
_BARE_METAVARIABLE = re.compile(rf"\s*(?:\${{1,3}}{_NAME}|\$\$\$)\s*")


class Rejection(StrEnum):
    """Why a text is not a trace. Closed: metrics count one of these per malformed completion."""

    TRUNCATED = "truncated"  # a correct beginning that stops before </state_update>
    MISSING_TAG = "missing_tag"
    REPEATED_TAG = "repeated_tag"
    MISORDERED_TAG = "misordered_tag"
    STRAY_TEXT = "stray_text"
    TAG_IN_BLOCK = "tag_in_block"  # tag text smuggled into a JSON string by escapes
    EMPTY_THINK = "empty_think"
    LONE_SURROGATE = "lone_surrogate"
    TOO_LARGE = "too_large"
    TOO_DEEP = "too_deep"
    BAD_JSON = "bad_json"
    DUPLICATE_KEY = "duplicate_key"
    NOT_FINITE = "not_finite"  # NaN, Infinity, -Infinity
    UNKNOWN_KEY = "unknown_key"
    SCHEMA_VIOLATION = "schema_violation"


class TraceError(ValueError):
    """A text that is not a trace.

    `rejection` is the reason. `field` names the tag, the block ("think", "action", "state_update") or, for a
    schema violation, the JSON field at fault; for `UNKNOWN_KEY` it is the key itself, written by the model and
    cut to 40 characters. `block` is the block being read, None while the tags are.
    """

    def __init__(
        self, rejection: Rejection, field: str | None = None, detail: str = "", block: str | None = None
    ) -> None:
        self.rejection = rejection
        self.field = field
        self.detail = detail
        self.block = block
        where = f" in {block}" if block and block != field else ""
        named = f" ({field})" if field else ""
        super().__init__(f"{rejection.value}{named}{where}" + (f": {detail}" if detail else ""))

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions unpickle from their message by default; workers send this one across processes.
        return TraceError, (self.rejection, self.field, self.detail, self.block)


@dataclass(frozen=True)
class Action:
    """One ast-grep rewrite. A plain record: parsing validates, this does not; None is an absent field.

    `constraints` maps a metavariable's name, without `$`, to `{"regex": …}` or `{"kind": …}`; empty is absent.
    """

    language: str | None = None
    pattern: str | None = None
    replacement: str | None = None
    files: tuple[str, ...] | None = None
    constraints: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class StateUpdate:
    """The planner's state after the step: four lists of short strings."""

    decisions: tuple[str, ...]
    constraints: tuple[str, ...]
    open_issues: tuple[str, ...]
    next_focus: tuple[str, ...]

    @classmethod
    def empty(cls) -> StateUpdate:
        return cls((), (), (), ())


STATE_FIELDS = ("decisions", "constraints", "open_issues", "next_focus")


@dataclass(frozen=True)
class Trace:
    """A parsed step. `think` has no surrounding white space."""

    think: str
    action: Action
    state: StateUpdate


def parse_trace(text: str) -> Trace:
    """Reads the trace at the start of `text`; raises `TraceError`.

    Text after the first `</state_update>` is ignored, because sampling stops there. White space may surround
    blocks; any other text outside them is rejected.
    """
    think, action, state = _split_blocks(text)
    if not think.isascii() and _SURROGATE.search(think):
        raise TraceError(Rejection.LONE_SURROGATE, "think", block="think")
    think = think.strip()
    if not think:
        raise TraceError(Rejection.EMPTY_THINK, "think", block="think")
    return Trace(think, parse_action(action), parse_state(state))


def render_trace(trace: Trace) -> str:
    """The canonical text: one newline between blocks, compact JSON, fixed key order. Does not validate."""
    return (
        f"<think>{trace.think.strip()}</think>\n"
        f"<action>{render_action(trace.action)}</action>\n"
        f"<state_update>{render_state(trace.state)}</state_update>"
    )


def parse_action(json_text: str) -> Action:
    """Reads the JSON of an `<action>` block (schema `srl-action/1`); raises `TraceError`."""
    block = "action"
    value = _read_block(json_text, block, ("language", "pattern", "replacement", "files"), ("constraints",))
    language = _string(value["language"], "language", block, 1, _MAX_LANGUAGE_CHARS)
    if language not in LANGUAGES:
        raise _violation("language", f"{language!r} is not one of {', '.join(LANGUAGES)}", block)
    pattern = _string(value["pattern"], "pattern", block, 1, MAX_PATTERN_CHARS)
    _check_pattern(pattern)
    replacement = _string(value["replacement"], "replacement", block, 0, MAX_REPLACEMENT_CHARS)
    bound = set(_PATTERN_METAVARIABLE.findall(pattern))
    _check_replacement(replacement, bound)
    files = _strings(value["files"], "files", block, 1, MAX_FILES, MAX_JSON_BYTES)
    for glob in files:
        _check_glob(glob)
    constraints = _read_constraints(value.get("constraints", {}), bound)
    return Action(language, pattern, replacement, files, constraints)


def render_action(action: Action) -> str:
    """Canonical JSON of an action; absent fields and empty constraints are left out."""
    value: dict[str, Any] = {
        "language": action.language,
        "pattern": action.pattern,
        "replacement": action.replacement,
        "files": None if action.files is None else list(action.files),
    }
    if action.constraints:
        value["constraints"] = {name: dict(action.constraints[name]) for name in sorted(action.constraints)}
    return _compact({key: item for key, item in value.items() if item is not None})


def parse_state(json_text: str) -> StateUpdate:
    """Reads the JSON of a `<state_update>` block; raises `TraceError`."""
    block = "state_update"
    value = _read_block(json_text, block, required=STATE_FIELDS)
    lists = [_strings(value[name], name, block, 0, MAX_STATE_ITEMS, MAX_STATE_ITEM_CHARS) for name in STATE_FIELDS]
    return StateUpdate(*lists)


def render_state(state: StateUpdate) -> str:
    """Canonical JSON of a state update."""
    return _compact(
        {
            "decisions": list(state.decisions),
            "constraints": list(state.constraints),
            "open_issues": list(state.open_issues),
            "next_focus": list(state.next_focus),
        }
    )


def strict_json(text: str, *, max_bytes: int, max_depth: int | None, block: str | None = None) -> Any:
    """`json.loads` without its leniencies: no duplicate keys, NaN, Infinity or lone surrogates.

    Size (UTF-8 bytes) and nesting are bounded before anything recursive runs; without `max_depth` the interpreter's
    own limit on recursion bounds the nesting. Raises `TraceError`.
    """
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError:
        raise TraceError(Rejection.LONE_SURROGATE, block, block=block) from None
    if len(data) > max_bytes:
        raise TraceError(Rejection.TOO_LARGE, block, f"{len(data)} bytes of JSON, at most {max_bytes}", block)
    # There are at least as many brackets as levels, so most texts need no closer look.
    if max_depth is not None and text.count("[") + text.count("{") > max_depth:
        depth = _bracket_depth(_JSON_STRING.sub("", text), "[{", "]}")
        if depth > max_depth:
            raise TraceError(Rejection.TOO_DEEP, block, f"nested {depth} deep, at most {max_depth}", block)
    # JSON that is written again as the very same bytes has none of these faults, and most texts are such: compact, as
    # this project writes them. orjson does both in less than half the time of the reading below, which judges the rest.
    try:
        value = orjson.loads(data)
        if orjson.dumps(value) == data:
            return value
    except (orjson.JSONDecodeError, orjson.JSONEncodeError):
        pass
    try:
        value = _DECODER.decode(text)
    except TraceError as error:
        raise TraceError(error.rejection, block, error.detail, block) from None
    except RecursionError:
        raise TraceError(Rejection.TOO_DEEP, block, "nested too deep to be read", block) from None
    except ValueError as error:  # JSONDecodeError, and int() refusing thousands of digits
        raise TraceError(Rejection.BAD_JSON, block, str(error), block) from None
    # An escaped half of a pair ("\\ud800") is ASCII in the source and only shows once decoded.
    if _ESCAPED_SURROGATE.search(text) and _SURROGATE.search(json.dumps(value, ensure_ascii=False)):
        raise TraceError(Rejection.LONE_SURROGATE, block, block=block)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise TraceError(Rejection.DUPLICATE_KEY, None, f"{twice[:40]!r} appears twice")
    return value


def _refuse_constant(name: str) -> Any:
    raise TraceError(Rejection.NOT_FINITE, None, f"{name} is not JSON")


_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse_constant)


def _split_blocks(text: str) -> tuple[str, str, str]:
    """The raw contents of the three blocks, the tags having been checked."""
    # Text and tags in turn, seven tags at most; what follows the first STOP is ignored.
    pieces = _TAG.split(text, len(TAGS) + 1)
    names = tuple(pieces[1::2])
    if STOP in names:
        names = names[: names.index(STOP) + 1]
    if names != TAGS:
        raise _tag_error(names, pieces[0])
    before_think, think, before_action, action, before_state, state = pieces[:12:2]
    for between, tag in ((before_think, TAGS[0]), (before_action, TAGS[2]), (before_state, TAGS[4])):
        if stray := between.strip():
            raise _stray(stray, tag)
    return think, action, state


def _tag_error(names: tuple[str, ...], before: str) -> TraceError:
    repeated = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if repeated is not None:
        return TraceError(Rejection.REPEATED_TAG, repeated)
    if names and names == TAGS[: len(names)]:
        if stray := before.strip():
            return _stray(stray, TAGS[0])
        return TraceError(Rejection.TRUNCATED, TAGS[len(names)], "the text ends before this tag")
    missing = next((name for name in TAGS if name not in names), None)
    if missing is not None:
        return TraceError(Rejection.MISSING_TAG, missing)
    misplaced = next(name for name, wanted in zip(names, TAGS, strict=True) if name != wanted)
    return TraceError(Rejection.MISORDERED_TAG, misplaced)


def _stray(text: str, tag: str) -> TraceError:
    return TraceError(Rejection.STRAY_TEXT, tag, f"{text[:40]!r} before {tag}")


def _read_block(json_text: str, block: str, required: Sequence[str], optional: Sequence[str] = ()) -> dict[str, Any]:
    value = strict_json(json_text, max_bytes=MAX_JSON_BYTES, max_depth=MAX_JSON_DEPTH, block=block)
    if not isinstance(value, dict):
        raise _violation(block, f"must be a JSON object, not {type(value).__name__}", block)
    for key in value:
        if key not in required and key not in optional:
            known = ", ".join([*required, *optional])
            raise TraceError(Rejection.UNKNOWN_KEY, key[:40], f"known keys: {known}", block)
    for key in required:
        if key not in value:
            raise _violation(key, "is required", block)
    # Between a trace's tags the raw text holds none, so only an escape such as \u003c or \/ can have written one.
    if ("\\" in json_text or "<" in json_text) and _TAG.search(json.dumps(value, ensure_ascii=False)):
        raise TraceError(Rejection.TAG_IN_BLOCK, block, "a string holds tag text", block)
    return value


def _check_pattern(pattern: str) -> None:
    if not pattern.strip():
        raise _violation("pattern", "is blank", "action")
    if _BARE_METAVARIABLE.fullmatch(pattern):
        raise _violation("pattern", "is a bare metavariable: it would match everything", "action")
    if sum(map(pattern.count, "([{")) > MAX_BRACKET_DEPTH and (
        (depth := _bracket_depth(pattern, "([{", ")]}")) > MAX_BRACKET_DEPTH
    ):
        raise _violation("pattern", f"brackets nested {depth} deep, at most {MAX_BRACKET_DEPTH}", "action")


def _check_replacement(replacement: str, bound: set[tuple[str, str]]) -> None:
    for sigil, name in _REPLACEMENT_METAVARIABLE.findall(replacement):
        # ast-grep never captures names that begin with an underscore, so a replacement cannot use them.
        if (sigil, name) not in bound or name.startswith("_"):
            raise _violation("replacement", f"{sigil[:4]}{name[:40]} is not bound in the pattern", "action")


def _check_glob(glob: str) -> None:
    if not glob.strip():
        problem = "is blank"
    elif glob.startswith("/"):
        problem = "is absolute"
    elif "\0" in glob or "\\" in glob:
        problem = "holds a NUL or a backslash"
    elif ".." in glob and ".." in re.split(r"[/{},]", glob):  # braces too: {..,src} would expand to ..
        problem = "climbs out with '..'"
    else:
        return
    raise _violation("files", f"{glob[:80]!r} {problem}", "action")


def _read_constraints(value: Any, bound: set[tuple[str, str]]) -> dict[str, dict[str, str]]:
    if not isinstance(value, dict):
        raise _violation("constraints", "must be an object", "action")
    constraints = {}
    for name, rule in value.items():
        if ("$", name) not in bound or name.startswith("_"):
            raise _violation("constraints", f"{name[:40]!r} is not bound by one $ in the pattern", "action")
        if not isinstance(rule, dict) or len(rule) != 1 or not rule.keys() <= {"regex", "kind"}:
            raise _violation("constraints", f"{name[:40]} needs exactly one of regex, kind", "action")
        constraints[name] = {
            key: _string(item, "constraints", "action", 1, MAX_JSON_BYTES) for key, item in rule.items()
        }
    return constraints


def _string(value: Any, name: str, block: str, least: int, most: int) -> str:
    if not isinstance(value, str):
        raise _violation(name, f"must be a string, not {type(value).__name__}", block)
    if not least <= len(value) <= most:
        raise _violation(name, f"has {len(value)} characters, must have {least} to {most}", block)
    return value


def _strings(value: Any, name: str, block: str, least: int, most: int, most_chars: int) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise _violation(name, f"must be a list of strings, not {type(value).__name__}", block)
    if not least <= len(value) <= most:
        raise _violation(name, f"has {len(value)} items, must have {least} to {most}", block)
    for item in value:
        if not isinstance(item, str) or not 1 <= len(item) <= most_chars:
            _string(item, name, block, 1, most_chars)  # which says what is wrong with it
    return tuple(value)


def _violation(name: str, detail: str, block: str) -> TraceError:
    return TraceError(Rejection.SCHEMA_VIOLATION, name, detail, block)


def _bracket_depth(text: str, opening: str, closing: str) -> int:
    depth = deepest = 0
    for character in text:
        if character in opening:
            depth += 1
            deepest = max(deepest, depth)
        elif character in closing:
            depth = max(0, depth - 1)
    return deepest


def _compact(value: Any) -> str:
    return _ENCODER.encode(value)
