"""Apply one action to an in-memory repository with the ast-grep CLI, inside the sandbox.

The host decides which files the action reaches, the sandbox runs ast-grep on their texts and answers with byte-offset
edits, and the host checks and applies those to its own copy: no file of the host is read or written, so there is no
symlink to follow, and ast-grep's parsers meet hostile patterns and texts only where they can hurt nobody.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import PurePosixPath

from srl_jax.sandbox.globs import matches_any
from srl_jax.sandbox.guest.engine import apply_edits
from srl_jax.sandbox.isolation import Jail, Limits, Slot, check_repository
from srl_jax.trace import Action, TraceError, parse_action, render_action

EXTENSIONS = {
    "python": (".py", ".pyi"),
    "javascript": (".js", ".jsx", ".mjs", ".cjs"),
    "typescript": (".ts", ".mts", ".cts"),
    "tsx": (".tsx",),
    "java": (".java",),
}
_ROOT_KIND = {"python": "module", "javascript": "program", "typescript": "program", "tsx": "program", "java": "program"}
MAX_TEXT_BYTES = 8 << 20  # per run, over all files the action reaches


class Status(StrEnum):
    """How applying an action ended.  Only OK leaves an edited repository."""

    OK = "ok"
    SCHEMA_ERROR = "schema_error"  # not an action of the schema
    ENGINE_REJECT = "engine_reject"  # ast-grep refuses the rule
    NO_MATCH = "no_match"
    TOO_MANY = "too_many"  # more matches than allowed, or than expected
    OVERLAP = "overlap"  # matches lie inside one another and the caller allows no skipping
    TIMEOUT = "timeout"
    CRASH = "crash"  # ast-grep died on this input
    PATH_DENIED = "path_denied"  # it would edit a protected file
    UNPARSABLE_AFTER = "unparsable_after"  # the edited file parses worse than before
    NOOP = "noop"  # matches, but every replacement equals what it replaces


@dataclass(frozen=True)
class EngineResult:
    """`files_after` is the whole repository, unchanged unless the status is OK; `matches` counts per file.

    `places` are the (path, start, end) byte ranges that were or would have been rewritten, for `match_set_f1`.
    """

    status: Status
    files_after: Mapping[str, str]
    detail: str = ""
    matches: Mapping[str, int] = field(default_factory=dict)
    overlaps: int = 0
    places: frozenset[tuple[str, int, int]] = frozenset()
    diff: str = ""


def inline_rules(action: Action) -> tuple[str, str]:
    """(edit rule and damage rule, damage rule alone) as ast-grep inline rules.

    The damage rule matches every ERROR node, and the root when a node of no text lies below it: that is how
    tree-sitter shows a token it had to invent.  (An empty file's root has no child at all.)
    """
    edit: dict[str, object] = {
        "id": "edit",
        "language": action.language,
        "severity": "hint",
        "rule": {"pattern": action.pattern},
        "fix": action.replacement,
    }
    if action.constraints:
        edit["constraints"] = {name: dict(value) for name, value in action.constraints.items()}
    missing = {"kind": _ROOT_KIND[str(action.language)], "has": {"regex": "^$", "stopBy": "end"}}
    damage = {
        "id": "damage",
        "language": action.language,
        "severity": "hint",
        "rule": {"any": [{"kind": "ERROR"}, missing]},
    }
    return f"{_yaml(edit)}\n---\n{_yaml(damage)}", _yaml(damage)


def _yaml(value: object) -> str:
    """JSON that is also YAML: ASCII, and a character beyond the BMP is one escape rather than a surrogate pair."""

    def escape(match: re.Match[str]) -> str:
        code = ord(match.group())
        return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"

    return re.sub(r"[^ -~]", escape, json.dumps(value, ensure_ascii=False))


def reached_files(action: Action, files: Mapping[str, str]) -> dict[str, str]:
    """The files of the action's language that its globs match."""
    suffixes = EXTENSIONS[str(action.language)]
    return {
        path: text
        for path, text in files.items()
        if PurePosixPath(path).suffix in suffixes and matches_any(path, action.files or ())
    }


def unified_diff(before: Mapping[str, str], after: Mapping[str, str]) -> str:
    """A unified diff of the files whose text differs, paths in order."""
    parts: list[str] = []
    for path in sorted(set(before) | set(after)):
        old, new = before.get(path, ""), after.get(path, "")
        if old != new:
            lines = difflib.unified_diff(
                old.splitlines(keepends=True), new.splitlines(keepends=True), f"a/{path}", f"b/{path}"
            )
            parts += [line if line.endswith("\n") else line + "\n\\ No newline at end of file\n" for line in lines]
    return "".join(parts)


def apply_action(
    action: Action,
    files: Mapping[str, str],
    *,
    jail: Jail,
    limits: Limits,
    slot: Slot,
    protected: Sequence[str] = (),
    max_matches: int = 1000,
    expect_matches: tuple[int, int] | None = None,
    allow_overlaps: bool = True,
) -> EngineResult:
    """Apply `action` to `files` (path -> text).

    `protected` are globs of files that may not change: an action that would change one is refused whole
    (PATH_DENIED), while one that merely could have reached it is not.  `expect_matches` is an inclusive range.
    Raises ValueError for a repository that is not one, SandboxCrash when the isolation fails.
    """
    check_repository(files)

    def stop(status: Status, detail: str = "", **counts: object) -> EngineResult:
        return EngineResult(status, dict(files), detail, **counts)  # type: ignore[arg-type]

    try:
        action = parse_action(render_action(action))
    except (TraceError, TypeError, AttributeError) as error:
        return stop(Status.SCHEMA_ERROR, str(error))
    targets = reached_files(action, files)
    if not targets:
        return stop(Status.NO_MATCH, "the globs reach no file of the language")
    try:
        size = sum(len(text.encode("utf-8")) for text in targets.values())
    except UnicodeEncodeError as error:
        raise ValueError(f"a repository file holds a lone surrogate: {error}") from error
    if size > MAX_TEXT_BYTES:
        return stop(Status.TOO_MANY, f"the globs reach {size} bytes of text, at most {MAX_TEXT_BYTES}")
    rules, damage_rule = inline_rules(action)
    job = {
        "program": jail.toolchain.ast_grep,
        "rule": rules,
        "broken_rule": damage_rule,
        "extension": EXTENSIONS[str(action.language)][0].lstrip("."),
        "texts": targets,
        "python": action.language == "python",
        "max_matches": max_matches,
        "wall_s": limits.wall_s * 0.8,  # so that the guest reports a timeout itself, with the matches' count intact
    }
    done = jail.run("engine", job, limits=limits, slot=slot)
    if done.ended == "timeout":
        return stop(Status.TIMEOUT, f"no answer in {limits.wall_s} s")
    if done.ended == "output_limit":
        return stop(Status.TOO_MANY, f"more than {limits.output_bytes} bytes of edits")
    if done.ended == "memory_limit":
        return stop(Status.CRASH, f"ast-grep used more than {slot.memory_bytes} bytes of memory")
    if done.exit_code != 0:
        said = done.stderr[-500:].decode("utf-8", "replace")
        return stop(Status.CRASH, f"the engine ended with {done.exit_code}: {said}")
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        return stop(Status.CRASH, "the engine's answer was cut")
    if answer["status"] != "ok":
        return stop(Status(answer["status"]), answer["detail"])

    counts = {
        "matches": answer["matches"],
        "overlaps": answer["overlaps"],
        "places": frozenset((path, start, end) for path, edits in answer["edits"].items() for start, end, _ in edits),
    }
    total = sum(answer["matches"].values())
    if total == 0:
        return stop(Status.NO_MATCH, f"no match in {len(targets)} files")
    if expect_matches and not expect_matches[0] <= total <= expect_matches[1]:
        return stop(Status.TOO_MANY, f"{total} matches, expected {expect_matches}", **counts)
    if answer["overlaps"] and not allow_overlaps:
        return stop(Status.OVERLAP, f"{answer['overlaps']} matches overlap a wider one", **counts)
    after = dict(files)
    for path, edits in answer["edits"].items():
        after[path] = apply_edits(targets[path], edits)
    changed = [path for path in after if after[path] != files[path]]
    if not changed:
        return stop(Status.NOOP, "every replacement equals what it replaces", **counts)
    if denied := [path for path in changed if matches_any(path, protected)]:
        return stop(Status.PATH_DENIED, f"would edit protected files: {denied}", **counts)
    if answer["broken"]:
        return stop(Status.UNPARSABLE_AFTER, f"parse worse after the edit: {answer['broken']}", **counts)
    return EngineResult(Status.OK, after, "", diff=unified_diff(files, after), **counts)
