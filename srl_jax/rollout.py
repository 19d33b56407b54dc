"""From teacher records to a batch to train on: prompts, samples, rewards, advantages.

The device samples and scores log-probs while the host parses, embeds and compares; the two meet in `TrainBatch`.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from srl_jax import grammar, grpo, hosts
from srl_jax.config import TrainConfig
from srl_jax.groups import Groups, informative, rollout_metrics, sampled_kl
from srl_jax.groups import advantages as group_advantages
from srl_jax.logprobs import TokenLogprobs
from srl_jax.records import TeacherRecord
from srl_jax.sampling import Completions, sample
from srl_jax.sandbox.runner import RunnerUnavailable
from srl_jax.sandbox.service import Score, ScoreRequest, ScoresCompletions
from srl_jax.sharding import batch_sharding
from srl_jax.student import Student, pad_prompts, prompt_width
from srl_jax.teacher_rows import with_teachers
from srl_jax.train_step import StepSettings, TrainBatch, current_scores, reference_logprobs
from srl_jax.value import guess, prompt_features

# So many records in a row that cannot be used mean a wrong setting, not bad luck.
MAX_SKIPPED = 1000
NOT_ASKED = Score(None, None, "not asked: sampled to fill up a batch")


class PromptTooLong(ValueError):
    """No record of the data set fits into the prompt budget."""


class Rollout(NamedTuple):
    """One step's batch and what it came from.

    `drawn` is everything that was sampled; `used` the groups of the batch, in its order, a teacher's row included.
    `features` [P, D] are what the value head reads, None without one.
    """

    batch: TrainBatch
    metrics: dict[str, float | None]
    drawn: Groups
    used: Groups
    features: jax.Array | None


def take_prompts(
    student: Student, records: Iterator[TeacherRecord], count: int, *, max_tokens: int, few_shot: int
) -> tuple[list[TeacherRecord], list[list[int]], int]:
    """The next `count` records whose prompt fits, their prompts' ids, and how many were skipped as too long.

    Of several hosts each encodes its share of the prompts.
    """
    kept, prompts, skipped = [], [], 0
    encode = lambda some: [
        np.asarray(student.tokenizer.encode_prompt(record.task, few_shot=few_shot), "<i4").tobytes() for record in some
    ]
    while len(kept) < count:
        drawn = [next(records) for _ in range(count - len(kept))]
        for record, encoded in zip(drawn, hosts.spread(drawn, encode), strict=True):
            ids = np.frombuffer(encoded, "<i4").tolist()
            if len(ids) <= max_tokens:
                kept.append(record)
                prompts.append(ids)
                continue
            skipped += 1
            if skipped >= MAX_SKIPPED:
                raise PromptTooLong(
                    f"{skipped} prompts in a row are longer than data.max_prompt_tokens={max_tokens} (the last: "
                    f"{len(ids)} tokens); raise it, or rebuild the data set with shorter excerpts"
                )
    return kept, prompts, skipped


def executable(record: TeacherRecord, runners: frozenset[str] | None) -> bool:
    """Whether this machine can run the record's tests; always, where nothing is executed (`runners` is None)."""
    tests = record.task.tests
    return runners is None or tests is None or tests.runner in runners


def executable_only(
    drawn: Iterator[Any],
    runners: frozenset[str] | None,
    records_of: Callable[[Any], Sequence[TeacherRecord]] = lambda record: [record],
) -> Iterator[Any]:
    """What is drawn, records or what `records_of` knows those of, as far as all its tests can run here.

    Where the reward needs the sandbox's verdict, others cannot be scored.
    """
    skipped = 0
    for one in drawn:
        foreign = [record for record in records_of(one) if not executable(record, runners)]
        if not foreign:
            skipped = 0
            yield one
            continue
        skipped += 1
        if skipped >= MAX_SKIPPED:
            runner = foreign[0].task.tests.runner
            raise RunnerUnavailable(
                runner,
                f"{skipped} tasks in a row need it; install it or set reward.execution=0 and reward.match_gate=0",
            )


