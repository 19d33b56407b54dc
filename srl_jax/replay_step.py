"""Training on stored rollouts: no sampling, no rewards to wait for, one pass more for the present policy's log-probs.

Every ratio is to the log-probs stored by the policy that sampled. How far the present policy has gone from it decides
what a group is still worth: its effective sample size and its age gate it, and negative advantages of older samples
count less. The KL in the reward is the *present* policy's against the reference, which under those ratios is an
estimate of its divergence.
"""

import time
from collections.abc import Iterator, Sequence
from functools import partial

import jax
import numpy as np

from srl_jax import grpo, hosts
from srl_jax.config import TrainConfig
from srl_jax.groups import Groups
from srl_jax.records import ReplayGroup, SamplerSettings
from srl_jax.replay import ReplayError, stored_group
from srl_jax.rollout import grammar_states, make_batch
from srl_jax.sharding import batch_sharding
from srl_jax.student import Student, pad_prompts, prompt_width
from srl_jax.train_step import StepSettings, TrainBatch, current_scores


def sampler_settings(config: TrainConfig) -> SamplerSettings:
    """What the stored log-probs depend on beside the weights."""
    s = config.sampling
    return SamplerSettings(s.temperature, s.top_p, s.top_k, s.constrained, s.max_new_tokens, s.max_think_tokens)


def policy_version(student: Student, config_hash: str) -> str:
    """Which base and which run a policy belongs to."""
    return f"{student.base_hash[:16]}/{config_hash[:16]}"


def store(student: Student, groups: Groups, step: int, version: str, config: TrainConfig) -> list[ReplayGroup]:
    """The groups of the batch of update `step` + 1, as they are recorded."""
    states = hosts.gather(grammar_states(student, groups.arrays["tokens"]).state)
    arrays = {**groups.arrays, "grammar_states": states}
    rewards, valid, malformed = groups.column("total"), groups.valid, groups.malformed
    return [
        stored_group(
            record, {name: array[i] for name, array in arrays.items()}, rewards[i], valid[i], malformed[i],
            policy_version=version, policy_step=step, tokenizer=student.tokenizer.fingerprint,
            sampler=sampler_settings(config),
        )
        for i, record in enumerate(groups.records)
    ]  # fmt: skip


