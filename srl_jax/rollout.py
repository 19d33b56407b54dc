"""From teacher records to a batch to train on: prompts, samples, rewards, advantages.

The device samples and scores log-probs while the host parses, embeds and compares; the two meet in `TrainBatch`.
"""

import dataclasses
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial

import jax
import numpy as np

from srl_jax import grammar, grpo
from srl_jax.config import TrainConfig
from srl_jax.records import TeacherRecord
from srl_jax.sampling import Completions, sample
from srl_jax.sandbox.runner import RunnerUnavailable
from srl_jax.sandbox.service import Score, ScoreRequest, ScoresCompletions
from srl_jax.sharding import batch_sharding
from srl_jax.student import Student, pad_prompts
from srl_jax.train_step import StepSettings, TrainBatch, reference_logprobs

# So many records in a row that cannot be used mean a wrong setting, not bad luck.
_MAX_SKIPPED = 1000


class PromptTooLong(ValueError):
    """No record of the data set fits into the prompt budget."""


@dataclasses.dataclass
class Groups:
    """P groups of G scored completions on the host; every array leads with [P]."""

    records: list[TeacherRecord]
    texts: list[list[str]]
    scores: list[list[Score]]
    arrays: dict[str, np.ndarray]  # the sampled arrays: prompt_tokens, prompt_lengths, tokens, mask, logprobs, ref

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
        arrays = {name: np.concatenate([array, other.arrays[name]]) for name, array in self.arrays.items()}
        return Groups(self.records + other.records, self.texts + other.texts, self.scores + other.scores, arrays)


def take_prompts(
    student: Student, records: Iterator[TeacherRecord], count: int, *, max_tokens: int, few_shot: int
) -> tuple[list[TeacherRecord], list[list[int]], int]:
    """The next `count` records whose prompt fits, their prompts' ids, and how many were skipped as too long."""
    kept, prompts, skipped = [], [], 0
    while len(kept) < count:
        record = next(records)
        ids = student.tokenizer.encode_prompt(record.task, few_shot=few_shot)
        if len(ids) <= max_tokens:
            kept.append(record)
            prompts.append(ids)
            continue
        skipped += 1
        if skipped >= _MAX_SKIPPED:
            raise PromptTooLong(
                f"{skipped} prompts in a row are longer than data.max_prompt_tokens={max_tokens} (the last: "
                f"{len(ids)} tokens); raise it, or rebuild the data set with shorter excerpts"
            )
    return kept, prompts, skipped


def executable(record: TeacherRecord, runners: frozenset[str] | None) -> bool:
    """Whether this machine can run the record's tests; always, where nothing is executed (`runners` is None)."""
    tests = record.task.tests
    return runners is None or tests is None or tests.runner in runners


def executable_only(records: Iterator[TeacherRecord], runners: frozenset[str] | None) -> Iterator[TeacherRecord]:
    """The records whose tests can run here: where the reward needs the sandbox's verdict, others cannot be scored."""
    skipped = 0
    for record in records:
        if executable(record, runners):
            skipped = 0
            yield record
            continue
        skipped += 1
        if skipped >= _MAX_SKIPPED:
            runner = record.task.tests.runner
            raise RunnerUnavailable(runner, f"{skipped} tasks in a row need it; install it or set reward.execution=0")


def decode_completions(student: Student, tokens: np.ndarray, mask: np.ndarray) -> list[str]:
    """Text of each row of [rows, T] tokens, padding left out."""
    return [student.tokenizer.decode_trace(row[keep].tolist()) for row, keep in zip(tokens, mask, strict=True)]


@partial(jax.jit, static_argnames=("max_new_tokens", "max_think_tokens"))
def _states(automaton, tokens, *, max_new_tokens: int, max_think_tokens: int):
    rows = tokens.reshape(-1, tokens.shape[-1])
    states = grammar.replay(automaton, rows, max_new_tokens, max_think_tokens)
    return jax.tree.map(lambda x: x.reshape(*tokens.shape, *x.shape[2:]), states)