def decode_completions(student: Student, tokens: np.ndarray, mask: np.ndarray) -> list[str]:
    """Text of each row of [rows, T] tokens, padding left out. Of several hosts each decodes its share."""
    # "surrogatepass": a completion may hold bytes that are no text, as lone surrogates.
    decode = lambda rows: [
        student.tokenizer.decode_trace(tokens[row, mask[row]].tolist()).encode("utf-8", "surrogatepass") for row in rows
    ]
    return [text.decode("utf-8", "surrogatepass") for text in hosts.spread(range(len(tokens)), decode)]


@partial(jax.jit, static_argnames=("max_new_tokens", "max_think_tokens"))
def _states(automaton, tokens, *, max_new_tokens: int, max_think_tokens: int):
    rows = tokens.reshape(-1, tokens.shape[-1])
    states = grammar.replay(automaton, rows, max_new_tokens, max_think_tokens)
    return jax.tree.map(lambda x: x.reshape(*tokens.shape, *x.shape[2:]), states)


def grammar_states(student: Student, tokens: np.ndarray | jax.Array) -> grammar.GrammarState:
    """The state before each of the tokens [P, G, T]."""
    return _states(
        student.automaton,
        tokens,
        max_new_tokens=student.sampling.max_new_tokens,
        max_think_tokens=student.sampling.max_think_tokens,
    )


