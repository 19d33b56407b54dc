"""Real code: source files from installed packages or a user's directory, cut down to one function where possible."""

import ast
import os
import random
import re
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

from data_pipeline.syntax import parse_python
from data_pipeline.tasks.generated import sentence
from data_pipeline.tasks.rule import Draft, Rule, fill
from data_pipeline.tasks.state import draw_prior, for_test_code
from srl_jax.excerpt import excerpt, first_change
from srl_jax.records import SourceFile, Task
from srl_jax.sandbox.engine import EXTENSIONS, EngineResult, Status
from srl_jax.trace import Action

MAX_FILE_BYTES = 20_000
MAX_PATH_CHARS = 32
MAX_MATCHES = 6  # more edits than the excerpt can show make the task a guess

NODE_ROOTS = ("/usr/lib/node_modules", "/usr/local/lib/node_modules", "/usr/share/nodejs")

# Build products, and packages of another environment that happen to lie below the standard library.
_FOREIGN = {"__pycache__", "site-packages", "dist-packages"}

Apply = Callable[[Action, Mapping[str, str]], EngineResult]


@dataclass(frozen=True)
class RealFile:
    """One file of real code: the repository it belongs to, the path that prompts show, and where it lies."""

    repository: str
    path: str
    place: Path


def default_roots(language: str) -> list[Path]:
    """Directories that usually hold code of `language` on this machine; empty when there are none."""
    if language == "python":
        candidates = [sysconfig.get_path("purelib"), sysconfig.get_path("stdlib")]
    elif language == "javascript":
        candidates = list(NODE_ROOTS)
    else:
        candidates = []
    return [Path(root) for root in candidates if Path(root).is_dir()]


def find_files(roots: Sequence[Path], language: str, *, shorten: bool = False) -> list[RealFile]:
    """The files of `language` below `roots`, by path; paths are relative to the root or package folder.

    Hidden folders and symbolic links to folders are not entered. A path over `MAX_PATH_CHARS` is passed over, or
    shown by its last parts if `shorten`; of two files shown alike the first is taken. A file's repository is its first
    folder, `@scope/name` for scoped packages.
    """
    found: dict[str, RealFile] = {}
    for root in roots:
        for folder, folders, names in os.walk(root, followlinks=False):
            folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in _FOREIGN)
            for name in sorted(names):
                place = Path(folder, name)
                if place.suffix not in EXTENSIONS[language]:
                    continue
                # A nested node_modules is where that package really lives.
                path = place.relative_to(root).as_posix().rpartition("node_modules/")[2]
                parts = path.split("/")
                repository = "/".join(parts[:2] if path.startswith("@") else parts[:1])
                shown = _last_parts(parts) if shorten else path
                if len(shown) <= MAX_PATH_CHARS:
                    found.setdefault(shown, RealFile(repository, shown, place))
    return [found[path] for path in sorted(found)]


def _last_parts(parts: Sequence[str]) -> str:
    """As many of the last parts of a path as fit into `MAX_PATH_CHARS`, at least one."""
    kept = parts[-1]
    for part in reversed(parts[:-1]):
        if len(part) + 1 + len(kept) > MAX_PATH_CHARS:
            break
        kept = f"{part}/{kept}"
    return kept


def read_files(files: Sequence[RealFile], rng: random.Random, limit: int) -> Iterator[tuple[RealFile, str]]:
    """At most `limit` files with their texts, in an order drawn by `rng`.

    Links, files over 20 kB, and files that are not UTF-8 or have Windows line ends are passed over.
    """
    order = list(files)
    rng.shuffle(order)
    for file in order:
        if limit == 0:
            return
        text = _read(file.place)
        if text is not None:
            limit -= 1
            yield file, text


def _read(path: Path) -> str | None:
    """The text of a regular UTF-8 file of moderate size with Unix line ends, else None."""
    try:
        if path.is_symlink() or not path.is_file() or path.stat().st_size > MAX_FILE_BYTES:
            return None
        text = path.read_bytes().decode("utf-8")
    except (UnicodeDecodeError, OSError):
        return None
    return None if "\r" in text or "\0" in text else text


def enclosing_function(text: str, line: int) -> str | None:
    """The innermost Python function around 1-based `line`, dedented to stand alone; None if there is none."""
    try:
        tree = parse_python(text)
    except (SyntaxError, ValueError, RecursionError):
        return None
    best: ast.FunctionDef | ast.AsyncFunctionDef | None = None
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        inside = _first_line(node) <= line <= _last_line(node)
        if inside and (best is None or _first_line(node) >= _first_line(best)):
            best = node
    if best is None:
        return None
    body = dedent("\n".join(text.split("\n")[_first_line(best) - 1 : _last_line(best)])) + "\n"
    return body if _parses(body) else None


def _parses(text: str) -> bool:
    try:
        parse_python(text)
    except (SyntaxError, ValueError, RecursionError):
        return False
    return True


def _first_line(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])


def _last_line(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return node.end_lineno or node.lineno


def real_draft(rule: Rule, path: str, text: str, index: int, seed: int, apply: Apply, max_excerpt: int) -> Draft | str:
    """A task from one real file, or the reason there is none.

    There is no second opinion on what a rule does to real code: the expected files are what the engine makes of
    them, guarded by the reparse inside the engine, a limit on matches, and the first match being in view.
    """
    match = re.search(rule.real, text, re.MULTILINE)
    if not rule.real or not match:
        return "no_hint"
    rng = random.Random(f"{seed}/{rule.name}/{path}")
    names: dict[str, str] = {}
    if rule.language == "python":
        text = enclosing_function(text, text.count("\n", 0, match.start()) + 1) or text
    action = Action(rule.language, rule.pattern, rule.replacement, (path,), rule.constraints)
    result = apply(action, {path: text})
    if result.status is not Status.OK:
        return f"action:{result.status}"
    if result.overlaps or sum(result.matches.values()) > MAX_MATCHES:
        return "too_many_matches"
    after = result.files_after[path]
    shown = excerpt(text, first_change(text, after), max_excerpt)
    if not shown:
        return "long_line"
    keep = rule.keep if "«" not in rule.keep else "keep other calls"
    instruction = f"{sentence(rng.choice(rule.instructions))} {sentence(keep)}"
    prior = draw_prior(rng, path)
    task = Task(
        task_id=f"{rule.name}/real/{index:05d}",
        instruction=instruction,
        language=rule.language,
        slice=f"{rule.language}/real",
        rule=rule.name,
        difficulty=rule.difficulty + 1,
        source="real",
        files=(SourceFile(path, text),),
        context=(SourceFile(path, shown),),
        prior_state=for_test_code(prior) if "test" in path.lower() else prior,
        tests=None,
        expected=(SourceFile(path, after),),
    )
    return Draft(task, rule, names, fill(rng.choice(rule.think), names), keep)
