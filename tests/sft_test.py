"""The supervised baseline: its loss is the likelihood under the constrained policy, and descending raises it."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srl_jax import sft
from srl_jax.model import hf
from srl_jax.sft import TraceTooLong, collect_traces, sft_settings, sft_step
from srl_jax.steps import step_settings
from srl_jax.trace import parse_trace, render_trace
from srl_jax.train_step import TrainState, make_optimizer, policy_logprobs
from tests.fakes import CountingStream, perturbed, teacher_record, tiny_config, tiny_student


def config():
    made = tiny_config()
    made.sampling.max_new_tokens, made.sampling.max_think_tokens = 160, 24
    made.data.prompts_per_step, made.grpo.group_size, made.grpo.micro_batch = 2, 4, 1
    return made


@pytest.fixture(scope="module")
def student():
    return tiny_student(config())


def update(student, lora, batch, settings, steps=1):
    optimizer, _ = make_optimizer(1e-2, steps=100, schedule="constant")
    lora = student.place_lora(jax.tree.map(np.asarray, lora))
    state = TrainState(jnp.int32(0), lora, optimizer.init(lora), jax.random.key_data(jax.random.key(0)))
    losses = []
    for _ in range(steps):
        state, metrics = sft_step(
            state, student.params, student.automaton, batch,
            decoder=student.decoder, optimizer=optimizer, settings=settings,
        )  # fmt: skip
        losses.append({name: float(value) for name, value in metrics.items()})
    return state.lora, losses


def test_a_batch_is_the_next_traces_with_their_prompts(student):
    batch, metrics = collect_traces(student, CountingStream(), config())
    assert batch.completions.shape == (8, 1, 160) and bool(jnp.all(batch.advantages == 1))
    for number in range(8):
        record = teacher_record(number)
        keep = np.asarray(batch.completion_mask[number, 0])
        ids = np.asarray(batch.completions[number, 0])[keep].tolist()
        assert student.tokenizer.decode_trace(ids) == record.trace
        length = int(batch.prompt_lengths[number])
        prompt = np.asarray(batch.prompt_tokens[number, :length]).tolist()
        assert prompt == student.tokenizer.encode_prompt(record.task, few_shot=0)
    assert metrics["traces"] == 8 and metrics["traces_impossible"] == metrics["traces_left_out"] == 0


def test_the_loss_is_the_likelihood_of_the_sampled_distribution(student):
    lora = perturbed(student.fresh_lora(0))
    batch, _ = collect_traces(student, CountingStream(), config())
    scored = policy_logprobs(
        student.decoder, {"params": student.params, "lora": lora}, student.automaton, batch, temperature=1.0, chunk=256
    )
    mask = np.asarray(batch.completion_mask)
    assert (np.asarray(scored.logprobs)[mask] > -100).all()  # every token of a teacher is one the grammar allows
    expected = -np.asarray(scored.logprobs)[mask].mean()
    _, [whole] = update(student, lora, batch, sft_settings(config(), step_settings(config())))
    assert whole["loss"] == pytest.approx(expected, rel=1e-5)
    one_by_one = dataclasses.replace(sft_settings(config(), step_settings(config())), micro_batch=1)
    _, [cut] = update(student, lora, batch, one_by_one)
    for name in ("loss", "entropy", "grad_norm"):
        assert cut[name] == pytest.approx(whole[name], rel=1e-4)


def test_descending_raises_the_likelihood_and_leaves_the_base_alone(student):
    before = hf.weights_hash(student.params)
    batch, _ = collect_traces(student, CountingStream(), config())
    _, losses = update(student, student.fresh_lora(0), batch, sft_settings(config(), step_settings(config())), steps=10)
    assert losses[-1]["loss"] < losses[0]["loss"] - 0.05
    assert hf.weights_hash(student.params) == before


def test_a_trace_the_policy_cannot_write_has_no_part(student):
    long = teacher_record(0)
    trace = parse_trace(long.trace)
    wordy = render_trace(dataclasses.replace(trace, think="one two three four five six seven eight " * 4))
    records = [teacher_record(n) for n in range(8)]
    records[3] = dataclasses.replace(long, trace=wordy)
    batch, metrics = collect_traces(student, iter(records), config())
    assert metrics["traces_impossible"] == 1 and metrics["traces"] == 7
    assert not bool(batch.completion_mask[3].any()) and bool(batch.completion_mask[2].any())


def test_what_does_not_fit_is_skipped_and_counted(student, monkeypatch):
    small = config()
    lengths = sorted(len(student.tokenizer.encode_trace(teacher_record(n).trace)) for n in range(16))
    small.sampling.max_new_tokens = lengths[0]  # only the shortest of the sixteen fit
    monkeypatch.setattr(sft, "_MAX_SKIPPED", 40)
    assert lengths[-1] > lengths[0]
    stream = CountingStream()
    stream.position = 10  # two digits, more tokens
    batch, metrics = collect_traces(tiny_student(small), stream, small)
    assert batch.completions.shape == (8, 1, lengths[0]) and metrics["traces_left_out"] > 0
    small.sampling.max_new_tokens = lengths[0] - 1
    with pytest.raises(TraceTooLong, match="max_new_tokens"):
        collect_traces(tiny_student(small), CountingStream(), small)


def test_prompts_too_long_are_counted(student):
    narrow = config()
    narrow.data.max_prompt_tokens = max(
        len(student.tokenizer.encode_prompt(teacher_record(n).task, few_shot=0)) for n in range(8)
    )
    huge = teacher_record(0)
    huge = dataclasses.replace(huge, task=dataclasses.replace(huge.task, instruction="word " * 300))
    _, metrics = collect_traces(student, itertools.chain([huge], CountingStream()), narrow)
    assert metrics["prompts_too_long"] >= 1