def make_batch(student: Student, arrays: dict[str, np.ndarray], advantages: np.ndarray) -> TrainBatch:
    """Places host arrays on the mesh and replays the grammar over the sampled tokens."""
    put = partial(hosts.place, sharding=batch_sharding(student.mesh))
    tokens = put(arrays["tokens"])
    return TrainBatch(
        put(arrays["prompt_tokens"]),
        put(arrays["prompt_lengths"]),
        tokens,
        put(arrays["mask"]),
        grammar_states(student, tokens),
        put(arrays["logprobs"]),
        put(advantages.astype(np.float32)),
        kept=put(arrays["kept"]) if "kept" in arrays else None,
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
    max_prompt_tokens: int,
    settings: StepSettings,
    timing: Counter,
    reference: bool = True,
    slots: int = 0,
    asked: np.ndarray | None = None,
) -> Groups:
    """Samples and scores one group per record; rewards are computed while the device scores the reference.

    `reference=False` is for the base itself: its log-probs are the reference's, so `ref` repeats `logprobs`.
    `slots`: prompts decoded at once, see `sampling.sample`. `asked` [P] is False for records that only fill the batch
    up: their completions have an empty mask and are `NOT_ASKED`.
    """
    started = time.perf_counter()
    put = partial(hosts.place, sharding=batch_sharding(student.mesh))
    prompt_tokens, lengths = pad_prompts(prompts, prompt_width(prompts, max_prompt_tokens), student.tokenizer.pad_id)
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
    arrays |= {name: array for name, array in hosts.gather(drawn._asdict()).items() if array is not None}
    if asked is not None:
        arrays["mask"] = arrays["mask"] & asked[:, None, None]
    timing["rollout"] += time.perf_counter() - started
    timing["tokens"] += int(arrays["mask"].sum())

    rows = (-1, arrays["tokens"].shape[-1])
    texts = decode_completions(student, arrays["tokens"].reshape(rows), arrays["mask"].reshape(rows))
    rated = np.repeat(np.ones(len(records), bool) if asked is None else asked, group_size)
    requests = [ScoreRequest(text, records[i // group_size]) for i, text in enumerate(texts) if rated[i]]
    pending = service.submit(requests)
    started = time.perf_counter()
    if reference:
        batch = make_batch(student, arrays, np.zeros((len(records), group_size)))
        scored = reference_logprobs(student.decoder, student.params, student.automaton, batch, settings=settings)
        arrays["ref"] = hosts.gather(scored)
    else:
        arrays["ref"] = arrays["logprobs"]
    timing["reference"] += time.perf_counter() - started
    started = time.perf_counter()
    given = iter(pending.result())
    scores = [next(given) if one else NOT_ASKED for one in rated]
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
    *,
    kl_coef: float | None = None,
    value: dict | None = None,
) -> Rollout:
    """Samples and scores one step's batch. `kl_coef` replaces `grpo.kl_coef`; `value` is the value head's weights.

    Dynamic sampling: groups whose rewards barely differ teach nothing; they are replaced by further rollouts while
    the budget lasts. What is still missing then stays in the batch with an empty mask, so shapes never change.
    """
    wanted, c = config.data.prompts_per_step, config.grpo
    variables = student.sampling_variables(lora)
    timing: Counter = Counter()
    drawn: Groups | None = None
    kept: list[int] = []
    skipped = 0
    for attempt in range(1 + c.max_extra_rollouts):
        batch_records, prompts, too_long = take_prompts(
            student, records, wanted, max_tokens=config.data.max_prompt_tokens, few_shot=config.data.few_shot
        )
        skipped += too_long
        groups = sample_groups(
            student, variables, batch_records, prompts, jax.random.fold_in(key, attempt), service,
            group_size=c.group_size - c.teacher_in_group, max_prompt_tokens=config.data.max_prompt_tokens,
            settings=settings, timing=timing, slots=config.sampling.slots,
        )  # fmt: skip
        drawn = groups if drawn is None else drawn + groups
        members = with_teachers(student, drawn, config) if c.teacher_in_group else drawn
        kept = hosts.from_first(partial(informative, members, config))
        if len(kept) >= wanted:
            break
    others = [i for i in range(len(drawn.records)) if i not in set(kept)]
    chosen = (kept + others)[:wanted]
    used = members.take(chosen)
    live = np.asarray([i in set(kept) for i in chosen])
    started = time.perf_counter()
    coefficient = c.kl_coef if kl_coef is None else kl_coef
    batch, features, gap = _weigh(student, lora, used, live, config, settings, coefficient, value)
    timing["reference"] += time.perf_counter() - started
    metrics = rollout_metrics(drawn, kept, skipped, timing, kl=sampled_kl(drawn.arrays, "k1"))
    if gap is not None:
        metrics["logprob_gap"] = gap
    return Rollout(batch, metrics, drawn, used, features)


def _weigh(
    student: Student,
    lora: dict,
    used: Groups,
    live: np.ndarray,
    config: TrainConfig,
    settings: StepSettings,
    kl_coef: float,
    value: dict | None,
) -> tuple[TrainBatch, jax.Array | None, float | None]:
    """The batch of groups of which only the `live` ones are trained on, and the value head's features.

    Last, where the batch's old log-probs are not the sampler's, how far they are from those: the update cannot tell.
    They are the trainer's where the two are known to differ: with `importance_cap`, and where the sampler kept rounded
    keys and values. The KL in the reward is then the trainer's too.
    """
    c = config.grpo
    arrays = {**used.arrays, "mask": used.arrays["mask"] & live[:, None, None] & used.valid[:, :, None]}
    batch = make_batch(student, arrays, np.zeros(used.valid.shape))
    scores = needed_scores(student, lora, batch, config, settings)
    sampled = used.valid.shape[1] - c.teacher_in_group
    own = {name: used.arrays[name][:, :sampled] for name in ("logprobs", "ref", "mask")}
    kl = completion_kl(student, own, jax.tree.map(lambda x: x[:, :sampled], scores), config)
    if c.teacher_in_group:  # no policy of ours sampled it, so it has no KL: it neither gains nor loses by the others'
        scored = np.where(used.valid[:, :sampled], kl, 0.0).sum(1) / np.maximum(used.valid[:, :sampled].sum(1), 1)
        kl = np.concatenate([kl, scored[:, None]], axis=1)
    features = values = None
    if value:
        features = prompt_features(student.decoder, student.params, batch.prompt_tokens, batch.prompt_lengths)
        values = np.asarray(guess(value, features))
    advantages = group_advantages(
        used, config, student.tokenizer, kl=kl, kl_coef=kl_coef if c.kl_placement == "reward" else 0.0, values=values
    )
    advantages = advantages * live.reshape(-1, *[1] * (advantages.ndim - 1))
    put = partial(hosts.place, sharding=batch_sharding(student.mesh))
    batch, gap = with_advantages(student, batch, arrays, advantages, scores, config, settings)
    if c.teacher_in_group:
        imitated = np.zeros(used.valid.shape, bool)
        imitated[:, -1] = True
        batch = batch._replace(imitated=put(imitated))
    return batch, features, gap


def _kl_is_exact(config: TrainConfig) -> bool:
    return config.grpo.kl_estimator == "exact" and config.grpo.kl_placement == "reward"


def _apart(student: Student, config: TrainConfig) -> bool:
    """Whether the trainer's log-probs stand for the sampler's, since the two are known to differ."""
    return bool(config.grpo.importance_cap) or student.cache_is_rounded


def needed_scores(
    student: Student, lora: dict, batch: TrainBatch, config: TrainConfig, settings: StepSettings
) -> TokenLogprobs | None:
    """The trainer's own scores of a batch [P, G, T], where K or the old log-probs are made of them."""
    if not _kl_is_exact(config) and not _apart(student, config):
        return None
    return current_scores(student.decoder, student.params, lora, student.automaton, batch, settings=settings)


def completion_kl(
    student: Student, arrays: dict[str, np.ndarray], scores: TokenLogprobs | None, config: TrainConfig
) -> np.ndarray:
    """K [P, G] of completions that our policy sampled; `scores` are those that `needed_scores` gave for them."""
    if _kl_is_exact(config):
        rows = (-1, arrays["mask"].shape[-1])
        mean = grpo.mean_over_tokens(scores.kl.reshape(rows), arrays["mask"].reshape(rows))
        return hosts.gather(mean).reshape(arrays["mask"].shape[:-1])
    if _apart(student, config):
        arrays = {**arrays, "logprobs": hosts.gather(scores.logprobs)}
    estimator = config.grpo.kl_estimator
    return sampled_kl(arrays, "k1" if estimator == "exact" else estimator)


def with_advantages(
    student: Student,
    batch: TrainBatch,
    arrays: dict[str, np.ndarray],
    advantages: np.ndarray,
    scores: TokenLogprobs | None,
    config: TrainConfig,
    settings: StepSettings,
) -> tuple[TrainBatch, float | None]:
    """The batch with its advantages and what else the update is to read: importance weights, the reference's log-probs.

    `arrays` are those the batch was made of. Also how far the sampler's log-probs are from the batch's, where these are
    not the sampler's, over all members that we sampled.
    """
    put = partial(hosts.place, sharding=batch_sharding(student.mesh))
    batch = batch._replace(advantages=put(advantages.astype(np.float32)))
    gap = None
    if _apart(student, config):
        sampled = arrays["mask"].shape[1] - config.grpo.teacher_in_group
        apart = np.abs(hosts.gather(scores.logprobs) - arrays["logprobs"])[:, :sampled]
        gap = float(np.mean(apart, where=arrays["mask"][:, :sampled])) if arrays["mask"][:, :sampled].any() else 0.0
        if cap := config.grpo.importance_cap:
            weights = grpo.truncated_importance_weights(scores.logprobs, batch.old_logprobs, cap)
            batch = batch._replace(token_weights=weights)
        batch = batch._replace(old_logprobs=scores.logprobs)
    if settings.kl_in_loss not in (None, "exact"):
        batch = batch._replace(ref_logprobs=put(arrays["ref"]))
    return batch, gap
