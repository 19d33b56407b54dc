"""What the prompt shows of a file: whole lines around the first place that changes."""

from itertools import zip_longest


def first_change(before: str, after: str) -> int:
    """1-based number of the first line in which two different texts differ."""
    pairs = zip_longest(before.split("\n"), after.split("\n"))
    return next(number for number, (old, new) in enumerate(pairs, 1) if old != new)


def excerpt(text: str, line: int, limit: int) -> str:
    """Whole lines of `text` around 1-based `line`, at most `limit` characters; "" if that line alone is longer."""
    lines = text.rstrip("\n").split("\n")
    first = last = line - 1
    size = len(lines[first]) + 1
    if size > limit:
        return ""
    grown = True
    while grown:
        grown = False
        for index in (first - 1, last + 1):
            if 0 <= index < len(lines) and size + len(lines[index]) + 1 <= limit:
                size += len(lines[index]) + 1
                first, last = min(first, index), max(last, index)
                grown = True
    return "\n".join(lines[first : last + 1]).strip("\n") + "\n"
