"""What teachers said, kept for ever: an append-only folder of JSON lines, compressed as it fills up.

A line is on disk before it counts as stored. Lines go to one open segment; a full segment is compressed beside it
and then removed, so that a kill at any moment leaves either the one or the other, or both, which is noticed. A last
line without its end was never stored and is cut off. Nothing here deletes an answer.
"""

import fcntl
import gzip
import json
import logging
import os
import re
import threading
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.write import sync_folder

log = logging.getLogger(__name__)

FORMAT = "srl-raw/1"
SEGMENT_LINES = 5000


class RawStore:
    """Answers by key. One process at a time writes to a folder; threads may share the object.

    Raises DataError for a folder that is in use by another process or holds lines that cannot be read.
    """

    def __init__(self, folder: Path, segment_lines: int = SEGMENT_LINES) -> None:
        self._folder, self._segment_lines = folder, segment_lines
        self._answers: dict[str, dict[str, Any]] = {}
        self._failures: list[dict[str, Any]] = []
        self._write_lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = (folder / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel frees it when this process dies
        except BlockingIOError:
            self._lock.close()
            raise DataError(f"{folder} is in use by another run; wait for its end, or give another --store") from None
        try:
            self._recover()
        except BaseException:
            self._lock.close()
            raise
        self._file = self._open_path.open("ab")

    def __enter__(self) -> "RawStore":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._answers)

    @property
    def _open_path(self) -> Path:
        return self._folder / f"{self._segment:05d}.jsonl"

    def get(self, key: str) -> dict[str, Any] | None:
        """The stored answer's line, or None."""
        return self._answers.get(key)

    def answers(self) -> Iterator[dict[str, Any]]:
        """All stored answers in the order they came in."""
        return iter(list(self._answers.values()))

    def failures(self) -> list[dict[str, Any]]:
        """Requests that got no answer; they cost something and will be asked again."""
        return list(self._failures)

    def add(self, key: str, line: Mapping[str, Any], *, failed: bool = False) -> None:
        """Stores a line under `key`; it is on disk when this returns. ValueError for a key that has its answer."""
        stored = {"format": FORMAT, "kind": "failure" if failed else "answer", "key": key, **line}
        # Half a surrogate pair, which a teacher may well write, becomes the JSON escape it came from.
        data = (json.dumps(stored, ensure_ascii=False, sort_keys=True) + "\n").encode("utf-8", "backslashreplace")
        with self._write_lock:
            if key in self._answers:
                raise ValueError(f"{key} already has its answer")
            self._file.write(data)
            self._file.flush()
            os.fsync(self._file.fileno())
            self._remember(stored)
            self._lines += 1
            if self._lines >= self._segment_lines:
                self._seal()

    def close(self) -> None:
        """Compresses what is open and frees the folder."""
        with self._write_lock:
            if self._lines:
                self._seal()
            self._file.close()
            self._open_path.unlink(missing_ok=True)
            self._lock.close()

    def _remember(self, line: dict[str, Any]) -> None:
        if line["kind"] == "failure":
            self._failures.append(line)
        else:
            self._answers[line["key"]] = line

    def _seal(self) -> None:
        """Compresses the open segment and starts the next."""
        self._file.close()
        _compress(self._open_path)
        self._segment += 1
        self._lines = 0
        self._file = self._open_path.open("ab")

    def _recover(self) -> None:
        """Reads every segment, finishing what a kill interrupted. Files of other names are not ours."""
        for leftover in self._segments("tmp"):
            leftover.unlink()
        for path in self._segments("jsonl.gz"):
            self._read(path, _uncompressed(path))
        for open_path in self._segments("jsonl"):
            if open_path.with_suffix(".jsonl.gz").exists():
                open_path.unlink()  # compressed already; the kill came before its removal
        self._segment, self._lines = 0, 0
        sealed, opened = self._segments("jsonl.gz"), self._segments("jsonl")
        for path in opened:
            data = path.read_bytes()
            whole = data[: data.rfind(b"\n") + 1]
            self._read(path, whole)
            if len(whole) < len(data):
                log.warning("%s: the last line was never finished and is cut off", path)
                with path.open("r+b") as file:
                    file.truncate(len(whole))
                    os.fsync(file.fileno())
        for path in opened[:-1]:
            _compress(path)
        if opened:
            self._segment = int(opened[-1].stem)
            self._lines = opened[-1].read_bytes().count(b"\n")
        elif sealed:
            self._segment = int(sealed[-1].name.partition(".")[0]) + 1

    def _segments(self, ending: str) -> list[Path]:
        """Segments of this ending in the order they were written."""
        named = re.compile(rf"\d{{5,}}\.{re.escape(ending)}")
        found = [path for path in self._folder.iterdir() if named.fullmatch(path.name)]
        return sorted(found, key=lambda path: int(path.name.partition(".")[0]))

    def _read(self, path: Path, data: bytes) -> None:
        for number, raw in enumerate(data.splitlines(), start=1):
            try:
                line = json.loads(raw)
                known = line["format"] == FORMAT and line["kind"] in ("answer", "failure") and line["key"]
            except (ValueError, TypeError, KeyError):
                known = False
            if not known:
                raise DataError(
                    f"{path}, line {number} is not a line of {FORMAT}: the file was changed or damaged; restore it "
                    "from a copy, or move it away to ask its tasks again"
                )
            if line["kind"] == "answer" and line["key"] in self._answers:
                log.warning("%s, line %d: %s has its answer already; the first one stands", path, number, line["key"])
                continue
            self._remember(line)


def _compress(path: Path) -> None:
    target = path.with_suffix(".jsonl.gz")
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        file.write(gzip.compress(path.read_bytes(), mtime=0))
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(target)
    sync_folder(path.parent)
    path.unlink()


def _uncompressed(path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path} is damaged ({error}); restore it from a copy, or move it away to ask its tasks again"
        ) from None
