"""Reads a teacher's answer as it streams in: cut at the end of the trace, given up at the first thing out of order.

Nothing is repaired. What is cut off behind `</state_update>` is commentary, never read; an answer that opens with
anything but `<think>` cannot become a trace any more, so waiting for its end would only cost money.
"""

from collections.abc import Callable

from srl_jax.trace import TAGS, Rejection

THINK_TOO_LONG = "think_too_long"
_LONGEST_TAG = max(map(len, TAGS))
_COUNT_EVERY = 200  # characters of think between two counts of its tokens


class StreamGuard:
    """Feed it pieces; `done` says that the trace is complete, `cut` why the answer is given up ("" while it is not).

    `text` is everything worth keeping: up to and including `</state_update>`, or all that came before giving up. With
    fewer `tags` the answer is complete at the last of those.
    """

    def __init__(self, count_tokens: Callable[[str], int], max_think_tokens: int, tags: tuple[str, ...] = TAGS) -> None:
        self._count_tokens, self._max_think_tokens, self._tags = count_tokens, max_think_tokens, tags
        self._seen = 0  # tags, in their order
        self._block_start = self._searched = 0
        self._counted_at = 0
        self.text, self.cut, self.done = "", "", False

    def feed(self, piece: str) -> bool:
        """Takes the next piece; False as soon as nothing more need be read."""
        if "\ud800" <= self.text[-1:] <= "\udbff" and "\udc00" <= piece[:1] <= "\udfff":
            # The second half of a character, sent apart from the first.
            piece = (self.text[-1] + piece).encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
            self.text = self.text[:-1]
        self.text += piece
        while not self.done and not self.cut and self._step():
            pass
        return not self.done and not self.cut

    def _step(self) -> bool:
        """Moves on by one tag; False where more text is needed."""
        return self._leave_block() if self._seen % 2 else self._enter_block()

    def _enter_block(self) -> bool:
        rest = self.text[self._block_start :].lstrip()
        tag = self._tags[self._seen]
        if rest.startswith(tag):
            self._advance(len(self.text) - len(rest) + len(tag))
            return True
        if not tag.startswith(rest):  # an empty rest is the beginning of every tag
            begun = next((other for other in TAGS if rest.startswith(other) or other.startswith(rest)), None)
            self.cut = self._misplaced(begun) if begun else Rejection.STRAY_TEXT
        return False

    def _leave_block(self) -> bool:
        found = [(place, tag) for tag in TAGS if (place := self.text.find(tag, self._searched)) >= 0]
        if self._seen == 1:
            self._check_think(min(found)[0] if found else len(self.text), closed=bool(found))
            if self.cut:
                return False
        if not found:
            self._searched = max(self._block_start, len(self.text) - _LONGEST_TAG)
            return False
        place, tag = min(found)
        if tag != self._tags[self._seen]:
            self.cut = self._misplaced(tag)
            return False
        self._advance(place + len(tag))
        if self._seen == len(self._tags):
            self.done, self.text = True, self.text[: self._block_start]
        return True

    def _advance(self, place: int) -> None:
        self._seen += 1
        self._block_start = self._searched = place

    def _misplaced(self, tag: str) -> str:
        return Rejection.REPEATED_TAG if tag in TAGS[: self._seen] else Rejection.MISORDERED_TAG

    def _check_think(self, end: int, closed: bool) -> None:
        if closed or end - self._counted_at >= _COUNT_EVERY:
            self._counted_at = end
            if self._count_tokens(self.text[self._block_start : end]) > self._max_think_tokens:
                self.cut = THINK_TOO_LONG
