"""Samples follow the masked distribution, rows keep to themselves, and the trainer agrees with the sampler."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from srl_jax import grammar
from srl_jax.model.decoder import completion_hidden
from srl_jax.rollout import decode_completions, make_batch
from srl_jax.sampling import draw, sample
from srl_jax.student import pad_prompts
from srl_jax.trace import parse_trace
from srl_jax.train_step import policy_logprobs
from tests.fakes import perturbed, tiny_student


@pytest.fixture(scope="module")
def student():
    return tiny_student()


@pytest.fixture(scope="module")
def lora(student):
    return perturbed(student.fresh_lora(0))


def _prompts(count, width=24, seed=0):
    rng = np.random.default_rng(seed)
    rows = [rng.integers(0, 49152, width - 5 * (i % 3)).tolist() for i in range(count)]
    return pad_prompts(rows, width, 0)


def _sample(student, lora, prompts, key=0, group_size=4, **changes):
    tokens, lengths = prompts
    return sample(
        student.decoder,
        student.sampling_variables(lora),
        changes.pop("automaton", student.automaton),
        jnp.asarray(tokens),
        jnp.asarray(lengths),
        jax.random.key(key),
        group_size=group_size,
        settings=dataclasses.replace(student.sampling, **changes),
        pad_id=student.tokenizer.pad_id,
    )


def test_draw_follows_the_distribution_and_never_takes_a_zero():
    weights = np.zeros(700, np.float32)
    weights[[3, 127, 128, 400, 699]] = [5, 1, 2, 0.5, 1.5]
    rows = 20_000
    uniforms = jax.random.uniform(jax.random.key(1), (rows, 2))
    drawn = np.asarray(jax.jit(draw)(jnp.broadcast_to(weights[None, :], (rows, 700)), uniforms))
    counts = np.bincount(drawn, minlength=700)
    assert counts[weights == 0].sum() == 0
    expected = rows * weights[weights > 0] / weights.sum()
    assert scipy.stats.chisquare(counts[weights > 0], expected).pvalue > 1e-3


def test_draw_at_the_ends_of_the_interval():
    weights = np.zeros((2, 300), np.float32)
    weights[:, [7, 250]] = 1
    ends = jnp.asarray([[0.0, 0.0], [1 - 2**-24, 1 - 2**-24]])
    assert draw(jnp.asarray(weights), ends).tolist() == [7, 250]


def test_every_constrained_sample_parses_at_any_budget(student, lora):
    shortest = grammar.shortest_trace(student.automaton)
    for budget in (shortest, shortest + 1, shortest + 5, 64):
        drawn = _sample(student, lora, _prompts(4), key=budget, max_new_tokens=budget)
        rows = (-1, budget)
        texts = decode_completions(
            student, np.asarray(drawn.tokens).reshape(rows), np.asarray(drawn.mask).reshape(rows)
        )
        for text in texts:
            parse_trace(text)
        assert bool(drawn.finished.all())


def test_a_row_keeps_its_tokens_whatever_its_neighbours(student, lora):
    tokens, lengths = _prompts(3)
    together = _sample(student, lora, (tokens, lengths), key=5, group_size=2)
    alone = _sample(student, lora, (tokens[:1], lengths[:1]), key=5, group_size=2)
    np.testing.assert_array_equal(together.tokens[0], alone.tokens[0])
    repeated = _sample(student, lora, (tokens, lengths), key=5, group_size=2)
    np.testing.assert_array_equal(together.tokens, repeated.tokens)
    assert not np.array_equal(together.tokens[0, 0], together.tokens[0, 1])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("constrained", [True, False])
def test_sampler_and_trainer_agree_on_logprobs(student, lora, temperature, constrained):
    automaton = student.automaton if constrained else grammar.free_automaton(student.tokenizer)
    own = dataclasses.replace(
        student, automaton=automaton, sampling=dataclasses.replace(student.sampling, temperature=temperature)
    )
    prompts = _prompts(4)
    drawn = _sample(own, lora, prompts, automaton=automaton, temperature=temperature)
    arrays = {"prompt_tokens": prompts[0], "prompt_lengths": prompts[1]}
    arrays |= {name: np.asarray(getattr(drawn, name)) for name in ("tokens", "mask", "logprobs")}
    batch = make_batch(own, arrays, np.zeros((4, 4)))
    variables = {"params": own.params, "lora": lora}
    scored = policy_logprobs(own.decoder, variables, automaton, batch, temperature=temperature, chunk=64)
    mask = arrays["mask"]
    gap = np.abs(np.asarray(scored.logprobs) - arrays["logprobs"])[mask]
    assert gap.mean() <= 1e-5 and gap.max() < 1e-3
    assert mask.sum(-1).min() > 0 and (arrays["logprobs"][mask] <= 1e-6).all()
    # Without the adapters the trainer must disagree: they are in use in both places.
    base = policy_logprobs(own.decoder, {"params": own.params}, automaton, batch, temperature=temperature, chunk=64)
    assert np.abs(np.asarray(base.logprobs) - arrays["logprobs"])[mask].mean() > 1e-2


def test_greedy_takes_the_likeliest_allowed_token(student, lora):
    prompts = _prompts(2)
    drawn = _sample(student, lora, prompts, group_size=1, temperature=0.0)
    variables = {"params": student.params, "lora": lora}
    tokens, lengths = map(jnp.asarray, prompts)
    hidden = completion_hidden(student.decoder, variables, tokens, lengths, drawn.tokens)
    logits = np.asarray(jnp.einsum("pgtd,vd->pgtv", hidden, student.params["embedding"]))[:, 0]
    states = grammar.replay(
        student.automaton, drawn.tokens[:, 0], student.sampling.max_new_tokens, student.sampling.max_think_tokens
    )
    allowed = np.asarray(grammar.allowed_tokens(student.automaton, states))
    best = np.where(allowed, logits, -np.inf).argmax(-1)
    mask = np.asarray(drawn.mask[:, 0])
    np.testing.assert_array_equal(best[mask], np.asarray(drawn.tokens[:, 0])[mask])


def test_an_unfinished_free_sample_is_cut_at_the_budget(student, lora):
    free = grammar.free_automaton(student.tokenizer)
    drawn = _sample(student, lora, _prompts(2), automaton=free, max_new_tokens=20)
    lengths = np.asarray(drawn.mask.sum(-1))
    assert lengths.max() <= 20
    mask = np.asarray(drawn.mask)
    assert (np.diff(mask.astype(int), axis=-1) <= 0).all()  # padding only after the end
    assert (np.asarray(drawn.tokens)[~mask] == student.tokenizer.pad_id).all()
