"""Chunks are how records travel, not what is seen of them: elements and states are Grain's own over the same source."""

import grain
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.chunked import CHUNK, chunked

# Lengths about the end of a chunk, and elements that are left out.
SOURCES = st.integers(0, 3 * CHUNK + 1).flatmap(
    lambda length: st.sets(st.integers(0, 3 * CHUNK)).map(
        lambda gone: [None if place in gone else place for place in range(length)]
    )
)


def plain(source):
    """The same through Grain alone, an element at a time."""
    return iter(grain.MapDataset.source(source).to_iter_dataset(grain.ReadOptions(0, 0)))


def states(stream):
    seen = [stream.get_state()]
    for element in stream:
        seen.append((element, stream.get_state()))
    return seen


@settings(deadline=None, max_examples=30)
@given(SOURCES)
def test_elements_and_states_are_those_of_grain_alone(source):
    assert states(iter(chunked(source))) == states(plain(source))


@settings(deadline=None, max_examples=30)
@given(SOURCES, st.data())
def test_a_state_of_either_is_a_state_of_the_other(source, data):
    at = {"next_index": data.draw(st.integers(0, len(source)))}
    ours, theirs = iter(chunked(source)), plain(source)
    next(ours, None)  # a chunk that is no longer wanted
    ours.set_state(at)
    theirs.set_state(at)
    assert list(ours) == list(theirs) == [element for element in source[at["next_index"] :] if element is not None]
    assert list(ours) == []


@pytest.mark.parametrize("size", [1, 5, CHUNK])
def test_batches(size):
    batches = list(iter(chunked(range(2 * CHUNK + 3)).batch(size, batch_fn=list)))
    assert [element for batch in batches for element in batch] == list(range(2 * CHUNK + 3))
    assert {len(batch) for batch in batches[:-1]} == {size}


def test_an_error_is_raised_where_it_happened_and_nothing_is_lost():
    class Storage:
        down = True

        def __len__(self):
            return 4 * CHUNK

        def __getitem__(self, place):
            if self.down and place == CHUNK + 3:
                raise OSError("storage is gone")
            return place

    storage = Storage()
    stream = iter(chunked(storage))
    assert [next(stream) for _ in range(CHUNK)] == list(range(CHUNK))
    for _ in range(2):
        with pytest.raises(OSError, match="storage is gone"):
            next(stream)
    storage.down = False
    assert list(stream) == list(range(CHUNK, 4 * CHUNK))
