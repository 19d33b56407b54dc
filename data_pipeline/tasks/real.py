"""Real code: source files from installed packages or a user's directory, cut down to one function where possible."""

import ast
import os
import random
import re
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from textwrap import dedent

from data_pipeline.tasks.generated import sentence
from data_pipeline.tasks.rule import Draft, Rule, fill
from data_pipeline.tasks.state import draw_prior
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


def default_roots(language: str) -> list[Path]:
    """Directories that usually hold code of `language` on this machine; empty when there are none."""
    if language == "python":
        candidates = [sysconfig.get_path("purelib"), sysconfig.get_path("stdlib")]
    else:
        candidates = list(NODE_ROOTS)
    return [Path(root) for root in candidates if Path(root).is_dir()]


def source_files(roots: Sequence[Path], language: str, rng: random.Random, limit: int) -> Iterator[tuple[str, str]]:
    """At most `limit` (path, text) pairs in an order drawn by `rng`; paths are relative to the root or package folder.

    Hidden folders, symbolic links, files over 20 kB, paths over `MAX_PATH_CHARS`, and files that are not UTF-8 or have
    Windows line ends are passed over.
    """
    found: dict[str, Path] = {}
    for root in roots:
        for folder, folders, names in os.walk(root, followlinks=False):
            folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in _FOREIGN)
            for name in names:
                path = Path(folder, name)
                # A nested node_modules is where that package really lives.
                shown = path.relative_to(root).as_posix().rpartition("node_modules/")[2]
                if path.suffix in EXTENSIONS[language] and len(shown) <= MAX_PATH_CHARS:
                    found.setdefault(shown, path)
    order = sorted(found)
    rng.shuffle(order)
    for shown in order:
        if limit == 0:
            return
        text = _read(found[shown])
        if text is not None:
            limit -= 1
            yield shown, text


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
        tree = ast.parse(text)
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
        ast.parse(text)
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
    task = Task(
        task_id=f"{rule.name}/real/{index:05d}",
        instruction=f"{sentence(rng.choice(rule.instructions))} {sentence(keep)}",
        language=rule.language,
        slice=f"{rule.language}/real",
        rule=rule.name,
        difficulty=rule.difficulty + 1,
        source="real",
        files=(SourceFile(path, text),),
        context=(SourceFile(path, shown),),
        prior_state=draw_prior(rng, path),
        tests=None,
        expected=(SourceFile(path, after),),
    )
    return Draft(task, rule, names, fill(rng.choice(rule.think), names), keep)
