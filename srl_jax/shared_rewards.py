"""A reward service of all hosts together: each scores its share of a batch, and all have every score.

Every process asks for the same items in the same order, and waits for results in the same order. The completions of a
task stay together, so that its host parses, embeds and executes for it alone.
"""

from collections.abc import Sequence
from itertools import groupby

from srl_jax import hosts
from srl_jax.sandbox.service import PendingScores, Score, ScoreRequest, ScoresCompletions
from srl_jax.sandbox.wire import decode_scores, encode_scores


class SharedRewards:
    """`own` scores this host's share; its `counts` are those of this host."""

    def __init__(self, own: ScoresCompletions) -> None:
        self._own = own

    @property
    def counts(self) -> dict[str, int]:
        return self._own.counts

    def score(self, items: Sequence[ScoreRequest]) -> list[Score]:
        return self.submit(items).result()

    def submit(self, items: Sequence[ScoreRequest]) -> PendingScores:
        tasks = [list(group) for _, group in groupby(items, key=lambda item: item.record.task.task_id)]
        mine = hosts.my_share(len(tasks))
        return _Pending(self._own.submit([item for task in tasks[mine.start : mine.stop] for item in task]))


class _Pending:
    """Scores that the hosts are making."""

    def __init__(self, own: PendingScores) -> None:
        self._own = own

    def result(self) -> list[Score]:
        """All of them, in order; waits for every host."""
        everyones = hosts.share([encode_scores([score]) for score in self._own.result()])
        return [decode_scores(piece, 1)[0] for pieces in everyones for piece in pieces]
