"""How alike two traces are: the dense similarity reward.

The idea, a reward for likeness to one step of an expert's trajectory instead of a pass/fail at the end, is the SRL
paper's (arXiv 2510.25992). The three parts, their weights, the brevity penalty and the -0.2 for malformed output are
this project's choices. Everything here is pure and runs on the host.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from rapidfuzz.distance import Levenshtein
from scipy.optimize import linear_sum_assignment

from srl_jax.trace import Action, Rejection, StateUpdate, Trace, TraceError, parse_trace

REWARD_VERSION = "srl-reward/1"

_NAMES_SHARE = 0.3  # of the action's similarity: which fields are there; the rest: what they hold
_LIST_WEIGHTS = {"constraints": 1.5, "decisions": 1.5, "open_issues": 1.0, "next_focus": 1.0}
_LIST_SOFT_FLOOR = 0.5  # state items less alike than this are different items


@dataclass(frozen=True)
class RewardConfig:
    """Weights and limits of the reward; validated on construction (`ValueError` names the field).

    Within these bounds a well-formed trace can never score below a malformed one.
    """

    action_weight: float = 0.5
    state_weight: float = 0.3
    think_weight: float = 0.2
    malformed: float = -0.2
    clip_low: float = -0.2
    clip_high: float = 1.0
    brevity_penalty: float = 0.2
    brevity_ratio: float = 1.5
    state_match: str = "exact"  # or "soft"
    execution: float = 0.0
    match_gate: float = 0.0  # match-set F1 from which the action counts in full; below, in proportion; 0: not looked at

    def __post_init__(self) -> None:
        not_negative = {
            "action_weight": self.action_weight,
            "state_weight": self.state_weight,
            "think_weight": self.think_weight,
            "brevity_penalty": self.brevity_penalty,
            "execution": self.execution,
            "match_gate": self.match_gate,
        }
        positive = {"clip_high": self.clip_high, "brevity_ratio": self.brevity_ratio}
        not_positive = {"malformed": self.malformed, "clip_low": self.clip_low}
        for name, value in (not_negative | positive | not_positive).items():
            if not math.isfinite(value):
                raise ValueError(f"reward.{name} is {value}; give a finite number")
        for name, value in not_negative.items():
            if value < 0:
                raise ValueError(f"reward.{name} is {value}; must be 0 or more")
        for name, value in positive.items():
            if value <= 0:
                raise ValueError(f"reward.{name} is {value}; must be more than 0")
        for name, value in not_positive.items():
            if value > 0:
                raise ValueError(f"reward.{name} is {value}; must be 0 or less, below any well-formed trace")
        if self.action_weight + self.state_weight + self.think_weight <= 0:
            raise ValueError("reward.action_weight, state_weight and think_weight are all 0; one must be more")
        if self.match_gate > 1:
            raise ValueError(f"reward.match_gate is {self.match_gate}; must be at most 1, the F1 of a perfect match")
        if self.state_match not in ("exact", "soft"):
            raise ValueError(f"reward.state_match is {self.state_match!r}; must be 'exact' or 'soft'")

    @property
    def needs_execution(self) -> bool:
        """Whether the total depends on what the action does, beside what it says."""
        return self.execution > 0 or self.match_gate > 0


DEFAULT_CONFIG = RewardConfig()


@dataclass(frozen=True)
class Reward:
    """What one completion earned. For malformed text the parts are None, never 0, and `rejection` says why.

    `brevity` is what excess length took off `think` before clipping, reported apart.
    """

    total: float
    action: float | None
    state: float | None
    think: float | None
    brevity: float | None
    rejection: Rejection | None = None
    field: str | None = None


def action_similarity(student: Action, teacher: Action) -> float:
    """R_action in [0, 1]: 0.3 * F1 of the names of the fields present + 0.7 * mean likeness over their union.

    Symmetric; 1 for equal actions. Partial actions (None fields) can be compared.
    """
    ours, theirs = _present(student), _present(teacher)
    if not ours and not theirs:
        return 1.0
    shared = ours & theirs
    f1 = 2 * len(shared) / (len(ours) + len(theirs))
    alike = math.fsum(_field_similarity(name, student, teacher) for name in shared)
    return _NAMES_SHARE * f1 + (1 - _NAMES_SHARE) * (alike / len(ours | theirs))


def state_overlap(student: StateUpdate, teacher: StateUpdate, match: str = "exact") -> float:
    """R_state in [0, 1]: weighted mean Jaccard similarity of the four lists as sets. Symmetric.

    A list empty on both sides is left out; all four empty on both sides is 1. `match="soft"` pairs unequal items
    by edit distance, which equals "exact" where items are equal or unlike. Other values raise `ValueError`.
    """
    if match not in ("exact", "soft"):
        raise ValueError(f"match is {match!r}; must be 'exact' or 'soft'")
    pairs = {
        "constraints": (student.constraints, teacher.constraints),
        "decisions": (student.decisions, teacher.decisions),
        "open_issues": (student.open_issues, teacher.open_issues),
        "next_focus": (student.next_focus, teacher.next_focus),
    }
    jaccard = _soft_jaccard if match == "soft" else _jaccard
    used = {name: pair for name, pair in pairs.items() if pair[0] or pair[1]}
    if not used:
        return 1.0
    total = math.fsum(
        _LIST_WEIGHTS[name] * jaccard(_folded(ours), _folded(theirs)) for name, (ours, theirs) in used.items()
    )
    return total / math.fsum(_LIST_WEIGHTS[name] for name in used)


def brevity_cost(student_tokens: int, teacher_tokens: int, config: RewardConfig = DEFAULT_CONFIG) -> float:
    """What excess think length costs: penalty * max(0, student/(ratio * teacher) - 1). Not clipped.

    Lengths are in tokens of the student's tokenizer; teacher_tokens < 1 or student_tokens < 0 raise `ValueError`.
    """
    if teacher_tokens < 1 or student_tokens < 0:
        raise ValueError(
            f"think lengths are {student_tokens} (student) and {teacher_tokens} (teacher) tokens; "
            "the teacher's must be at least 1, the student's at least 0"
        )
    return config.brevity_penalty * max(0.0, student_tokens / (config.brevity_ratio * teacher_tokens) - 1)


def think_similarity(
    cosine: float, student_tokens: int, teacher_tokens: int, config: RewardConfig = DEFAULT_CONFIG
) -> float:
    """R_think in [0, 1]: the clipped cosine of the embeddings less `brevity_cost`, clipped again."""
    if not math.isfinite(cosine):
        raise ValueError(f"cosine is {cosine}; embeddings must be finite and not zero")
    return _clip(_clip(cosine, 0.0, 1.0) - brevity_cost(student_tokens, teacher_tokens, config), 0.0, 1.0)


def combine(
    action: float,
    state: float,
    think: float,
    config: RewardConfig = DEFAULT_CONFIG,
    *,
    executed: bool | None = None,
    match_f1: float | None = None,
) -> float:
    """R of a well-formed trace: the weighted sum of its parts, clipped to the configured range.

    With `config.execution` above 0 the sandbox's verdict `executed` adds that much when it is True. With
    `config.match_gate` above 0 the action's part is scaled by min(1, match_f1 / gate), so that a pattern that matches
    other places than the teacher's is not paid for looking like it. What is missing then raises `ValueError`, because
    rewards with and without it must not meet in one group.
    """
    if config.match_gate > 0:
        if match_f1 is None:
            raise ValueError("reward.match_gate is above 0 but no match-set F1 was given; execute the action first")
        action *= min(1.0, match_f1 / config.match_gate)
    total = config.action_weight * action + config.state_weight * state + config.think_weight * think
    if config.execution > 0:
        if executed is None:
            raise ValueError("reward.execution is above 0 but no verdict was given; execute the action first")
        total += config.execution * executed
    return _clip(total, config.clip_low, config.clip_high)


def score_trace(
    text: str,
    teacher: Trace,
    *,
    cosine: float | Callable[[str], float],
    student_tokens: int | Callable[[str], int],
    teacher_tokens: int,
    config: RewardConfig = DEFAULT_CONFIG,
    executed: bool | Callable[[Action], bool] | None = None,
    match_f1: float | None = None,
) -> Reward:
    """Scores a completion against its teacher's trace. Malformed text is a score, not an error.

    `cosine` (of the think embeddings, in [-1, 1]), `student_tokens` (length of the student's think) and `executed`
    may be values or functions of the parsed student's think text or action, called only when they matter: the
    cosine is not asked for when the texts are equal (then it is exactly 1) or when length alone has cost it all.
    `Reward.action` is the likeness before `match_gate`, `Reward.total` after it.
    """
    try:
        student = parse_trace(text)
    except TraceError as error:
        return Reward(config.malformed, None, None, None, None, error.rejection, error.field)
    length = student_tokens(student.think) if callable(student_tokens) else student_tokens
    brevity = brevity_cost(length, teacher_tokens, config)
    if student.think == teacher.think:
        likeness = 1.0
    elif brevity >= 1.0:
        likeness = 0.0
    else:
        likeness = cosine(student.think) if callable(cosine) else cosine
    action = action_similarity(student.action, teacher.action)
    state = state_overlap(student.state, teacher.state, config.state_match)
    think = think_similarity(likeness, length, teacher_tokens, config)
    verdict = None
    if config.execution > 0:
        verdict = executed(student.action) if callable(executed) else executed
    total = combine(action, state, think, config, executed=verdict, match_f1=match_f1)
    return Reward(total, action, state, think, brevity)


def match_set_f1(student: Collection[Hashable], teacher: Collection[Hashable]) -> float:
    """F1 of two sets of matched places, such as (path, start, end): how over-broad or narrow a pattern is.

    1 when both are empty. Reported beside the reward: text likeness alone cannot see what a pattern matches.
    """
    ours, theirs = set(student), set(teacher)
    if not ours and not theirs:
        return 1.0
    return 2 * len(ours & theirs) / (len(ours) + len(theirs))


def match_set_precision_recall(student: Collection[Hashable], teacher: Collection[Hashable]) -> tuple[float, float]:
    """Shares of the student's places that are the teacher's, and of the teacher's that are the student's.

    Both are 1 when both sets are empty, and 0 when one is: a pattern that matches nothing is not precise.
    """
    ours, theirs = set(student), set(teacher)
    if not ours and not theirs:
        return 1.0, 1.0
    common = len(ours & theirs)
    return common / max(len(ours), 1), common / max(len(theirs), 1)


def _present(action: Action) -> set[str]:
    fields = {
        "language": action.language is not None,
        "pattern": action.pattern is not None,
        "replacement": action.replacement is not None,
        "files": action.files is not None,
        "constraints": bool(action.constraints),
    }
    return {name for name, present in fields.items() if present}


def _field_similarity(name: str, student: Action, teacher: Action) -> float:
    if name == "language":
        return float(student.language == teacher.language)
    if name == "pattern":
        return _lev(student.pattern, teacher.pattern)
    if name == "replacement":
        return _lev(student.replacement, teacher.replacement)
    if name == "files":
        return _list_similarity(student.files, teacher.files)
    return _constraint_similarity(student.constraints, teacher.constraints)


def _lev(a: str, b: str) -> float:
    return Levenshtein.normalized_similarity(a, b)


def _list_similarity(ours: Sequence[str], theirs: Sequence[str]) -> float:
    if not ours and not theirs:
        return 1.0
    return _best_total(ours, theirs, floor=0.0) / max(len(ours), len(theirs))


def _best_total(ours: Sequence[str], theirs: Sequence[str], floor: float) -> float:
    """The greatest total likeness of a one-to-one matching, pairs below `floor` counting 0."""
    if not ours or not theirs:
        return 0.0
    likeness = np.array([[_lev(a, b) for b in theirs] for a in ours])
    likeness[likeness < floor] = 0.0
    return math.fsum(likeness[linear_sum_assignment(likeness, maximize=True)])


def _constraint_similarity(ours: Mapping[str, Mapping[str, str]], theirs: Mapping[str, Mapping[str, str]]) -> float:
    total = 0.0
    for name in sorted(ours.keys() & theirs.keys()):
        shared = ours[name].keys() & theirs[name].keys()  # at most one of regex, kind
        if shared:
            kind = min(shared)
            total += _lev(ours[name][kind], theirs[name][kind])
    return total / len(ours.keys() | theirs.keys())


def _folded(items: Sequence[str]) -> list[str]:
    folded = {" ".join(unicodedata.normalize("NFKC", item).casefold().split()) for item in items}
    return sorted(folded)  # a fixed order, so that soft matching does not depend on string hashes


def _jaccard(ours: list[str], theirs: list[str]) -> float:
    return len(set(ours) & set(theirs)) / len(set(ours) | set(theirs))


def _soft_jaccard(ours: list[str], theirs: list[str]) -> float:
    shared = _best_total(ours, theirs, floor=_LIST_SOFT_FLOOR)
    return shared / (len(ours) + len(theirs) - shared)


def _clip(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)
