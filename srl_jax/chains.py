"""Training on whole episodes: each member of a group goes its own way through one and answers for what follows.

Every step of a way is asked about the files that its own actions have made, in the sandbox, and the state that it has
written itself, so from the second step on a group's prompts differ. Each step earns the reward of the teacher's answer
to it; what its tokens are given credit for is the return, the sum of the rewards from there on, against the returns of
the other ways at the same step. The KL stays with the step whose tokens it is of.

A way that cannot go on (its prompt has become too long, or the sandbox failed to apply its action and not the action
itself) ends there. Its later steps have no reward, so that no return which would reach them is trained on.

Shapes never change: a batch has a row for each of `grpo.episode_steps` steps of P * G ways, one prompt and one
completion each. In rows ways come in turns of episodes (g * P + p), so that a mini-batch, which takes every so many
rows, holds all of an episode.
"""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np

from srl_jax import credit, grpo
from srl_jax.config import TrainConfig
from srl_jax.episodes import Chain, moved_on
from srl_jax.groups import Groups, joined, rollout_metrics, sampled_kl, worth_training
from srl_jax.records import TeacherRecord
from srl_jax.rollout import (
    MAX_SKIPPED,
    NOT_ASKED,
    PromptTooLong,
    Rollout,
    completion_kl,
    make_batch,
    needed_scores,
    sample_groups,
    with_advantages,
)
from srl_jax.sandbox.isolation import SandboxCrash
from srl_jax.sandbox.runner import Sandbox
from srl_jax.sandbox.service import Score, ScoresCompletions
from srl_jax.student import Student
from srl_jax.train_step import StepSettings

_PROMPTS = ("prompt_tokens", "prompt_lengths")  # arrays without an axis of completions


class EpisodeTooLong(PromptTooLong):
    """No episode of the data set fits into the budgets of prompts and steps."""


class Walked(NamedTuple):
    """What came of C ways through their episodes, of which the longest was gone S steps far.

    Lists have S entries of C each. `asked` [S, C] tells the steps that were gone; the others' arrays are fillers with
    an empty mask. `applied` is the share of actions, of those that a further step follows, that applied; `lost` counts
    ways that ended before their episode.
    """

    arrays: list[dict[str, np.ndarray]]  # each leads with [C]
    texts: list[list[str]]
    scores: list[list[Score]]
    asked: np.ndarray
    applied: float | None
    lost: int


def take_episodes(
    student: Student, episodes: Iterator[Sequence[TeacherRecord]], config: TrainConfig
) -> tuple[list[Sequence[TeacherRecord]], int]:
    """The next `data.prompts_per_step` episodes that fit as the teacher went through them, and how many did not."""
    kept: list[Sequence[TeacherRecord]] = []
    skipped = 0
    while len(kept) < config.data.prompts_per_step:
        steps = next(episodes)
        longest = max(len(_prompt(student, record, config)) for record in steps)
        if len(steps) <= config.grpo.episode_steps and longest <= config.data.max_prompt_tokens:
            kept.append(steps)
            continue
        skipped += 1
        if skipped >= MAX_SKIPPED:
            raise EpisodeTooLong(
                f"{skipped} episodes in a row are too long (the last: {len(steps)} steps, prompts of up to {longest} "
                f"tokens); raise grpo.episode_steps={config.grpo.episode_steps} or "
                f"data.max_prompt_tokens={config.data.max_prompt_tokens}"
            )
    return kept, skipped


