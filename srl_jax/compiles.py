"""Counts compilations, so that a step whose shapes changed is seen: once every size was met there should be none."""

import contextlib
from collections.abc import Iterator

from jax import monitoring

_EVENT = "/jax/core/compile/backend_compile_duration"


class Compiles:
    """`count` programs were compiled, or fetched compiled from the cache."""

    count = 0

    def __call__(self, event: str, seconds: float, **_: object) -> None:
        self.count += event == _EVENT


@contextlib.contextmanager
def count_compiles() -> Iterator[Compiles]:
    """Counts what is compiled in any thread until it is left."""
    counter = Compiles()
    monitoring.register_event_duration_secs_listener(counter)
    try:
        yield counter
    finally:
        monitoring.unregister_event_duration_listener(counter)