def collect_replay(
    student: Student,
    lora: dict,
    stream: Iterator[ReplayGroup],
    step: int,
    config: TrainConfig,
    settings: StepSettings,
    *,
    kl_coef: float,
) -> tuple[TrainBatch, dict[str, float | None]]:
    """The next P stored groups as a batch, gated, and what was found about them.

    Raises `ReplayError` for groups of another tokenizer, base, sampler, group size or grammar.
    """
    began = time.perf_counter()
    c, r = config.grpo, config.replay
    groups = [next(stream) for _ in range(config.data.prompts_per_step)]
    for group in groups:
        _check(student, group, config)
    arrays = _arrays(student, groups, config)
    read = time.perf_counter()
    batch = make_batch(student, arrays, np.zeros(arrays["mask"].shape[:2]))
    _check_grammar(batch, arrays, config)
    scores = current_scores(student.decoder, student.params, lora, student.automaton, batch, settings=settings)
    now, ref, exact = (np.asarray(x) for x in (scores.logprobs, scores.ref_logprobs, scores.kl))

    mask, valid = arrays["mask"], arrays["mask"].any(-1)
    # One weight a completion: the ratio of the whole text's probabilities.
    log_weights = np.where(mask, now - arrays["logprobs"], 0.0).sum(-1)
    ess = np.asarray(jax.vmap(grpo.effective_sample_size)(log_weights, valid))
    age = np.asarray([abs(step - group.policy_step) for group in groups])
    rewards = np.stack([group.rewards for group in groups])
    malformed = np.stack([group.malformed for group in groups])
    worth = np.asarray(grpo.informative_groups(rewards, c.dynamic_sampling_min_std, valid))
    if c.baseline == "none":
        worth = valid.any(axis=1)
    young = (age <= r.max_age) | (r.max_age == 0)
    live = worth & young & (ess >= r.min_ess)

    rows = (-1, mask.shape[-1])
    values = exact if c.kl_estimator == "exact" else np.asarray(grpo.kl_estimate(now, ref, c.kl_estimator))
    mean = lambda x: np.asarray(grpo.mean_over_tokens(x.reshape(rows), mask.reshape(rows))).reshape(valid.shape)
    kl, in_reward = mean(values), kl_coef if c.kl_placement == "reward" else 0.0
    masks = {"valid": valid, "malformed": malformed, "malformed_advantage": c.malformed_advantage}
    if c.baseline == "none":
        advantages = np.asarray(grpo.baseline_advantages(rewards, kl, kl_coef=in_reward, **masks))
    else:
        advantages = np.asarray(grpo.group_advantages(rewards, kl, kl_coef=in_reward, scale=c.scale, **masks))
    stale = (age > 0)[:, None] & (advantages < 0)
    advantages = np.where(stale, r.stale_negatives * advantages, advantages) * live[:, None]

    put = partial(jax.device_put, device=batch_sharding(student.mesh))
    batch = batch._replace(
        completion_mask=put(mask & live[:, None, None]), advantages=put(advantages.astype(np.float32))
    )
    if settings.kl_in_loss not in (None, "exact"):
        batch = batch._replace(ref_logprobs=put(ref))
    return batch, {
        "reward/total": float(rewards[valid].mean()) if valid.any() else None,
        "reward/group_std": float(np.mean([row[ok].std() for row, ok in zip(rewards, valid, strict=True) if ok.any()]))
        if valid.any()
        else None,
        "kl": float(mean(now - ref)[valid].mean()) if valid.any() else None,
        "kept_groups": float(live.mean()),
        "replay/ess": float(ess.mean()),
        "replay/age": float(age.mean()),
        "replay/too_old": float((~young).sum()),
        "replay/too_far": float((young & worth & (ess < r.min_ess)).sum()),
        "completion_tokens": float(mask.sum(-1)[valid].mean()) if valid.any() else None,
        "seconds/read": read - began,
        "seconds/reference": time.perf_counter() - read,
    }


def _check(student: Student, group: ReplayGroup, config: TrainConfig) -> None:
    """Whether the log-probs mean here what they meant where they were stored."""
    wanted = {
        "tokenizer": (group.tokenizer, student.tokenizer.fingerprint, "train with the model it was recorded with"),
        "base weights": (
            group.policy_version.partition("/")[0], student.base_hash[:16], "train with the model it was recorded with",
        ),
        "sampler": (group.sampler, sampler_settings(config), "set config.sampling as it was"),
        "group size": (len(group.rewards), config.grpo.group_size, "set config.grpo.group_size to it"),
    }  # fmt: skip
    for name, (stored, here, remedy) in wanted.items():
        if stored != here:
            raise ReplayError(f"{config.replay.dir}: {name} of {group.task_id} is {stored}, here {here}; {remedy}")
    if len(group.prompt_ids) > config.data.max_prompt_tokens:
        raise ReplayError(
            f"{config.replay.dir}: the prompt of {group.task_id} has {len(group.prompt_ids)} tokens; raise "
            f"config.data.max_prompt_tokens={config.data.max_prompt_tokens}"
        )


def _arrays(student: Student, groups: Sequence[ReplayGroup], config: TrainConfig) -> dict[str, np.ndarray]:
    ids = [group.prompt_ids.tolist() for group in groups]
    width = prompt_width(ids, config.data.max_prompt_tokens)
    prompts, lengths = pad_prompts(ids, width, student.tokenizer.pad_id)
    stack = lambda name: np.stack([getattr(group, name) for group in groups])
    return {
        "prompt_tokens": prompts,
        "prompt_lengths": lengths,
        "tokens": stack("completion_ids"),
        "mask": stack("completion_mask"),
        "logprobs": stack("sampler_logprobs"),
        "grammar_states": stack("grammar_states"),
    }


def _check_grammar(batch: TrainBatch, arrays: dict[str, np.ndarray], config: TrainConfig) -> None:
    same = np.asarray(batch.states.state) == arrays["grammar_states"]
    if not same[arrays["mask"]].all():
        raise ReplayError(
            f"{config.replay.dir}: the trace grammar is another one than when this was recorded, and so are the "
            "log-probs; record the run again"
        )
