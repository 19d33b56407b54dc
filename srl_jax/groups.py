"""Scored groups of completions on the host: which are worth training on, their advantages, what is reported of them."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from srl_jax import credit, grpo
from srl_jax.config import TrainConfig
from srl_jax.records import TeacherRecord
from srl_jax.sandbox.service import Score
from srl_jax.tokenizer import Tokenizer
from srl_jax.trace import TAGS

COMPONENTS = ("think", "action", "state")  # in the order of their blocks
_BLOCK_ENDS = (TAGS[1], TAGS[3])  # of think and action; the third block ends with the completion


@dataclasses.dataclass
class Groups:
    """P groups of G scored completions on the host; every array leads with [P]."""

    records: list[TeacherRecord]
    texts: list[list[str]]
    scores: list[list[Score]]
    # The sampled arrays: prompt_tokens, prompt_lengths, tokens, mask, logprobs, ref; kept, where sampling truncates.
    # A prompt is a group's, or [P, G], each completion's own.
    arrays: dict[str, np.ndarray]

    def column(self, part: str) -> np.ndarray:
        """One number of every completion's reward, [P, G], NaN where it does not exist (malformed, unscored)."""
        values = [[np.nan if s.reward is None else getattr(s.reward, part) for s in row] for row in self.scores]
        return np.asarray([[np.nan if v is None else v for v in row] for row in values], np.float32)

    @property
    def valid(self) -> np.ndarray:
        return np.asarray([[score.reward is not None for score in row] for row in self.scores])

    @property
    def malformed(self) -> np.ndarray:
        return np.asarray(
            [[s.reward is not None and s.reward.rejection is not None for s in row] for row in self.scores]
        )

    def take(self, indices: Sequence[int]) -> "Groups":
        index = list(indices)
        return Groups(
            [self.records[i] for i in index],
            [self.texts[i] for i in index],
            [self.scores[i] for i in index],
            {name: array[index] for name, array in self.arrays.items()},
        )

    def __add__(self, other: "Groups") -> "Groups":
        arrays = joined([self.arrays, other.arrays])
        return Groups(self.records + other.records, self.texts + other.texts, self.scores + other.scores, arrays)


