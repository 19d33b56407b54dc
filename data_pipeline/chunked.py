"""Grain over a random-access source, a chunk of elements at a time; a position still counts single elements.

Grain hands each element from its reading threads to the consumer by a future of its own. Where an element is a tenth of
a millisecond of Python, those hand-overs, and the threads' quarrel over the interpreter's lock at each, cost as much as
the elements. One thread that makes a few dozen at a time has neither, and the consumer finds them ready.
"""

from collections.abc import Callable, Sequence
from typing import Any

import grain

CHUNK = 32
# Decoding holds the interpreter's lock, so a second thread would only take turns with the first. Two chunks ahead.
_READ = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)


Exchange = Callable[[list[Any]], list[Any]]


def chunked(source: Sequence[Any], exchange: Exchange = list, hosts: int = 1) -> grain.IterDataset:
    """The source's elements in order, None left out, read ahead in the background.

    The state of its iterators is ``{"next_index": position}``, that of Grain's own over the same source: the number of
    elements, None included, before the next one.

    Where each of several hosts has a source of its own, all equally long, `exchange` makes of this host's next
    elements all hosts' in turn. Every host then iterates over the elements of all, and positions count these.
    """
    return _Elements(grain.MapDataset.source(_Chunks(source)).to_iter_dataset(_READ), exchange, CHUNK * hosts)


class _Chunks:
    """A source whose element is a list of up to `CHUNK` elements of another source."""

    def __init__(self, source: Sequence[Any]) -> None:
        self._source = source

    def __len__(self) -> int:
        return -(-len(self._source) // CHUNK)

    def __getitem__(self, index: int) -> list[Any]:
        return [self._source[i] for i in range(index * CHUNK, min((index + 1) * CHUNK, len(self._source)))]


class _Elements(grain.IterDataset):
    def __init__(self, chunks: grain.IterDataset, exchange: Exchange, width: int) -> None:
        super().__init__(chunks)
        self._exchange, self._width = exchange, width

    def __iter__(self) -> grain.DatasetIterator:
        return _ElementIterator(self._parent.__iter__(), self._exchange, self._width)


class _ElementIterator(grain.DatasetIterator):
    def __init__(self, chunks: grain.DatasetIterator, exchange: Exchange, width: int) -> None:
        super().__init__(chunks)
        self._chunks, self._exchange, self._width = chunks, exchange, width
        self._position = 0
        self._chunk: list[Any] | None = None  # the one `_position` lies in, unless it is not read yet

    def __next__(self) -> Any:
        while True:
            offset = self._position % self._width
            if self._chunk is None or not offset:
                self._read_chunk()
            if offset >= len(self._chunk):
                raise StopIteration
            self._position += 1
            if self._chunk[offset] is not None:
                return self._chunk[offset]

    def _read_chunk(self) -> None:
        try:
            self._chunk = self._exchange(next(self._chunks))
        except StopIteration:
            raise
        except Exception:
            self.set_state(self.get_state())  # Grain would go on with the chunk after it, at this one's position
            raise

    def get_state(self) -> dict[str, int]:
        return {"next_index": self._position}

    def set_state(self, state: dict[str, int]) -> None:
        self._chunks.set_state({"next_index": state["next_index"] // self._width})
        self._position, self._chunk = state["next_index"], None
