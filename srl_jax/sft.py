"""The baseline of every reader's first question: supervised fine-tuning on the same traces.

The same adapters, prompts, log-prob path (constrained policy included), optimiser and number of traces an update as
GRPO: where that samples P groups of G completions, this reads P * G teacher traces. No rollouts, no reward.
"""

import dataclasses
import time
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from srl_jax import grammar
from srl_jax.config import TrainConfig
from srl_jax.model.decoder import Decoder
from srl_jax.records import TeacherRecord
from srl_jax.rollout import PromptTooLong, make_batch, take_prompts
from srl_jax.student import Student, pad_prompts, prompt_width
from srl_jax.teacher_rows import possible_rows, trace_ids
from srl_jax.train_step import StepSettings, TrainBatch, TrainState, descend, policy_logprobs

# So many traces in a row that do not fit mean a wrong setting, not bad luck.
_MAX_SKIPPED = 1000


class TraceTooLong(PromptTooLong):
    """No teacher's trace of the data set fits into the completion budget: as much a user's mistake as its base is."""


def sft_settings(config: TrainConfig, settings: StepSettings) -> StepSettings:
    """GRPO's settings with micro-batches of as many traces: G times the groups."""
    return dataclasses.replace(settings, micro_batch=settings.micro_batch * config.grpo.group_size)


def collect_traces(
    student: Student, records: Iterator[TeacherRecord], config: TrainConfig
) -> tuple[TrainBatch, dict[str, float]]:
    """The next P * G teacher traces as groups of one, [P * G, 1, T], and what was left out.

    Traces longer than `sampling.max_new_tokens`, or that the vocabulary cannot spell, are skipped. Traces that the
    constrained policy could not have written (a think beyond its cap) have probability 0 under it: they stay in the
    batch with an empty mask. Raises `TraceTooLong` when only such records come, and what `take_prompts` raises.
    """
    began = time.perf_counter()
    wanted = config.data.prompts_per_step * config.grpo.group_size
    width = config.sampling.max_new_tokens
    prompts: list[list[int]] = []
    traces: list[list[int]] = []
    too_long_prompts = misfits = 0
    while len(traces) < wanted:
        [record], [prompt], skipped = take_prompts(
            student, records, 1, max_tokens=config.data.max_prompt_tokens, few_shot=config.data.few_shot
        )
        too_long_prompts += skipped
        ids = trace_ids(student, record.trace)
        if ids is None or len(ids) > width:
            misfits += 1
            if misfits - len(traces) >= _MAX_SKIPPED:
                raise TraceTooLong(f"teacher traces exceed sampling.max_new_tokens={width}; raise it")
            continue
        prompts.append(prompt)
        traces.append(ids)
    widest = prompt_width(prompts, config.data.max_prompt_tokens)
    prompt_tokens, lengths = pad_prompts(prompts, widest, student.tokenizer.pad_id)
    tokens, sizes = pad_prompts(traces, width, student.tokenizer.pad_id)
    mask = np.arange(width) < sizes[:, None]
    arrays = {"prompt_tokens": prompt_tokens, "prompt_lengths": lengths, "tokens": tokens[:, None]}
    arrays |= {"mask": mask[:, None], "logprobs": np.zeros((wanted, 1, width), np.float32)}
    batch = make_batch(student, arrays, np.ones((wanted, 1)))
    possible = possible_rows(student.automaton, batch.states, batch.completions, batch.completion_mask)
    batch = batch._replace(completion_mask=batch.completion_mask & possible[..., None])
    return batch, {
        "traces": float(possible.sum()),
        "traces_impossible": float(wanted - possible.sum()),
        "traces_left_out": float(misfits),
        "prompts_too_long": float(too_long_prompts),
        "completion_tokens": float(sizes.mean()),
        "seconds/traces": time.perf_counter() - began,
    }


@partial(jax.jit, static_argnames=("decoder", "optimizer", "settings"), donate_argnames=("state",))
def sft_step(
    state: TrainState,
    params: dict,
    automaton: grammar.TokenAutomaton,
    batch: TrainBatch,
    *,
    decoder: Decoder,
    optimizer: optax.GradientTransformation,
    settings: StepSettings,
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """One step down the negative log-likelihood per token of the batch's completions; advantages are not looked at.

    Returns the new state and scalars: loss (nats per token), entropy, grad_norm, skipped.
    """
    tokens = jnp.maximum(batch.completion_mask.sum(), 1).astype(jnp.float32)

    def loss(lora, micro: TrainBatch):
        scored = policy_logprobs(
            decoder, {"params": params, "lora": lora}, automaton, micro,
            temperature=settings.temperature, chunk=settings.logprob_chunk,
        )  # fmt: skip
        mask = micro.completion_mask
        entropy = jnp.where(mask, scored.entropy, 0.0).sum() / tokens
        return -jnp.where(mask, scored.logprobs, 0.0).sum() / tokens, {"entropy": entropy}

    return descend(state, batch, loss, ("entropy",), optimizer=optimizer, micro_batch=settings.micro_batch)
