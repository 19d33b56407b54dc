"""Which files an instruction speaks of, and which of their lines the prompt should show: literal words, no model."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from srl_jax.sandbox.engine import EXTENSIONS

_BACKQUOTED = re.compile(r"`([^`\n]+)`")
_IDENTIFIER = re.compile(r"(?<![\w$])[^\W\d]\w+")  # no metavariable: `$` comes before it
# A language that does not part words by spaces joins them to names of the code, which are mostly of ASCII letters.
_WORDS = (re.compile(r"[^\W\d][\w$.-]*[\w$]|\$[\w$.-]*[\w$]"), re.compile(r"[A-Za-z_$][\w$.-]*[\w$]", re.ASCII))
# What a person marks as code says most, then what can only be code (a_b, a.b, aB), then any other word.
_MARKED, _CODE_LIKE, _PLAIN = 9.0, 3.0, 1.0


@dataclass(frozen=True)
class Place:
    """A 1-based line of a file of one of ast-grep's languages, and how much of the instruction the file mentions."""

    path: str
    line: int
    language: str
    score: float


def language_of(path: str) -> str | None:
    """The language that the engine would treat this file as; None for none of its languages."""
    suffix = PurePosixPath(path).suffix
    return next((language for language, suffixes in EXTENSIONS.items() if suffix in suffixes), None)


def relevant_places(
    instruction: str, files: Mapping[str, str], *, languages: Sequence[str] = tuple(EXTENSIONS), limit: int = 3
) -> list[Place]:
    """The at most `limit` files that `instruction` names, or that hold its rarest words; best first, [] for none.

    A file named by its path or base name comes before every other. The line is the first that holds the file's
    heaviest word.
    """
    texts = {path: text for path, text in files.items() if language_of(path) in languages}
    weights = _weights(instruction)
    patterns = {word: re.compile(rf"(?<![\w$]){re.escape(word)}(?![\w$])") for word in weights}
    hits = {word: {path for path, text in texts.items() if patterns[word].search(text)} for word in weights}
    value = {word: weights[word] * math.log1p(len(texts) / len(paths)) for word, paths in hits.items() if paths}
    places = []
    for path, text in texts.items():
        words = [word for word in value if path in hits[word]]
        named = _is_named(path, instruction)
        if not words and not named:
            continue
        line = 1
        if words:
            heaviest = max(words, key=lambda word: (value[word], word))
            line = text.count("\n", 0, patterns[heaviest].search(text).start()) + 1
        score = sum(value[word] for word in words) + (1e6 if named else 0.0)
        places.append(Place(path, line, language_of(path), score))
    return sorted(places, key=lambda place: (-place.score, place.path))[:limit]


def holds_a_marked_name(instruction: str, code: str) -> bool:
    """Whether `code` holds a name that `instruction` marks by backquotes; True where anything marked has no name.

    Names are identifiers of two characters or more: not the `x` of `x.size()`, which stands for anything. An operator
    has none, so whoever marks one may mean just that. Marked paths are passed over; True where nothing else is marked.
    """
    marked = [text for text in _BACKQUOTED.findall(instruction) if "/" not in text and language_of(text) is None]
    names = [set(_IDENTIFIER.findall(text)) for text in marked]
    return not names or not all(names) or not set().union(*names).isdisjoint(_IDENTIFIER.findall(code))


def _is_named(path: str, instruction: str) -> bool:
    name = PurePosixPath(path).name
    pattern = rf"(?<![\w-])({re.escape(path)}|{re.escape(name)})(?![\w-])"
    return re.search(pattern, instruction, re.ASCII) is not None


def _weights(instruction: str) -> dict[str, float]:
    weights = dict.fromkeys(_BACKQUOTED.findall(instruction), _MARKED)
    for marked in list(weights):
        for word in _words(marked):  # `old(x, y)` may stand in no file as it is, `old` does
            weights.setdefault(word, _MARKED / 2)
    for word in _words(_BACKQUOTED.sub(" ", instruction)):
        code_like = re.search(r"[_.$\d]|[a-z][A-Z]", word) is not None
        weights.setdefault(word, _CODE_LIKE if code_like else _PLAIN)
    return weights


def _words(text: str) -> list[str]:
    return [word for pattern in _WORDS for word in pattern.findall(text)]
