"""Top-k and top-p: the kept set by hand, samples that follow it, a trainer that renormalises over the same tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from srl_jax import grammar, sampling
from srl_jax.config import ConfigError, validate
from srl_jax.model.decoder import completion_hidden
from srl_jax.rollout import collect_rollouts, make_batch
from srl_jax.sampling import SamplingConfig, sample
from srl_jax.steps import step_settings
from srl_jax.student import pad_prompts
from srl_jax.train_step import policy_logprobs
from srl_jax.truncation import NOTHING, keep_likeliest, restrict
from tests.fakes import CountingStream, perturbed, tiny_config, tiny_student
from tests.rollout_test import SPREAD, Scripted
from tests.updates_test import update

# Probabilities .4, .3, .2, .1 in an order of their own, and a token that the grammar forbids.
SCORES = jnp.log(jnp.asarray([[0.2, 0.4, 0.0, 0.1, 0.3]]))


@pytest.mark.parametrize(
    ("top_k", "top_p", "temperature", "kept", "logprobs"),
    [
        (3, 1.0, 1.0, [1, 4, 0], [np.log(4 / 9), np.log(3 / 9), np.log(2 / 9)]),
        # Of the three, the first two have 7/9 = .778 of the probability; before the second it is 4/9 = .444.
        (3, 0.77, 1.0, [1, 4], [np.log(4 / 7), np.log(3 / 7)]),
        (3, 0.78, 1.0, [1, 4, 0], [np.log(4 / 9), np.log(3 / 9), np.log(2 / 9)]),
        (3, 0.44, 1.0, [1], [0.0]),
        # At temperature 2 probabilities are as their roots, .632, .548, .447: the first two have .725 of the three.
        (3, 0.77, 2.0, [1, 4, 0], [np.log(0.388632), np.log(0.336565), np.log(0.274804)]),
        (5, 1.0, 1.0, [1, 4, 0, 3], np.log([0.4, 0.3, 0.2, 0.1]).tolist()),  # what is forbidden is never kept
    ],
)
def test_what_is_kept_by_hand(top_k, top_p, temperature, kept, logprobs):
    scores, tokens = keep_likeliest(SCORES / temperature, top_k, top_p)
    assert tokens[0].tolist() == kept + [NOTHING] * (top_k - len(kept))
    np.testing.assert_allclose(jax.nn.log_softmax(scores[0])[: len(kept)], logprobs, atol=5e-6)
    assert np.isneginf(scores[0, len(kept) :]).all()


def test_among_equals_the_lower_id_is_kept():
    _, tokens = keep_likeliest(jnp.zeros((1, 300)), 4, 0.5)
    assert tokens[0].tolist() == [0, 1, NOTHING, NOTHING]


def test_a_row_is_restricted_to_what_it_kept_and_left_alone_where_it_was_never_truncated():
    allowed = jnp.asarray([[True, True, False, True]] * 3)
    kept = jnp.asarray([[3, NOTHING], [1, 2], [NOTHING, NOTHING]])
    assert restrict(allowed, kept).astype(int).tolist() == [[0, 0, 0, 1], [0, 1, 0, 0], [1, 1, 0, 1]]


def test_samples_follow_the_truncated_distribution():
    rows, weights = 20_000, np.asarray([5, 0, 1, 8, 3, 0.5, 2, 0, 4, 0.25])
    scores = jnp.broadcast_to(jnp.log(weights)[None, :].astype(jnp.float32), (rows, 10))
    settings = SamplingConfig(16, temperature=0.5, top_k=5, top_p=0.95)
    keys = sampling.row_keys(jax.random.key(2), rows)
    chosen, logprobs, kept = jax.jit(sampling._choose, static_argnums=3)(scores, keys, jnp.zeros(rows, int), settings)
    # Squares 64, 25, 16, 9, 4 of 118: without the last two .89, without the last .966.
    assert kept[0].tolist() == [3, 0, 8, 4, NOTHING]
    expected = np.asarray([25, 0, 0, 64, 9, 0, 0, 0, 16, 0]) / 114
    counts = np.bincount(chosen, minlength=10)
    assert counts[expected == 0].sum() == 0
    assert scipy.stats.chisquare(counts[expected > 0], rows * expected[expected > 0]).pvalue > 1e-3
    np.testing.assert_allclose(logprobs, np.log(expected[np.asarray(chosen)]), atol=1e-5)


def draw(student, lora, count=4, **options):
    rng = np.random.default_rng(1)
    prompts, lengths = pad_prompts([rng.integers(0, 49152, 24 - 5 * (i % 3)).tolist() for i in range(count)], 24, 0)
    drawn = sample(
        student.decoder, student.sampling_variables(lora), student.automaton, jnp.asarray(prompts),
        jnp.asarray(lengths), jax.random.key(0), group_size=4, settings=student.sampling,
        pad_id=student.tokenizer.pad_id, **options,
    )  # fmt: skip
    arrays = {name: np.asarray(value) for name, value in drawn._asdict().items() if value is not None}
    return arrays | {"prompt_tokens": prompts, "prompt_lengths": lengths}


def scored(student, variables, batch):
    scores = policy_logprobs(
        student.decoder, variables, student.automaton, batch, temperature=student.sampling.temperature, chunk=64
    )
    return np.asarray(scores.logprobs)


def truncating(student, *, constrained=True, **settings):
    automaton = student.automaton if constrained else grammar.free_automaton(student.tokenizer)
    return dataclasses.replace(student, automaton=automaton, sampling=dataclasses.replace(student.sampling, **settings))


@pytest.mark.parametrize(
    ("constrained", "temperature", "top_k", "top_p"),
    [(True, 1.0, 20, 1.0), (True, 0.7, 50, 0.8), (False, 1.0, 20, 0.9)],
)
def test_the_trainer_scores_what_was_sampled_and_keeps_its_support_while_the_policy_moves(
    student, lora, constrained, temperature, top_k, top_p
):
    own = truncating(student, constrained=constrained, temperature=temperature, top_k=top_k, top_p=top_p)
    arrays = draw(own, lora)
    mask, kept = arrays["mask"], arrays["kept"]
    sizes = (kept != NOTHING).sum(-1)
    assert (sizes[~mask] == 0).all() and sizes[mask].min() >= 1 and 1 < sizes[mask].max() <= top_k
    assert (kept == arrays["tokens"][..., None]).any(-1)[mask].all(), "every token is one of those it was drawn from"
    batch = make_batch(own, arrays, np.zeros((4, 4)))
    gap = np.abs(scored(own, {"params": own.params, "lora": lora}, batch) - arrays["logprobs"])[mask]
    assert gap.mean() <= 1e-5 and gap.max() < 1e-3
    whole = scored(own, {"params": own.params, "lora": lora}, batch._replace(kept=None))
    assert np.abs(whole - arrays["logprobs"])[mask].mean() > 0.1, "over the whole softmax ratios would be biased"
    # Another policy, by hand: its logits at the kept ids, which are the grammar's too.
    moved = {"params": own.params, "lora": perturbed(lora, scale=0.1, seed=3)}
    hidden = completion_hidden(own.decoder, moved, *(jnp.asarray(arrays[n]) for n in _INPUTS))
    logits = np.asarray(jnp.einsum("pgtd,vd->pgtv", hidden, own.params["embedding"])) / temperature
    at = np.take_along_axis(logits, np.minimum(kept, logits.shape[-1] - 1), axis=-1)
    at = np.where(kept == NOTHING, -np.inf, at)[mask].astype(np.float64)
    target = np.take_along_axis(logits, arrays["tokens"][..., None], axis=-1)[..., 0][mask]
    now = scored(own, moved, batch)[mask]
    np.testing.assert_allclose(now, target - scipy.special.logsumexp(at, axis=-1), atol=1e-4)
    assert np.abs(now - arrays["logprobs"][mask]).max() > 0.1, "the policy did move"


_INPUTS = ("prompt_tokens", "prompt_lengths", "tokens")


def test_fresh_adapters_have_ratio_one_and_no_kl_in_a_step_with_filters_and_a_teacher(student):
    config = tiny_config()
    config.sampling.top_k, config.sampling.top_p = 30, 0.9
    config.grpo.teacher_in_group = True
    own = tiny_student(config)
    assert (own.sampling.top_k, own.sampling.top_p, own.sampling.width) == (30, 0.9, 30)
    service = Scripted(lambda number: SPREAD[:3])
    service.size = 3
    fresh = own.fresh_lora(0)
    got = collect_rollouts(own, fresh, CountingStream(), jax.random.key(0), service, config, step_settings(config))
    kept = np.asarray(got.batch.kept)
    assert kept.shape == (4, 4, 72, 30) and (kept[:, 3] == NOTHING).all() and (kept[:, :3, 0] != NOTHING).any()
    assert abs(got.metrics["kl"]) < 1e-5, "the reference is renormalised over the same tokens"
    _, metrics = update(own, fresh, got.batch)
    assert abs(metrics["ratio_mean"] - 1) < 1e-5 and metrics["logprob_gap"] < 1e-5 and metrics["skipped"] == 0
    assert metrics["grad_norm"] > 1e-4


def test_neither_drafts_nor_waiting_change_what_is_kept(student, lora):
    own = truncating(student, top_k=8, top_p=0.9, max_new_tokens=48)
    plain = draw(own, lora, count=5)
    for arrays in (draw(truncating(own, drafts=3), lora, count=5), draw(own, lora, count=5, slots=2)):
        for name in ("tokens", "mask", "kept"):
            np.testing.assert_array_equal(arrays[name], plain[name])
        np.testing.assert_allclose(arrays["logprobs"], plain["logprobs"], atol=2e-5)


def test_greedy_takes_no_notice(student, lora):
    greedy = draw(truncating(student, temperature=0.0, top_k=8, max_new_tokens=48), lora)
    plain = draw(truncating(student, temperature=0.0, max_new_tokens=48), lora)
    assert "kept" not in greedy
    np.testing.assert_array_equal(greedy["logprobs"], plain["logprobs"])


@pytest.mark.parametrize(
    ("field", "changes", "message"),
    [
        ("top_k", {"top_k": -1}, "at least 0"),
        ("top_k", {"top_k": 1}, "at least 2: a token without an alternative has no gradient"),
        ("top_k", {"top_k": 50_000}, "at most 1024"),
        ("top_k", {"top_k": 2.0}, "must be int"),
        ("top_p", {"top_k": 20, "top_p": 0.0}, "above 0"),
        ("top_p", {"top_k": 20, "top_p": 1.5}, "at most 1"),
        ("top_p", {"top_p": 0.9}, "needs sampling.top_k, the most tokens it may keep"),
    ],
)
def test_nonsense_is_refused_by_name(field, changes, message):
    config = tiny_config()
    for name, value in changes.items():
        setattr(config.sampling, name, value)
    with pytest.raises(ConfigError, match=rf"config.sampling.{field} = .*{message}"):
        validate(config)


def test_stored_rollouts_know_no_filter():
    for setting in ("record", "method"):
        config = tiny_config()
        config.sampling.top_k = 20
        validate(config)
        if setting == "record":
            config.replay.record = True
        else:
            config.method = "replay"
        with pytest.raises(ConfigError, match=r"sampling\.top_k = 20: must be 0 with replay"):
            validate(config)
