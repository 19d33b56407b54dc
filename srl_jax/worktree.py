"""Somebody's directory of code: what is read of it, when it may be written, and how.

Nothing outside the directory is read or written: a path that leads through a symbolic link is not one of its files.
"""

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from srl_jax.sandbox.globs import is_relative_path
from srl_jax.trace import StateUpdate, TraceError, parse_state, render_state

MAX_FILE_BYTES = 1 << 20
# Our own folder in the directory; its .gitignore keeps it out of version control, as other tools' caches do.
STATE_FOLDER = ".srl_jax"
_STATE_FILE = "state.json"
_NOT_SOURCE = {"node_modules", "__pycache__", "build", "dist", "target"}


class DirectoryError(ValueError):
    """A directory that cannot be worked on as asked; the message says why and what to do."""


def read_directory(root: Path) -> dict[str, str]:
    """Relative POSIX path -> text of every source-like file under `root`, in order.

    In a git tree these are the files git knows or would offer to add; elsewhere everything but hidden folders, virtual
    environments and build output. Links, files above 1 MiB and files that are not UTF-8, or whose names are not or hold
    a backslash, are left out.
    """
    if not root.is_dir():
        raise DirectoryError(f"{root}: not a directory; give --directory an existing one")
    listed = _git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", ".")
    paths = _walk(root) if listed is None else (path for path in listed.split("\0") if path)
    files = {}
    for path in sorted(set(paths)):
        if path.split("/")[0] == STATE_FOLDER or not _is_plain_name(path) or not _is_plain_file(root, path):
            continue
        data = (root / path).read_bytes() if (root / path).stat().st_size <= MAX_FILE_BYTES else None
        if data is not None:
            with contextlib.suppress(UnicodeDecodeError):
                files[path] = data.decode("utf-8")  # not read_text: line ends must come back as they were
    return files


def check_writable(root: Path) -> None:
    """Raises `DirectoryError` unless `git checkout` could undo whatever is written: a git tree with nothing
    uncommitted below `root`. Submodules are not ours to write and not looked into."""
    arguments = ("status", "--porcelain", "-z", "--untracked-files=all", "--ignore-submodules=dirty", "--", ".")
    done = _run_git(root, *arguments, settings=_without_filters(root))
    if done is None or done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip().partition("\n")[0] if done else "there is no git here"
        raise DirectoryError(
            f"{root}: not in a git tree that could undo an edit ({said.removeprefix('fatal: ')}); commit it first or "
            "use --force"
        )
    if done.stdout:
        first = done.stdout.decode("utf-8", "surrogateescape").split("\0")[0][3:]
        raise DirectoryError(f"{root}: has uncommitted changes ({first}); commit or stash them, or use --force")