def collect_episodes(
    student: Student,
    lora: dict,
    episodes: Iterator[Sequence[TeacherRecord]],
    key: jax.Array,
    service: ScoresCompletions,
    sandbox: Sandbox,
    config: TrainConfig,
    settings: StepSettings,
    *,
    kl_coef: float | None = None,
) -> Rollout:
    """Goes P * G ways, G through each of the next P episodes, and makes one batch of all steps.

    A group is then an episode's step, with its G ways for members. `kl_coef` replaces `grpo.kl_coef`. Beside
    `rollout.collect_rollouts`, which draws steps alone.
    """
    timing: Counter = Counter()
    drawn, skipped = take_episodes(student, episodes, config)
    chains = [Chain.begin(steps) for _ in range(config.grpo.group_size) for steps in drawn]
    walked = walk(student, lora, chains, key, service, sandbox, config, settings, timing)
    rows = batch_rows(walked, config.grpo.episode_steps)
    groups, present = _groups(walked, rows, drawn, config)

    started = time.perf_counter()
    returns, known = step_returns(groups, present, config)
    keep = worth_training(returns, known, config)
    by_row = lambda x: _as_rows(x, config)
    arrays = {**rows, "mask": rows["mask"] & by_row(known & keep[:, None])[:, None, None]}
    batch = make_batch(student, arrays, np.zeros((len(arrays["mask"]), 1)))
    scores = needed_scores(student, lora, batch, config, settings)
    kl = _as_groups(completion_kl(student, rows, scores, config)[:, 0], config)
    advantages = _advantages(groups, returns, known, kl, config, config.grpo.kl_coef if kl_coef is None else kl_coef)
    advantages = by_row(advantages * keep[:, None])[:, None]
    batch, gap = with_advantages(student, batch, arrays, advantages, scores, config, settings)
    timing["reference"] += time.perf_counter() - started

    there = np.flatnonzero(present).tolist()
    told = np.where(rows["mask"].any(axis=(1, 2)), sampled_kl(rows, "k1")[:, 0], np.nan)
    kept = [i for i, place in enumerate(there) if keep[place]]
    played = groups.take(there)
    metrics = rollout_metrics(played, kept, skipped, timing, kl=_as_groups(told, config)[there])
    metrics |= episode_metrics(groups, present, returns, known, walked, config)
    metrics["seconds/apply"] = timing["apply"]
    if gap is not None:
        metrics["logprob_gap"] = gap
    return Rollout(batch, metrics, played, played, None)


def walk(
    student: Student,
    lora: dict,
    chains: Sequence[Chain],
    key: jax.Array,
    service: ScoresCompletions,
    sandbox: Sandbox,
    config: TrainConfig,
    settings: StepSettings,
    timing: Counter,
) -> Walked:
    """Goes every chain's way to its end, all side by side; the chains are left where they ended."""
    variables = student.sampling_variables(lora)
    lengths = np.asarray([len(chain.steps) for chain in chains])
    going = np.ones(len(chains), bool)
    walked = Walked([], [], [], [], None, 0)
    applied: list[bool] = []
    for number in range(lengths.max()):
        records = [chain.record(min(number, len(chain.steps) - 1)) for chain in chains]
        prompts = [_prompt(student, record, config) for record in records]
        going &= (number >= lengths) | (np.asarray(list(map(len, prompts))) <= config.data.max_prompt_tokens)
        due = going & (number < lengths)
        if not due.any():
            break
        # Rows without a step to go repeat another's, so that one shape is sampled.
        other = int(np.argmax(due))
        places = [i if due[i] else other for i in range(len(chains))]
        groups = sample_groups(
            student, variables, [records[i] for i in places], [prompts[i] for i in places],
            jax.random.fold_in(key, number), service, group_size=1, max_prompt_tokens=config.data.max_prompt_tokens,
            settings=settings, timing=timing, slots=config.sampling.slots, asked=due,
        )  # fmt: skip
        walked.arrays.append(groups.arrays)
        walked.texts.append([text for [text] in groups.texts])
        walked.scores.append([score for [score] in groups.scores])
        walked.asked.append(due)
        started = time.perf_counter()
        moving = np.flatnonzero(due & (number + 1 < lengths)).tolist()
        moved = _move_on([(chains[i], walked.texts[-1][i]) for i in moving], number, sandbox)
        going[[i for i, done in zip(moving, moved, strict=True) if done is None]] = False
        applied += [done for done in moved if done is not None]
        timing["apply"] += time.perf_counter() - started
    share = float(np.mean(applied)) if applied else None
    return walked._replace(asked=np.asarray(walked.asked), applied=share, lost=int((~going).sum()))


def _move_on(answers: Sequence[tuple[Chain, str]], number: int, sandbox: Sandbox) -> list[bool | None]:
    """Whether each answer's action applied; None where the sandbox could not tell."""

    def one(chain: Chain, text: str) -> bool | None:
        try:
            return moved_on(chain, number, text, sandbox)
        except (SandboxCrash, OSError):
            return None

    with ThreadPoolExecutor(sandbox.config.slots) as workers:
        return list(workers.map(one, *zip(*answers, strict=True))) if answers else []


def batch_rows(walked: Walked, steps: int) -> dict[str, np.ndarray]:
    """The arrays of all ways, [steps * C, ...]; steps that nobody went repeat the first one, with an empty mask."""
    missing = steps - len(walked.arrays)
    first = walked.arrays[0]
    filler = {**first, "mask": np.zeros_like(first["mask"])}
    return joined([*walked.arrays, *[filler] * missing])