def joined(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Sampled arrays one after the other, prompts padded to the widest."""
    width = max(part["prompt_tokens"].shape[-1] for part in parts)

    def padded(name: str, array: np.ndarray) -> np.ndarray:
        if name != "prompt_tokens":
            return array
        return np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, width - array.shape[-1])])

    return {name: np.concatenate([padded(name, part[name]) for part in parts]) for name in parts[0]}


def informative(groups: Groups, config: TrainConfig) -> list[int]:
    """Indices of the groups worth training on."""
    return np.flatnonzero(worth_training(np.nan_to_num(groups.column("total")), groups.valid, config)).tolist()


def worth_training(rewards: np.ndarray, valid: np.ndarray, config: TrainConfig) -> np.ndarray:
    """Which groups teach anything, bool [P]: `rewards` [P, G] are what their members are compared by."""
    if config.grpo.baseline != "group":
        return valid.any(axis=1)  # without a group mean, equal rewards still have a gradient
    return np.asarray(grpo.informative_groups(rewards, config.grpo.dynamic_sampling_min_std, valid))


def sampled_kl(arrays: Mapping[str, np.ndarray], estimator: grpo.Estimator) -> np.ndarray:
    """K [P, G]: per-token mean of the estimate under the sampled policy."""
    values = grpo.kl_estimate(arrays["logprobs"], arrays["ref"], estimator)
    p, g, t = arrays["mask"].shape
    mean = grpo.mean_over_tokens(values.reshape(-1, t), arrays["mask"].reshape(-1, t))
    return np.asarray(mean).reshape(p, g)


def advantages(
    groups: Groups,
    config: TrainConfig,
    tokenizer: Tokenizer,
    *,
    kl: np.ndarray,
    kl_coef: float,
    values: np.ndarray | None = None,
) -> np.ndarray:
    """Advantages [P, G], or [P, G, T] where each block has its own; `kl` is K, `values` the value head's guesses [P].

    `kl_coef` is 0 where the KL is in the loss instead.
    """
    c = config.grpo
    masks = {"valid": groups.valid, "malformed": groups.malformed, "malformed_advantage": c.malformed_advantage}
    rewards = np.nan_to_num(groups.column("total"))
    if c.baseline != "group":
        guesses = None if values is None else np.broadcast_to(values[:, None], rewards.shape)
        return np.asarray(grpo.baseline_advantages(rewards, kl, kl_coef=kl_coef, values=guesses, **masks))
    if c.credit == "trace" and c.scale != "components":
        return np.asarray(grpo.group_advantages(rewards, kl, kl_coef=kl_coef, scale=c.scale, **masks))
    weights = np.asarray([getattr(config.reward, f"{name}_weight") for name in COMPONENTS], np.float32)
    # A malformed completion has the malformed reward in every component: their weighted sum is its R.
    parts = np.stack([groups.column(name) for name in COMPONENTS])
    parts = np.where(groups.malformed, config.reward.malformed / max(weights.sum(), 1e-9), np.nan_to_num(parts))
    each = credit.component_advantages(parts, weights, scale=c.scale, **masks)
    of_kl = grpo.group_advantages(np.zeros_like(rewards), kl, kl_coef=kl_coef, **masks)
    if c.credit == "trace":
        return np.asarray(each.sum(axis=0) + of_kl)
    blocks = block_of_tokens(tokenizer, groups.arrays["tokens"], groups.arrays["mask"])
    return np.asarray(credit.spread_over_blocks(each, of_kl, blocks))


def block_of_tokens(tokenizer: Tokenizer, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The block each token begins in: 0 think, 1 action, 2 state update; int32, the shape of `tokens`.

    By the bytes that tokens stand for, so tags that are text, or end within a token, are found too. A completion
    without a block's end, as only free sampling gives, stays in that block.
    """
    size = max(tokenizer.vocab_size, int(tokens.max(initial=0)) + 1)
    lengths = np.zeros(size, np.int64)
    spelled = [raw if raw is not None else b"" for raw in tokenizer.token_bytes]
    for index, tag in zip(tokenizer.tag_ids, TAGS, strict=False):
        spelled[index] = tag.encode()
    lengths[: len(spelled)] = [len(raw) for raw in spelled]
    blocks = np.zeros(tokens.shape, np.int32)
    for place in np.ndindex(tokens.shape[:-1]):
        ids = tokens[place][mask[place]]
        text = b"".join(spelled[i] if i < len(spelled) else b"" for i in ids.tolist())
        begins = np.cumsum(lengths[ids]) - lengths[ids]
        row = np.zeros(len(ids), np.int32)
        start = 0
        for number, tag in enumerate(_BLOCK_ENDS, start=1):
            found = text.find(tag.encode(), start)
            if found < 0:
                break
            start = found + len(tag)
            row[begins >= start] = number
        blocks[place][mask[place]] = row
    return blocks


def rollout_metrics(
    groups: Groups, kept: Sequence[int], skipped: int, timing: Mapping[str, float], *, kl: np.ndarray
) -> dict[str, float | None]:
    """Scalars of everything that was sampled, used or not; `kl` [P, G] is k1 of each completion."""

    def mean(values: np.ndarray) -> float | None:
        values = values[np.isfinite(values)]
        return float(values.mean()) if values.size else None

    total, valid = groups.column("total"), groups.valid
    lengths = groups.arrays["mask"].sum(-1)
    parsed = valid & ~groups.malformed
    rejections = Counter(
        s.reward.rejection.value for row in groups.scores for s in row if s.reward and s.reward.rejection
    )
    queued = [s.queued_s for row in groups.scores for s in row if s.queued_s is not None]
    return {
        "reward/total": mean(total),
        "reward/action": mean(groups.column("action")),
        "reward/state": mean(groups.column("state")),
        "reward/think": mean(groups.column("think")),
        "reward/brevity": mean(groups.column("brevity")),
        "reward/group_std": mean(
            np.asarray([row[ok].std() if ok.any() else np.nan for row, ok in zip(total, valid, strict=True)])
        ),
        "parse_rate": float(parsed.sum() / max(valid.sum(), 1)),
        "unscored": float((~valid).sum()),
        "match_f1": mean(np.asarray([s.match_f1 for row in groups.scores for s in row], np.float32)),
        "kl": mean(kl),
        "kept_groups": len(kept) / len(groups.records),
        "groups_drawn": float(len(groups.records)),
        "prompts_too_long": float(skipped),
        "completion_tokens": float(lengths.mean()),
        "finished": float(groups.arrays["finished"].mean()),
        "tokens_per_second": timing["tokens"] / max(timing["rollout"], 1e-9),
        "seconds/rollout": timing["rollout"],
        "seconds/reference": timing["reference"],
        "seconds/reward_wait": timing["reward_wait"],
        "seconds/queue_mean": mean(np.asarray(queued)),
        "seconds/queue_max": max(queued, default=None),
        **{f"rejected/{name}": float(count) for name, count in rejections.items()},
    }
