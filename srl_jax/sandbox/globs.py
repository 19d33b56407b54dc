"""Relative POSIX globs, matched in time linear in pattern times path.

Globs come from model output, so no regular expression is built from them: a pattern cannot make the
matcher backtrack.  `*` and `?` stay inside one path segment, `**` as a whole segment stands for any number of
segments, `[abc]`, `[a-z]` and `[!a-z]` are character classes, and everything else is literal.
"""

from __future__ import annotations

from collections.abc import Iterable


def is_relative_path(path: str) -> bool:
    """Whether `path` is a plain relative POSIX path: not absolute, no `..`, `.`, empty segment, NUL or backslash."""
    if not path or "\0" in path or "\\" in path:
        return False
    return all(segment not in ("", ".", "..") for segment in path.split("/"))


def matches(path: str, pattern: str) -> bool:
    """Whether the relative path is matched by the glob; a leading `./` of the glob is ignored."""
    segments = path.split("/")
    parts = pattern.removeprefix("./").split("/")
    # reachable[i]: the parts so far can consume exactly the first i segments.
    reachable = [True] + [False] * len(segments)
    for part in parts:
        if part == "**":
            reached = False
            for i, here in enumerate(reachable):
                reached = reached or here
                reachable[i] = reached
        else:
            tokens = _tokens(part)
            reachable = [False] + [
                here and _segment_matches(segment, tokens) for here, segment in zip(reachable, segments, strict=False)
            ]
    return reachable[-1]


def matches_any(path: str, patterns: Iterable[str]) -> bool:
    """Whether at least one of the globs matches the path."""
    return any(matches(path, pattern) for pattern in patterns)


def _tokens(part: str) -> list[str | tuple[bool, frozenset[tuple[str, str]]]]:
    """Split one glob segment into "*", "?", escaped literals ("=x") and classes (negated, ranges)."""
    tokens: list[str | tuple[bool, frozenset[tuple[str, str]]]] = []
    i = 0
    while i < len(part):
        char = part[i]
        close = part.find("]", i + 2) if char == "[" else -1
        if close > 0:
            body = part[i + 1 : close]
            negated = body[0] == "!"
            tokens.append((negated, frozenset(_ranges(body[1:] if negated else body))))
            i = close + 1
            continue
        if char in "*?":
            tokens.append(char)
        else:
            tokens.append("=" + char)
        i += 1
    return tokens


def _ranges(body: str) -> Iterable[tuple[str, str]]:
    i = 0
    while i < len(body):
        if i + 2 < len(body) and body[i + 1] == "-":
            yield body[i], body[i + 2]
            i += 3
        else:
            yield body[i], body[i]
            i += 1


def _one(char: str, token: str | tuple[bool, frozenset[tuple[str, str]]]) -> bool:
    if isinstance(token, str):
        return token == "?" or token == "=" + char
    negated, ranges = token
    return negated != any(low <= char <= high for low, high in ranges)


def _segment_matches(segment: str, tokens: list[str | tuple[bool, frozenset[tuple[str, str]]]]) -> bool:
    """Greedy two-pointer match: on a mismatch, the last star swallows one more character."""
    i = j = 0
    star = retry = -1
    while i < len(segment):
        if j < len(tokens) and tokens[j] == "*":
            star, retry = j, i
            j += 1
        elif j < len(tokens) and _one(segment[i], tokens[j]):
            i += 1
            j += 1
        elif star >= 0:
            retry += 1
            i, j = retry, star + 1
        else:
            return False
    return all(token == "*" for token in tokens[j:])