def step_returns(groups: Groups, present: np.ndarray, config: TrainConfig) -> tuple[np.ndarray, np.ndarray]:
    """Return of every way at every step [S * P, G], and where it is known.

    `groups` are P at each of S steps, `present` [S * P] those that are a step of their episode.
    """
    c = config.grpo
    ways = lambda x: x.reshape(c.episode_steps, -1).T
    back = lambda x: np.asarray(x).T.reshape(groups.valid.shape)
    horizon = c.horizon if c.returns == "n" else None
    scored, exists = ways(groups.valid), ways(np.broadcast_to(present[:, None], groups.valid.shape))
    rewards = ways(np.nan_to_num(groups.column("total")))
    returns = credit.episode_returns(rewards, scored, discount=c.discount, horizon=horizon)
    known = credit.known_returns(scored, exists, discount=c.discount, horizon=horizon)
    return back(returns), back(known)


def _advantages(
    groups: Groups, returns: np.ndarray, known: np.ndarray, kl: np.ndarray, config: TrainConfig, kl_coef: float
) -> np.ndarray:
    """Advantages [S * P, G] of returns within their groups; the unknown take no part and get 0."""
    c = config.grpo
    masks = {"valid": known, "malformed": groups.malformed, "malformed_advantage": c.malformed_advantage}
    masks["kl_coef"] = kl_coef if c.kl_placement == "reward" else 0.0
    if c.baseline == "none":
        return np.asarray(grpo.baseline_advantages(returns, kl, **masks))
    return np.asarray(grpo.group_advantages(returns, kl, scale=c.scale, **masks))


def episode_metrics(
    groups: Groups, present: np.ndarray, returns: np.ndarray, known: np.ndarray, walked: Walked, config: TrainConfig
) -> dict[str, float | None]:
    """Scalars of the episodes as such; `reward/step<n>` is None where none has an n-th step that was scored."""
    mean = lambda values: float(np.mean(values)) if np.size(values) else None
    steps, totals = config.grpo.episode_steps, groups.column("total")
    by_step = zip(np.split(totals, steps), np.split(groups.valid, steps), strict=True)
    rewards = {f"reward/step{n}": mean(total[valid]) for n, (total, valid) in enumerate(by_step, start=1)}
    return rewards | {
        "return/mean": mean(returns[known]),
        "return/group_std": mean([row[ok].std() for row, ok in zip(returns, known, strict=True) if ok.any()]),
        "return/unknown": float((present[:, None] & ~known).sum()),
        "episode/steps": float(present.sum() / config.data.prompts_per_step),
        "episode/applied": walked.applied,
        "episode/lost": float(walked.lost),
    }


def _groups(
    walked: Walked, rows: dict[str, np.ndarray], drawn: Sequence[Sequence[TeacherRecord]], config: TrainConfig
) -> tuple[Groups, np.ndarray]:
    """Every step of every episode as a group of its ways, P groups a step; which of them exist, [S * P]."""
    steps, size = config.grpo.episode_steps, config.grpo.group_size
    missing = (steps - len(walked.texts)) * size * len(drawn)
    texts = [text for step in walked.texts for text in step] + [""] * missing
    scores = [score for step in walked.scores for score in step] + [NOT_ASKED] * missing
    places = _as_groups(np.arange(len(texts)), config)
    arrays = {name: _as_groups(x if name in _PROMPTS else x[:, 0], config) for name, x in rows.items()}
    groups = Groups(
        [episode[min(step, len(episode) - 1)] for step in range(steps) for episode in drawn],
        [[texts[i] for i in place] for place in places],
        [[scores[i] for i in place] for place in places],
        arrays,
    )
    return groups, np.asarray([step < len(episode) for step in range(steps) for episode in drawn])


def _prompt(student: Student, record: TeacherRecord, config: TrainConfig) -> list[int]:
    return student.tokenizer.encode_prompt(record.task, few_shot=config.data.few_shot)


def _as_groups(rows: np.ndarray, config: TrainConfig) -> np.ndarray:
    """[S * G * P, ...] in the order of rows to [S * P, G, ...]."""
    s, g, p = config.grpo.episode_steps, config.grpo.group_size, config.data.prompts_per_step
    return np.moveaxis(rows.reshape(s, g, p, *rows.shape[1:]), 1, 2).reshape(s * p, g, *rows.shape[1:])


def _as_rows(groups: np.ndarray, config: TrainConfig) -> np.ndarray:
    """[S * P, G] to [S * G * P] in the order of rows."""
    s, g, p = config.grpo.episode_steps, config.grpo.group_size, config.data.prompts_per_step
    return np.moveaxis(groups.reshape(s, p, g), 2, 1).reshape(-1)