def make_batch(student: Student, arrays: dict[str, np.ndarray], advantages: np.ndarray) -> TrainBatch:
    """Places host arrays on the mesh and replays the grammar over the sampled tokens."""
    put = partial(jax.device_put, device=batch_sharding(student.mesh))
    tokens = put(arrays["tokens"])
    states = _states(
        student.automaton,
        tokens,
        max_new_tokens=student.sampling.max_new_tokens,
        max_think_tokens=student.sampling.max_think_tokens,
    )
    return TrainBatch(
        put(arrays["prompt_tokens"]),
        put(arrays["prompt_lengths"]),
        tokens,
        put(arrays["mask"]),
        states,
        put(arrays["logprobs"]),
        put(advantages.astype(np.float32)),
    )


def sample_groups(
    student: Student,
    variables: dict,
    records: list[TeacherRecord],
    prompts: list[list[int]],
    key: jax.Array,
    service: ScoresCompletions,
    *,
    group_size: int,
    prompt_width: int,
    settings: StepSettings,
    timing: Counter,
    reference: bool = True,
    slots: int = 0,
) -> Groups:
    """Samples and scores one group per record; rewards are computed while the device scores the reference.

    `reference=False` is for the base itself: its log-probs are the reference's, so `ref` repeats `logprobs`.
    `slots`: prompts decoded at once, see `sampling.sample`.
    """
    started = time.perf_counter()
    put = partial(jax.device_put, device=batch_sharding(student.mesh))
    prompt_tokens, lengths = pad_prompts(prompts, prompt_width, student.tokenizer.pad_id)
    drawn: Completions = sample(
        student.decoder,
        variables,
        student.automaton,
        put(prompt_tokens),
        put(lengths),
        key,
        group_size=group_size,
        settings=student.sampling,
        pad_id=student.tokenizer.pad_id,
        slots=slots,
    )
    arrays = {"prompt_tokens": prompt_tokens, "prompt_lengths": lengths}
    arrays |= {name: np.asarray(getattr(drawn, name)) for name in ("tokens", "mask", "logprobs", "finished")}
    timing["rollout"] += time.perf_counter() - started
    timing["tokens"] += int(arrays["mask"].sum())

    rows = (-1, arrays["tokens"].shape[-1])
    texts = decode_completions(student, arrays["tokens"].reshape(rows), arrays["mask"].reshape(rows))
    requests = [ScoreRequest(text, records[i // group_size]) for i, text in enumerate(texts)]
    pending = service.submit(requests)
    started = time.perf_counter()
    if reference:
        batch = make_batch(student, arrays, np.zeros((len(records), group_size)))
        scored = reference_logprobs(student.decoder, student.params, student.automaton, batch, settings=settings)
        arrays["ref"] = np.asarray(scored)
    else:
        arrays["ref"] = arrays["logprobs"]
    timing["reference"] += time.perf_counter() - started
    started = time.perf_counter()
    scores = pending.result()
    timing["reward_wait"] += time.perf_counter() - started

    def nest(flat):
        return [list(flat[i : i + group_size]) for i in range(0, len(flat), group_size)]

    return Groups(list(records), nest(texts), nest(scores), arrays)


def collect_rollouts(
    student: Student,
    lora: dict,
    records: Iterator[TeacherRecord],
    key: jax.Array,
    service: ScoresCompletions,
    config: TrainConfig,
    settings: StepSettings,
) -> tuple[TrainBatch, dict[str, float], Groups]:
    """One step's batch, its metrics, and the groups behind it.

    Dynamic sampling: groups whose rewards barely differ teach nothing; they are replaced by further rollouts while
    the budget lasts. What is still missing then stays in the batch with an empty mask, so shapes never change.
    """
    wanted, c = config.data.prompts_per_step, config.grpo
    variables = student.sampling_variables(lora)
    timing: Counter = Counter()
    drawn: Groups | None = None
    informative: list[int] = []
    skipped = 0
    for attempt in range(1 + c.max_extra_rollouts):
        batch_records, prompts, too_long = take_prompts(
            student, records, wanted, max_tokens=config.data.max_prompt_tokens, few_shot=config.data.few_shot
        )
        skipped += too_long
        groups = sample_groups(
            student, variables, batch_records, prompts, jax.random.fold_in(key, attempt), service,
            group_size=c.group_size, prompt_width=config.data.max_prompt_tokens, settings=settings, timing=timing,
            slots=config.sampling.slots,
        )  # fmt: skip
        drawn = groups if drawn is None else drawn + groups
        informative = _informative(drawn, config)
        if len(informative) >= wanted:
            break
    metrics = _metrics(drawn, informative, skipped, timing)
    others = [i for i in range(len(drawn.records)) if i not in set(informative)]
    chosen = (informative + others)[:wanted]
    used = drawn.take(chosen)
    live = np.asarray([i in set(informative) for i in chosen])
    advantages = _advantages(used, config) * live[:, None]
    arrays = {**used.arrays, "mask": used.arrays["mask"] & live[:, None, None] & used.valid[:, :, None]}
    return make_batch(student, arrays, advantages), metrics, drawn


def _informative(groups: Groups, config: TrainConfig) -> list[int]:
    """Indices of the groups worth training on."""
    if config.grpo.baseline == "none":
        keep = groups.valid.any(axis=1)  # without a group mean, equal rewards still have a gradient
    else:
        rewards = np.nan_to_num(groups.column("total"))
        keep = grpo.informative_groups(rewards, config.grpo.dynamic_sampling_min_std, groups.valid)
    return np.flatnonzero(np.asarray(keep)).tolist()


def _kl(groups: Groups, estimator: grpo.Estimator) -> np.ndarray:
    """K [P, G]: per-token mean of the estimate under the sampled policy."""
    values = grpo.kl_estimate(groups.arrays["logprobs"], groups.arrays["ref"], estimator)
    p, g, t = groups.arrays["mask"].shape
    mean = grpo.mean_over_tokens(values.reshape(-1, t), groups.arrays["mask"].reshape(-1, t))
    return np.asarray(mean).reshape(p, g)


def _advantages(groups: Groups, config: TrainConfig) -> np.ndarray:
    c = config.grpo
    masks = {"valid": groups.valid, "malformed": groups.malformed, "malformed_advantage": c.malformed_advantage}
    rewards, kl = np.nan_to_num(groups.column("total")), _kl(groups, c.kl_estimator)
    if c.baseline == "none":
        return np.asarray(grpo.baseline_advantages(rewards, kl, kl_coef=c.kl_coef, **masks))
    return np.asarray(grpo.group_advantages(rewards, kl, kl_coef=c.kl_coef, scale=c.scale, **masks))


def _metrics(groups: Groups, informative: list[int], skipped: int, timing: Counter) -> dict[str, float]:
    """Scalars of everything that was sampled, used or not."""

    def mean(values: np.ndarray) -> float | None:
        values = values[np.isfinite(values)]
        return float(values.mean()) if values.size else None

    total, valid = groups.column("total"), groups.valid
    lengths = groups.arrays["mask"].sum(-1)
    parsed = valid & ~groups.malformed
    rejections = Counter(
        s.reward.rejection.value for row in groups.scores for s in row if s.reward and s.reward.rejection
    )
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
        "kl": mean(_kl(groups, "k1")),
        "kept_groups": len(informative) / len(groups.records),
        "groups_drawn": float(len(groups.records)),
        "prompts_too_long": float(skipped),
        "completion_tokens": float(lengths.mean()),
        "finished": float(groups.arrays["finished"].mean()),
        "tokens_per_second": timing["tokens"] / max(timing["rollout"], 1e-9),
        "seconds/rollout": timing["rollout"],
        "seconds/reference": timing["reference"],
        "seconds/reward_wait": timing["reward_wait"],
        **{f"rejected/{name}": float(count) for name, count in rejections.items()},
    }