def write_edits(root: Path, before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """Writes the files whose text differs; returns their paths.

    All new texts are on disk before the first file is replaced, and each file is replaced atomically. Raises
    `DirectoryError`, with nothing written, when a file is no longer what was read.
    """
    changed = sorted(path for path in after if after[path] != before.get(path))
    for path in changed:
        if not _is_plain_file(root, path) or (root / path).read_bytes() != before[path].encode("utf-8"):
            raise DirectoryError(f"{root / path}: changed since it was read, so nothing was written; run again")
    with _temporaries() as temporaries:
        for path in changed:
            target = root / path
            _write(temporaries, target.parent, target.name, after[path].encode("utf-8"))
            shutil.copymode(target, temporaries[-1])
        for path, temporary in zip(changed, temporaries, strict=True):
            temporary.replace(root / path)
    return changed


def load_state(root: Path) -> StateUpdate | None:
    """The planner's state after the last applied step, None before the first."""
    path = _state_folder(root) / _STATE_FILE
    if path.is_symlink():
        raise DirectoryError(f"{path}: is a link, and links are not followed; remove it")
    if not path.exists():
        return None
    try:
        return parse_state(path.read_text(encoding="utf-8"))
    except (TraceError, UnicodeDecodeError) as error:
        raise DirectoryError(f"{path}: not a planner's state ({error}); delete it to start afresh") from error


def save_state(root: Path, state: StateUpdate) -> None:
    """Keeps `state` for the next step, out of sight of version control."""
    folder = _state_folder(root)
    folder.mkdir(exist_ok=True)
    with _temporaries() as temporaries:
        for name, text in ((".gitignore", "*\n"), (_STATE_FILE, render_state(state) + "\n")):
            # A new name: one that can be foreseen may be a link which the tree brought along.
            _write(temporaries, folder, name, text.encode("utf-8"))
            temporaries[-1].replace(folder / name)


def _state_folder(root: Path) -> Path:
    folder = root / STATE_FOLDER
    if folder.is_symlink():
        raise DirectoryError(f"{folder}: is a link, and links are not followed; remove it")
    if folder.exists() and not folder.is_dir():
        raise DirectoryError(f"{folder}: is not a folder, and the state is kept in one; move it away")
    return folder


def _write(temporaries: list[Path], folder: Path, name: str, data: bytes) -> None:
    """A new file beside what is to be `name`, with `data` on disk, as the last of `temporaries`."""
    handle, path = tempfile.mkstemp(prefix=f".{name}.", dir=folder)
    temporaries.append(Path(path))
    with os.fdopen(handle, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _is_plain_name(path: str) -> bool:
    """Whether the sandbox and an action's globs can speak of the path. (Names that are no UTF-8 come as surrogates.)"""
    return is_relative_path(path) and not any("\ud800" <= character <= "\udfff" for character in path)


def _is_plain_file(root: Path, path: str) -> bool:
    target = Path(os.path.realpath(root)) / path  # Path.resolve raises on a loop of links
    return os.path.realpath(target) == str(target) and target.is_file()


def _walk(root: Path) -> Iterator[str]:
    for folder, names, files in os.walk(root):
        here = Path(folder)
        names[:] = [
            name
            for name in names
            if not name.startswith(".") and name not in _NOT_SOURCE and not (here / name / "pyvenv.cfg").exists()
        ]
        yield from ((here / name).relative_to(root).as_posix() for name in files)


def _git(root: Path, *arguments: str) -> str | None:
    """Output of git in `root`; None where there is no git, or no tree of it."""
    done = _run_git(root, *arguments)
    return done.stdout.decode("utf-8", "surrogateescape") if done and done.returncode == 0 else None


def _without_filters(root: Path) -> dict[str, str]:
    """Settings that turn off the filters which the tree's own configuration defines: programs that `git status` would
    run on files whose times differ from the index's, as all do in an archive just unpacked. The user's own stay."""
    done = _run_git(root, "config", "--null", "--show-scope", "--get-regexp", r"^filter\.")
    fields = done.stdout.decode("utf-8", "surrogateescape").split("\0") if done else []
    settings = {}
    for scope, entry in zip(fields[::2], fields[1::2], strict=False):
        driver = entry.partition("\n")[0].rpartition(".")[0]
        if scope not in ("system", "global"):
            settings |= {f"{driver}.clean": "", f"{driver}.process": "", f"{driver}.required": "false"}
    return settings


def _run_git(
    root: Path, *arguments: str, settings: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[bytes] | None:
    # Variables of a surrounding git (a hook's GIT_DIR) would point elsewhere; a file watcher of the tree's own
    # configuration would be a program that runs merely because somebody looked.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    given = {"core.fsmonitor": "false", **(settings or {})}
    environment["GIT_CONFIG_COUNT"] = str(len(given))
    for number, (key, value) in enumerate(given.items()):
        environment |= {f"GIT_CONFIG_KEY_{number}": key, f"GIT_CONFIG_VALUE_{number}": value}
    command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
    try:
        return subprocess.run(command, capture_output=True, env=environment, check=False)
    except FileNotFoundError:
        return None


@contextlib.contextmanager
def _temporaries() -> Iterator[list[Path]]:
    """Files that are gone at the end, unless they were moved into place."""
    paths: list[Path] = []
    try:
        yield paths
    finally:
        for path in paths:
            path.unlink(missing_ok=True)
