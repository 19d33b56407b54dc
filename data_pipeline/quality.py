"""trace_quality in [0, 1]: schema, execution, think length, and agreement of the rationale with the action."""

import re
from collections.abc import Mapping
from typing import Any

from srl_jax.trace import Action, Trace

THRESHOLD = 0.6
MAX_THINK_WORDS = 512  # the token cap of algorithm.md, generously read as words
WEIGHTS: Mapping[str, float] = {"schema": 0.2, "execution": 0.4, "length": 0.15, "agreement": 0.25}

_WORD = re.compile(r"[A-Za-z][A-Za-z]+")
_SPLIT = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")


def trace_quality(trace: Trace, env_report: Mapping[str, Any]) -> float:
    """A weighted mean of four parts, each in [0, 1]; without a successful execution never above 0.6.

    The schema part is 1 for every parsed trace: it is kept as a term so that malformed text, scored 0 by its
    absence, and parsed text are on one scale.
    """
    parts = {
        "schema": 1.0,
        "execution": 1.0 if env_report["success"] else 0.0,
        "length": length_score(trace.think),
        "agreement": agreement(trace.think, trace.action),
    }
    return sum(WEIGHTS[name] * value for name, value in parts.items())


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
