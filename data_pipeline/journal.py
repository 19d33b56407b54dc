"""What the sandbox has already said: an append-only file beside the data set under construction.

Building is a pure function of the configuration, and only executing is dear. So an interrupted build is simply started
again: it asks the same questions in the same order, and those already answered are answered from here. Nothing is lost
because every answer is written when it is known, and nothing doubled because answers are looked up, not records added.
"""

import hashlib
import json
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


class Journal:
    """Answers by question, both plain JSON data; thread-safe. A line that a kill cut short is forgotten."""

    def __init__(self, path: Path) -> None:
        self.path, self.found = path, 0
        self._lock = threading.Lock()
        self._answers: dict[str, Any] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        damaged = 0
        if path.exists():
            for line in path.read_bytes().split(b"\n"):
                try:
                    key, answer = json.loads(line)
                    self._answers[key] = answer
                except (ValueError, TypeError):
                    damaged += bool(line)
        if damaged:
            log.warning("%s: %d damaged lines, their steps are executed again", path, damaged)
        self._file = path.open("ab")
        if self._answers or damaged:
            self._file.write(b"\n")  # whatever a cut line left stands alone
            self._file.flush()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._answers)

    def ask(self, question: Any, answer: Callable[[], Any]) -> Any:
        """The known answer to `question`, else `answer()`, which is written down before it is returned."""
        if question in self:
            return self.look_up(question)
        told = answer()
        self.tell(question, told)
        return told

    def __contains__(self, question: Any) -> bool:
        with self._lock:
            return _key(question) in self._answers

    def look_up(self, question: Any) -> Any:
        """The known answer to `question`, or None."""
        with self._lock:
            told = self._answers.get(_key(question))
            self.found += told is not None
            return told

    def tell(self, question: Any, told: Any) -> None:
        """Writes an answer down."""
        key = _key(question)
        line = json.dumps([key, told]).encode() + b"\n"
        with self._lock:
            self._answers[key] = told
            self._file.write(line)
            self._file.flush()

    def remove(self) -> None:
        """The data set is complete: what was said stands in its records."""
        self._file.close()
        self.path.unlink(missing_ok=True)


def _key(question: Any) -> str:
    return hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()
