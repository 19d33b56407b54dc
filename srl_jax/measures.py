"""What a report measures: numbers of one task's item in an evaluation, and the kinds of task they are split by."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import comb
from typing import Any

Item = Mapping[str, Any]


def pass_at_k(samples: int, successes: int, k: int) -> float:
    """Chance that one of `k` answers drawn without replacement from `samples` is among the `successes`.

    1 - C(n - c, k) / C(n, k): the unbiased estimator of Codex (arXiv 2107.03374, equation 1).
    """
    if not 0 <= successes <= samples or not 1 <= k <= samples:
        raise ValueError(f"{successes} successes of {samples} samples, k {k}: no such draw")
    return 1.0 - comb(samples - successes, k) / comb(samples, k)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _number(value: bool | None) -> float | None:
    return None if value is None else float(value)


def _parsed(answer: Item) -> float | None:
    return None if answer["reward"] is None else float(answer["rejection"] is None)


def _of(drawn: str, value_of: Callable[[Item], float | None]) -> Callable[[Item], float | None]:
    """The mean over an item's further answers, `sampled` or `free`; None for an item without any."""
    return lambda item: _mean(value_of(answer) for answer in item.get(drawn) or ())


def _pass_at(k: int) -> Callable[[Item], float | None]:
    def of(item: Item) -> float | None:
        known = [answer["success"] for answer in item.get("sampled") or () if answer["success"] is not None]
        return pass_at_k(len(known), sum(known), k) if len(known) >= k else None

    return of


# Row of the tables -> value of one item; None where there is none: a malformed trace has no components, one that the
# sandbox could not judge has no reward, and a floor samples nothing.
MEASURES: Mapping[str, Callable[[Item], float | None]] = {
    "reward": lambda item: item["reward"],
    "R_action": lambda item: item["action"],
    "R_state": lambda item: item["state"],
    "R_think": lambda item: item["think"],
    "brevity penalty": lambda item: item["brevity"],
    "parse rate": _parsed,
    "execution success": lambda item: _number(item["success"]),
    "match-set F1": lambda item: item.get("match_f1"),
    "match-set precision": lambda item: item.get("match_precision"),
    "match-set recall": lambda item: item.get("match_recall"),
    "KL per token": lambda item: item["kl"],
    "tokens in think": lambda item: item["think_tokens"],
    "tokens in action": lambda item: item.get("action_tokens"),
    "tokens in state update": lambda item: item["state_tokens"],
    "sampled: reward": _of("sampled", lambda answer: answer["reward"]),
    "sampled: KL per token": _of("sampled", lambda answer: answer["kl"]),
    **{f"sampled: pass@{k}": _pass_at(k) for k in (1, 2, 4, 8, 16, 32)},
    "without the grammar: parse rate": _of("free", _parsed),
    "without the grammar: reward": _of("free", lambda answer: answer["reward"]),
    "without the grammar: execution success": _of("free", lambda answer: _number(answer["success"])),
}

_SOURCES = {"generated": "synthetic", "real": "real", "user": "a user's own"}
_RULES = {True: "seen in training", False: "held out", None: None}


def _step(item: Item) -> str | None:
    if "step" not in item:
        return None
    return "a task of its own" if item["step"] is None else f"step {item['step']} of an episode"


# Kind of a task -> which of its values an item has; None in evaluations of before there were kinds.
KINDS: Mapping[str, Callable[[Item], str | None]] = {
    "language": lambda item: item.get("language"),
    "code": lambda item: _SOURCES.get(item.get("source", "")),
    "rule": lambda item: _RULES[item.get("rule_seen")],
    "place": _step,
}


def values_of(items: Iterable[Item], measure: str) -> list[float]:
    """What a measure of `MEASURES` is for each item that has it."""
    values = (MEASURES[measure](item) for item in items)
    return [value for value in values if value is not None]


def kinds_of(items: Sequence[Item]) -> dict[tuple[str, str], list[Item]]:
    """(kind, value) -> the items of it, in the order of `KINDS`."""
    found: dict[tuple[str, str], list[Item]] = {}
    for kind, value_of in KINDS.items():
        for value in sorted({value_of(item) for item in items} - {None}):
            found[kind, value] = [item for item in items if value_of(item) == value]
    return found
