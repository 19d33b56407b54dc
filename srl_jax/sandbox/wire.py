"""What travels between a reward server and its client: requests and scores as JSON, and what both must agree on.

A request names each record once, however many completions answer it.  The two ends can differ in what a score means
(reward version and weights, the tokenizer that think lengths are measured in), and such a difference would be silent:
so every request carries a `Contract`, and the server refuses one that is not its own.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from srl_jax.records import CorruptRecord, TeacherRecord, decode_record, encode_record
from srl_jax.rewards import REWARD_VERSION, Reward, RewardConfig
from srl_jax.sandbox.runner import EnvReport
from srl_jax.sandbox.service import Score, ScoreRequest
from srl_jax.trace import Rejection

WIRE_VERSION = "srl-score/3"
SERVER_TOKEN = "SRL_JAX_REWARD_TOKEN"  # the variable of the environment in which both ends find the secret


class WireError(ValueError):
    """A message that is not one of this version; says which part is wrong."""


class RemoteError(RuntimeError):
    """A reward server that refuses us for a reason that waiting will not mend; the message says which."""


@dataclass(frozen=True)
class Contract:
    """What a score depends on beside the request: `tokenizer` is Tokenizer.fingerprint, `reward` the weights."""

    tokenizer: str
    reward: RewardConfig

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        weights = dataclasses.asdict(self.reward)
        return {"wire": WIRE_VERSION, "version": REWARD_VERSION, "tokenizer": self.tokenizer, "reward": weights}

    def difference(self, other: object) -> str | None:
        """What the other end's contract, as JSON data, has otherwise; None when they agree."""
        ours = self.to_dict()
        if not isinstance(other, dict) or not isinstance(other.get("reward"), dict):
            return "the request carries no contract"
        theirs = {**other, **other["reward"]}
        flat = {**ours, **ours["reward"]}
        for name in sorted(flat.keys() | theirs.keys()):
            if name != "reward" and flat.get(name) != theirs.get(name):
                return f"{name} is {flat.get(name)!r} here and {theirs.get(name)!r} with the client"
        return None


@dataclass(frozen=True)
class Request:
    """A decoded scoring request; `contract` is whatever the client sent for one."""

    contract: object
    execute: bool
    items: list[ScoreRequest]


def encode_request(items: Sequence[ScoreRequest], contract: Contract, *, execute: bool) -> bytes:
    """The body of a scoring request; `execute` asks for every report, also where the reward needs none.

    Raises CorruptRecord for a record that cannot be stored.
    """
    places: dict[int, int] = {}  # by identity: a group's completions share one record
    records: list[str] = []
    rows = []
    for item in items:
        if id(item.record) not in places:
            places[id(item.record)] = len(records)
            records.append(encode_record(item.record).decode("utf-8"))
        rows.append([places[id(item.record)], item.completion])
    # ASCII, so that lone surrogates, which a completion may hold, travel as escapes.
    message = {"contract": contract.to_dict(), "execute": execute, "records": records, "items": rows}
    return json.dumps(message).encode("ascii")


def decode_request(body: bytes) -> Request:
    """The inverse; raises WireError naming the part that is wrong."""
    try:
        message = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise WireError(f"the body is not JSON: {error}") from error
    if not isinstance(message, dict) or message.keys() != {"contract", "execute", "records", "items"}:
        raise WireError("the body must be an object with contract, execute, records and items")
    for name, kind in (("execute", bool), ("records", list), ("items", list)):
        if not isinstance(message[name], kind):
            raise WireError(f"{name} must be a {kind.__name__}")
    records: list[TeacherRecord] = []
    for number, text in enumerate(message["records"]):
        try:
            if not isinstance(text, str):
                raise CorruptRecord("must be a string")
            records.append(decode_record(text.encode("utf-8")))
        except (CorruptRecord, UnicodeEncodeError) as error:
            raise WireError(f"records[{number}]: {error}") from error
    items = []
    for number, row in enumerate(message["items"]):
        if not isinstance(row, list) or [type(part) for part in row] != [int, str] or not 0 <= row[0] < len(records):
            raise WireError(f"items[{number}] must be [number of a record, completion]")
        items.append(ScoreRequest(row[1], records[row[0]]))
    return Request(message["contract"], message["execute"], items)


def encode_scores(scores: Sequence[Score]) -> bytes:
    """The body of an answer."""
    rows = [
        {
            "reward": dataclasses.asdict(score.reward) if score.reward else None,  # Rejection is a string already
            "report": score.report.to_dict() if score.report else None,
            "unscored": score.unscored,
            "match": [score.match_f1, score.match_precision, score.match_recall],
            "queued_s": score.queued_s,
        }
        for score in scores
    ]
    return json.dumps({"scores": rows}).encode("ascii")


def decode_scores(body: bytes, count: int) -> list[Score]:
    """The scores of an answer to `count` items; raises WireError for anything else."""
    try:
        rows = json.loads(body)["scores"]
        scores = [_score(row) for row in rows]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise WireError(f"the answer is not one: {error!r}") from error
    if len(scores) != count:
        raise WireError(f"the answer holds {len(scores)} scores for {count} items")
    return scores


def decode_runners(body: bytes) -> frozenset[str]:
    """The test runners that a server names; raises WireError for anything else."""
    try:
        names = json.loads(body)["runners"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise WireError(f"the answer is not one: {error!r}") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise WireError(f"the answer's runners are {names!r}, not a list of names")
    return frozenset(names)


def _score(row: dict[str, Any]) -> Score:
    reward, report = row["reward"], row["report"]
    if reward is not None:
        rejection = reward.pop("rejection")
        reward = Reward(**reward, rejection=None if rejection is None else Rejection(rejection))
    f1, precision, recall = row["match"]
    report = None if report is None else EnvReport.from_dict(report)
    return Score(reward, report, row["unscored"], f1, precision, recall, row["queued_s"])
