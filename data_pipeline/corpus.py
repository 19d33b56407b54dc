"""Real code from pinned packages: PyPI wheels, npm tarballs and Debian source packages, each known by its hash.

`third_party/manifest.toml` lists a corpus as an array of packages. An archive is downloaded by its registry's own
client (nothing of it is installed or run), checked, and its source files of moderate size are unpacked below the
cache as ``corpus/<language>-<hash of the list>/<package>/...``; links, absolute paths and ``..`` are never unpacked.
"""

import hashlib
import re
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.tasks.real import MAX_FILE_BYTES
from srl_jax.assets import MANIFEST, cache_dir
from srl_jax.sandbox.engine import EXTENSIONS

REGISTRIES = ("pypi", "npm", "debian")
_DEBIAN = ("http://deb.debian.org/debian/", "http://snapshot.debian.org/archive/debian/20250520T000000Z/")
_MAX_ARCHIVE_BYTES = 64 << 20
_MAX_FILES = 20_000  # of one package
_TIMEOUT_S = 300


@dataclass(frozen=True)
class Package:
    """One archive of a corpus. `file` is its name, in Debian's case its path in the archive; `folder` the subtree that
    is taken (a prefix of the members' paths, "" for all), `repository` the folder it is unpacked to."""

    repository: str
    language: str
    registry: str
    package: str
    version: str
    file: str
    sha256: str
    licence: str
    folder: str


def packages(corpus: str) -> list[Package]:
    """The packages of `corpus` as the manifest lists them; DataError naming the entry that is wrong."""
    listed = tomllib.loads(MANIFEST.read_text(encoding="utf-8")).get("corpus", {})
    if corpus not in listed:
        raise DataError(f"corpus is {corpus!r}; {MANIFEST} knows {', '.join(sorted(listed)) or 'none'}")
    return [_checked(f"corpus.{corpus}[{place}]", entry) for place, entry in enumerate(listed[corpus])]


def _checked(where: str, entry: dict[str, Any]) -> Package:
    names = [field.name for field in fields(Package)]
    if sorted(entry) != sorted(names) or not all(isinstance(value, str) for value in entry.values()):
        raise DataError(f"{MANIFEST}: {where} must have exactly these keys, with strings: {', '.join(names)}")
    if entry["registry"] not in REGISTRIES or entry["language"] not in EXTENSIONS:
        raise DataError(f"{MANIFEST}: {where} needs a registry of {REGISTRIES} and a language of {tuple(EXTENSIONS)}")
    if not re.fullmatch("[0-9a-f]{64}", entry["sha256"]) or not re.fullmatch(r"[\w.+-]+", entry["repository"]):
        raise DataError(f"{MANIFEST}: {where} needs a SHA-256 sum and a repository of plain characters")
    return Package(**entry)


def corpus_root(corpus: str, language: str) -> list[Path]:
    """The folder holding all packages of `corpus` in `language`, fetched on first use; [] if there is none.

    Raises DataError when a package cannot be had or its hash is not the manifest's.
    """
    chosen = [package for package in packages(corpus) if package.language == language]
    if not chosen:
        return []
    # Named by what is in it: another list, or another way to cut an archive, is another folder.
    digest = hashlib.sha256(repr(chosen).encode()).hexdigest()[:12]
    root = cache_dir() / "corpus" / f"{language}-{digest}"
    for package in chosen:
        if not (root / package.repository).is_dir():
            _install(package, root / package.repository)
    return [root]


def _install(package: Package, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        archive = _download(package, Path(scratch))
        with archive.open("rb") as handle:
            found = hashlib.file_digest(handle, "sha256").hexdigest()
        if found != package.sha256:
            raise DataError(
                f"{package.package} {package.version}: {archive.name} has SHA-256 {found}, {MANIFEST} says "
                f"{package.sha256}. Do not use it: check which {package.registry} registry it came from"
            )
        complete = Path(scratch) / "complete"
        unpack(archive, complete, package.folder, EXTENSIONS[package.language])
        try:
            complete.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was first
                raise


def _download(package: Package, scratch: Path) -> Path:
    if package.registry == "debian":
        return _download_debian(package, scratch)
    if package.registry == "pypi":
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
        command += ["--disable-pip-version-check", "--dest", str(scratch), f"{package.package}=={package.version}"]
    else:
        command = ["npm", "pack", "--silent", "--ignore-scripts", f"--pack-destination={scratch}"]
        command += [f"{package.package}@{package.version}"]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S
        )
        said = [line for line in done.stderr.splitlines() if line.strip()][-2:]
    except (OSError, subprocess.TimeoutExpired) as error:
        said = [str(error)]
    archive = scratch / package.file
    if not archive.is_file():
        raise _unavailable(package, " | ".join(said) or f"it brought no {package.file}")
    return archive


def _download_debian(package: Package, scratch: Path) -> Path:
    archive = scratch / PurePosixPath(package.file).name
    said = ""
    for base in _DEBIAN:
        try:
            with urllib.request.urlopen(base + package.file, timeout=60) as source:
                archive.write_bytes(source.read(_MAX_ARCHIVE_BYTES + 1))
            return archive
        except (urllib.error.URLError, TimeoutError, OSError) as error:
            said = str(error)
    raise _unavailable(package, said)


def _unavailable(package: Package, said: str) -> DataError:
    return DataError(
        f"{package.package} {package.version} cannot be fetched from {package.registry} ({said}); check the network, "
        f'or name your own code with --config.{package.language}_roots and --config.corpus=""'
    )


def unpack(archive: Path, target: Path, folder: str, suffixes: tuple[str, ...]) -> None:
    """Writes the regular files below `folder` with one of `suffixes`, at most `MAX_FILE_BYTES` each, into `target`.

    DataError for what is not an archive, or holds too many files.
    """
    target.mkdir(parents=True)
    count = 0
    try:
        for path, data in _members(archive, folder, suffixes):
            count += 1
            if count > _MAX_FILES:
                raise DataError(f"{archive.name} holds more than {_MAX_FILES} source files")
            place = target / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(data)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError) as error:
        raise DataError(f"{archive.name} cannot be unpacked: {error}") from error


def _members(archive: Path, folder: str, suffixes: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
    def inside(name: str, size: int) -> str | None:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or path.suffix not in suffixes:
            return None
        if size > MAX_FILE_BYTES or not name.startswith(folder) or any(part.startswith(".") for part in path.parts):
            return None
        return name[len(folder) :].lstrip("/") or None

    if archive.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(archive) as bundle:
            for entry in bundle.infolist():
                if not entry.is_dir() and (path := inside(entry.filename, entry.file_size)):
                    yield path, bundle.read(entry)
        return
    with tarfile.open(archive) as bundle:
        for entry in bundle:
            if entry.isreg() and (path := inside(entry.name, entry.size)):
                handle = bundle.extractfile(entry)
                if handle is not None:
                    yield path, handle.read()
