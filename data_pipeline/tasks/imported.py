"""A user's own tasks: one JSON object a line, each naming a repository on disk.

    {"instruction": "Rename load to fetch in store.py", "repository": "repos/shop", "language": "python",
     "tests": {"runner": "unittest", "expected_ids": ["test_store.T.test_fetch"], "files": ["test_store.py"]},
     "prior_state": {"decisions": [], "constraints": [], "open_issues": [], "next_focus": ["edit store.py"]}}

`tests` and `prior_state` may be left out. A relative `repository` is relative to the file of tasks. Nobody knows the
right edit, so a teacher other than the catalogue's oracle has to write the trace; it is kept when its action applies
and the tests pass.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.tasks.rule import Draft
from srl_jax.excerpt import excerpt
from srl_jax.records import SourceFile, Task, TestSpec
from srl_jax.relevance import relevant_places
from srl_jax.sandbox.engine import EXTENSIONS
from srl_jax.sandbox.globs import is_relative_path
from srl_jax.sandbox.isolation import check_repository
from srl_jax.trace import StateUpdate, TraceError, parse_state, strict_json
from srl_jax.worktree import DirectoryError, read_directory

RUNNERS = ("unittest", "pytest", "node", "java")
_REQUIRED, _OPTIONAL = {"instruction", "repository", "language"}, {"tests", "prior_state"}
_MAX_LINE_BYTES = 1 << 20
_MAX_REPOSITORY_BYTES = 4 << 20  # it becomes part of the record, and of every execution
_NO_PLAN = StateUpdate((), (), (), ())


def read_user_tasks(path: Path, max_excerpt: int) -> list[tuple[str, Draft]]:
    """(repository as written, draft) for every line of `path`, blank ones aside.

    Raises DataError ``path:line: field ...`` for the first line that is no task.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"user_tasks: {path} cannot be read: {error}") from error
    repositories: dict[str, dict[str, str]] = {}
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                found.append(_task(line, number, path.parent, repositories, max_excerpt))
            except _Wrong as problem:
                raise DataError(f"{path}:{number}: {problem}") from problem
    if not found:
        raise DataError(f"user_tasks: {path} holds no task")
    return found


class _Wrong(ValueError):
    """What is wrong with a line, beginning with the field's name."""


def _task(
    line: bytes, number: int, folder: Path, repositories: dict[str, dict[str, str]], max_excerpt: int
) -> tuple[str, Draft]:
    entry = _object(line)
    instruction, language = _text(entry, "instruction"), _text(entry, "language")
    if language not in EXTENSIONS:
        raise _Wrong(f"language is {language!r}; must be one of {', '.join(EXTENSIONS)}")
    named = _text(entry, "repository")
    if named not in repositories:
        repositories[named] = _repository(folder / named)
    files = repositories[named]
    places = relevant_places(instruction, files, languages=(language,), limit=1)
    if not places:
        raise _Wrong(f"instruction speaks of no {language} file of {named}; name a file, or something in its code")
    shown = excerpt(files[places[0].path], places[0].line, max_excerpt)
    if not shown:
        raise _Wrong(f"instruction leads to line {places[0].line} of {places[0].path}, which is too long to be shown")
    task = Task(
        task_id=f"user/{number:06d}",
        instruction=instruction,
        language=language,
        slice=f"{language}/user",
        rule="user",
        difficulty=2,
        source="user",
        files=tuple(SourceFile(name, text) for name, text in files.items()),
        context=(SourceFile(places[0].path, shown),),
        prior_state=_state(entry.get("prior_state")),
        tests=_tests(entry.get("tests"), files),
        expected=(),
    )
    return named, Draft(task, None, {}, "", "")


def _object(line: bytes) -> dict[str, Any]:
    try:
        entry = strict_json(line.decode("utf-8"), max_bytes=_MAX_LINE_BYTES, max_depth=8)
    except UnicodeDecodeError as error:
        raise _Wrong(f"the line is not UTF-8: {error}") from error
    except TraceError as error:
        raise _Wrong(f"the line is not JSON: {error}") from error
    if not isinstance(entry, dict):
        raise _Wrong("the line is not a JSON object")
    if missing := sorted(_REQUIRED - set(entry)):
        raise _Wrong(f"{missing[0]} is missing")
    if unknown := sorted(set(entry) - _REQUIRED - _OPTIONAL):
        known = ", ".join(sorted(_REQUIRED | _OPTIONAL))
        raise _Wrong(f"{unknown[0][:40]} is no field; the fields are {known}")
    return entry


def _text(entry: Mapping[str, Any], name: str) -> str:
    if not isinstance(entry[name], str) or not entry[name].strip():
        raise _Wrong(f"{name} must be text")
    return entry[name].strip()


def _repository(root: Path) -> dict[str, str]:
    try:
        files = read_directory(root)
    except DirectoryError:
        raise _Wrong(f"repository {root} is not a directory") from None
    if not files:
        raise _Wrong(f"repository {root} holds no file that can be read: they must be UTF-8, and at most 1 MiB")
    try:
        check_repository(files)
    except ValueError as error:
        raise _Wrong(f"repository {root}: {error}; name a part of it") from None
    size = sum(len(text.encode()) for text in files.values())
    if size > _MAX_REPOSITORY_BYTES:
        raise _Wrong(
            f"repository {root} holds {size} bytes of text, at most {_MAX_REPOSITORY_BYTES}; name a part of it"
        )
    return files


def _state(value: Any) -> StateUpdate:
    if value is None:
        return _NO_PLAN
    try:
        return parse_state(json.dumps(value, ensure_ascii=False))
    except TraceError as error:
        raise _Wrong(f"prior_state: {error}") from error


def _tests(value: Any, files: Mapping[str, str]) -> TestSpec | None:
    if value is None:
        return None
    if not isinstance(value, dict) or set(value) != {"runner", "expected_ids", "files"}:
        raise _Wrong("tests must be an object with runner, expected_ids and files")
    if value["runner"] not in RUNNERS:
        raise _Wrong(f"tests.runner is {value['runner']!r}; must be one of {', '.join(RUNNERS)}")
    for name in ("expected_ids", "files"):
        items = value[name]
        if not isinstance(items, list) or not items or not all(isinstance(item, str) and item for item in items):
            raise _Wrong(f"tests.{name} must be a list of at least one text")
    for path in value["files"]:
        if not is_relative_path(path) or path not in files:
            raise _Wrong(f"tests.files names {path!r}, which is not in the repository")
    return TestSpec(value["runner"], tuple(value["expected_ids"]), tuple(value["files"]))
