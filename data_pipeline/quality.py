"""trace_quality in [0, 1]: schema, execution, think length, and agreement of the rationale with the action."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from data_pipeline.errors import DataError
from srl_jax.trace import Action, Trace

MAX_THINK_WORDS = 512  # the cap on a thought's tokens, generously read as words


@dataclass(frozen=True)
class QualityConfig:
    """Weights of the four parts, which are divided by their sum, and the least quality of a record.

    `DataError` names a field that is out of range.
    """

    schema: float = 0.2
    execution: float = 0.4
    length: float = 0.15
    agreement: float = 0.25
    threshold: float = 0.6

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 <= value < float("inf"):
                raise DataError(f"quality.{name} is {value}; must be 0 or more")
        if self.threshold > 1 or not self.schema + self.execution + self.length + self.agreement > 0:
            raise DataError("quality: the threshold must be at most 1 and one weight above 0")


DEFAULT = QualityConfig()

_WORD = re.compile(r"[A-Za-z][A-Za-z]+")
_SPLIT = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")


def trace_quality(trace: Trace, env_report: Mapping[str, Any], config: QualityConfig = DEFAULT) -> float:
    """A weighted mean of four parts, each in [0, 1]; by default never above 0.6 without a successful execution.

    The schema part is 1 for every parsed trace: it is kept as a term so that malformed text, scored 0 by its
    absence, and parsed text are on one scale.
    """
    parts = {
        "schema": 1.0,
        "execution": 1.0 if env_report["success"] else 0.0,
        "length": length_score(trace.think),
        "agreement": agreement(trace.think, trace.action),
    }
    weights = {name: vars(config)[name] for name in parts}
    return sum(weights[name] * value for name, value in parts.items()) / sum(weights.values())


def length_score(think: str) -> float:
    """1 for 5 to 60 words; less for fewer (n / 5); falling to 0 at `MAX_THINK_WORDS`."""
    words = len(think.split())
    if words < 5:
        return words / 5
    if words <= 60:
        return 1.0
    return max(0.0, 1 - (words - 60) / (MAX_THINK_WORDS - 60))


def _words(text: str) -> set[str]:
    return {part.lower() for word in _WORD.findall(text) for part in _SPLIT.findall(word) if len(part) > 1}


def agreement(think: str, action: Action) -> float:
    """How many of the identifiers the action changes or names the rationale mentions: 1 from half of them on."""
    named = _words(action.pattern or "") | _words(action.replacement or "")
    named -= {"args", "obj"}  # metavariable names
    if not named:
        return 1.0
    return min(1.0, 2 * len(named & _words(think)) / len(named))
