"""Every option of a rollout's batch and of its update on the tiny model: each does what its formula says."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srl_jax import grpo
from srl_jax.groups import COMPONENTS, block_of_tokens
from srl_jax.rewards import Reward
from srl_jax.rollout import collect_rollouts
from srl_jax.sandbox.service import Score
from srl_jax.steps import step_settings
from srl_jax.teacher_rows import with_teachers
from srl_jax.train_step import StepSettings, TrainState, make_optimizer, mini_batches, policy_logprobs, train_step
from srl_jax.value import fresh_value, guess, learn, prompt_features
from tests.fakes import CountingStream, perturbed, teacher_record, tiny_config
from tests.rollout_test import SPREAD, UNSCORED, Scripted
from tests.tiny_tokenizer import tiny_tokenizer


def rollout(student, lora, scores=lambda number: SPREAD, value=None, **changes):
    config = tiny_config()
    config.grpo.kl_coef = 0.3
    for name, value_of in changes.items():
        setattr(config.grpo, name, value_of)
    service = Scripted(scores)
    service.size = config.grpo.group_size - config.grpo.teacher_in_group
    return config, collect_rollouts(
        student, lora, CountingStream(), jax.random.key(0), service, config, step_settings(config), value=value
    )


@pytest.fixture(scope="module")
def plain(student, lora):
    return rollout(student, lora)[1]


def update(student, lora, batch, kl_coef=0.0, **changes):
    optimizer, _ = make_optimizer(1e-2, steps=10, schedule="constant")
    placed = student.place_lora(jax.tree.map(np.asarray, lora))
    state = TrainState(jnp.int32(0), placed, optimizer.init(placed), jax.random.key_data(jax.random.key(0)))
    new, metrics = train_step(
        state, student.params, student.automaton, batch, jnp.float32(kl_coef),
        decoder=student.decoder, optimizer=optimizer, settings=StepSettings(**{"micro_batch": 2, **changes}),
    )  # fmt: skip
    return jax.tree.map(np.asarray, new), {name: float(value) for name, value in metrics.items()}


def rows(x):
    return np.asarray(x).reshape(-1, np.asarray(x).shape[-1])


def scored(student, lora, batch, **options):
    variables = {"params": student.params, "lora": lora}
    return policy_logprobs(student.decoder, variables, student.automaton, batch, temperature=1.0, chunk=256, **options)


@pytest.fixture(scope="module")
def moved(lora):
    """Another policy than the one that sampled, so that ratios, clips and levels show."""
    return perturbed(lora, scale=0.3, seed=4)


@pytest.mark.parametrize(
    "options",
    [
        {"ratio": "sequence", "aggregation": "sequence", "kl_in_loss": "k1"},
        {"negative_ratio_cap": 1.5, "kl_in_loss": "k2", "entropy_coef": 0.1},
        {"kl_in_loss": "exact", "entropy_coef": 0.1},
    ],
    ids=["gspo k1", "dual clip k2 entropy", "exact entropy"],
)
def test_the_loss_is_the_sum_of_its_terms(student, moved, plain, options):
    batch = plain.batch._replace(ref_logprobs=jnp.asarray(plain.used.arrays["ref"]))
    now = scored(student, moved, batch, with_reference=True)
    mask, advantages = rows(batch.completion_mask), np.asarray(batch.advantages).reshape(-1)
    logprobs, old, ref = rows(now.logprobs), rows(batch.old_logprobs), rows(batch.ref_logprobs)
    agg = {"aggregation": options.get("aggregation", "token")}
    wanted = grpo.clipped_surrogate(
        logprobs, old, advantages, mask, clip_epsilon_low=0.2, clip_epsilon_high=0.2, **agg,
        level=options.get("ratio", "token"), negative_ratio_cap=options.get("negative_ratio_cap"),
    )  # fmt: skip
    if options["kl_in_loss"] == "exact":
        divergence = grpo.aggregate(rows(now.kl), mask, **agg)
    else:
        divergence = grpo.kl_loss(logprobs, old, ref, mask, estimator=options["kl_in_loss"], **agg)
    bonus = options.get("entropy_coef", 0.0) * grpo.aggregate(rows(now.entropy), mask, **agg)
    _, got = update(student, moved, batch, kl_coef=0.7, **options)
    assert got["kl_loss"] == pytest.approx(float(divergence), abs=2e-5) and abs(got["kl_loss"]) > 1e-3
    assert got["loss"] == pytest.approx(float(wanted + 0.7 * divergence - bonus), abs=5e-5)


def test_a_kl_in_the_loss_pulls_the_policy_to_its_base_and_entropy_spreads_it(student, moved, plain):
    batch = plain.batch._replace(advantages=jnp.zeros_like(plain.batch.advantages))
    means = lambda adapters: [
        float(np.asarray(x)[plain.used.arrays["mask"]].mean())
        for x in (lambda s: (s.kl, s.entropy))(scored(student, adapters, batch, with_reference=True))
    ]
    kl, entropy = means(moved)
    options = {"kl_in_loss": "exact", "entropy_coef": 0.1}  # the program of the test above
    near, _ = update(student, moved, batch, kl_coef=30.0, **options)
    assert means(near.lora)[0] < kl - 1e-3
    spread, _ = update(student, moved, batch, kl_coef=0.0, **options)
    assert means(spread.lora)[1] > entropy + 1e-4


def test_mini_batches_share_out_every_group_once(student, plain):
    parts = mini_batches(plain.batch, 2)
    assert [part.completions.shape[0] for part in parts] == [2, 2]
    together = np.concatenate([np.asarray(part.prompt_tokens) for part in parts])
    assert sorted(map(tuple, together)) == sorted(map(tuple, np.asarray(plain.batch.prompt_tokens)))


def test_an_update_without_a_token_leaves_momentum_alone(student, lora, plain):
    optimizer, _ = make_optimizer(1e-2, steps=10, schedule="constant")
    run = lambda state, batch: train_step(
        state, student.params, student.automaton, batch,
        decoder=student.decoder, optimizer=optimizer, settings=StepSettings(micro_batch=2),
    )  # fmt: skip
    placed = student.place_lora(jax.tree.map(np.asarray, lora))
    state = TrainState(jnp.int32(0), placed, optimizer.init(placed), jax.random.key_data(jax.random.key(0)))
    state, _ = run(state, plain.batch)
    before = jax.tree.map(np.array, (state.lora, state.opt_state))
    empty = plain.batch._replace(completion_mask=jnp.zeros_like(plain.batch.completion_mask))
    state, metrics = run(state, empty)
    assert float(metrics["skipped"]) == 0.0 and int(state.step) == 2
    jax.tree.map(np.testing.assert_array_equal, before, (state.lora, state.opt_state))


def test_truncated_weights_correct_for_a_sampler_that_differs(student, lora, plain):
    _, capped = rollout(student, lora, importance_cap=2.0)
    np.testing.assert_allclose(capped.batch.token_weights, 1.0, atol=1e-4)  # this sampler does not differ
    np.testing.assert_allclose(
        np.where(plain.used.arrays["mask"], capped.batch.old_logprobs, 0),
        np.where(plain.used.arrays["mask"], plain.batch.old_logprobs, 0), atol=1e-4,
    )  # fmt: skip
    halved = plain.batch._replace(token_weights=jnp.full(plain.batch.old_logprobs.shape, 0.5))
    assert update(student, lora, halved)[1]["grad_norm"] == pytest.approx(
        0.5 * update(student, lora, plain.batch)[1]["grad_norm"], rel=1e-4
    )


def test_the_exact_kl_in_the_reward_is_the_full_distribution_s(student, lora, plain):
    _, exact = rollout(student, lora, kl_estimator="exact")
    mask = plain.used.arrays["mask"]
    kl = np.asarray(scored(student, lora, plain.batch, with_reference=True).kl)
    k = np.where(mask, kl, 0).sum(-1) / mask.sum(-1)
    assert (kl[mask] > -1e-5).all()
    spread = np.asarray([0.4, 0.0, -0.4, 0.0])
    np.testing.assert_allclose(exact.batch.advantages, spread - 0.3 * (k - k.mean(axis=1, keepdims=True)), atol=1e-4)
    _, in_loss = rollout(student, lora, kl_placement="loss", kl_estimator="k3")
    np.testing.assert_allclose(in_loss.batch.advantages, np.tile(spread, (4, 1)), atol=1e-6)
    np.testing.assert_array_equal(in_loss.batch.ref_logprobs, plain.used.arrays["ref"])


PARTS = [Score(Reward(0.5 * a + 0.3 * s + 0.2 * t, a, s, t, 0.0)) for a, s, t in
         ((1.0, 0.5, 0.1), (0.0, 0.5, 0.2), (0.5, 0.5, 0.3), (0.5, 0.5, 0.6))]  # fmt: skip


def test_each_block_is_credited_with_its_own_component(student, lora):
    _, got = rollout(student, lora, lambda number: PARTS, credit="blocks", kl_placement="loss")
    advantages, mask = np.asarray(got.batch.advantages), got.used.arrays["mask"]
    assert advantages.shape == mask.shape
    tags = student.tokenizer.tag_ids
    for p, g in itertools.product(range(4), range(4)):
        ids, row = got.used.arrays["tokens"][p, g][mask[p, g]].tolist(), advantages[p, g][mask[p, g]]
        think_end, action_end = ids.index(tags[1]) + 1, ids.index(tags[3]) + 1
        np.testing.assert_allclose(row[:think_end], 0.2 * (PARTS[g].reward.think - 0.3), atol=1e-6)
        np.testing.assert_allclose(row[think_end:action_end], 0.5 * (PARTS[g].reward.action - 0.5), atol=1e-6)
        np.testing.assert_allclose(row[action_end:], 0.0, atol=1e-6)  # every state is as good as the others
    _, metrics = update(student, lora, got.batch)
    assert metrics["grad_norm"] > 0 and metrics["skipped"] == 0
    _, whole = rollout(student, lora, lambda number: PARTS, scale="components", kl_placement="loss")
    each = [np.asarray([getattr(score.reward, name) for score in PARTS]) for name in COMPONENTS]
    wanted = sum(w * (x - x.mean()) / (x.std() or 1) for w, x in zip((0.2, 0.5, 0.3), each, strict=True))
    np.testing.assert_allclose(whole.batch.advantages, np.tile(wanted, (4, 1)), atol=1e-5)


@pytest.mark.parametrize("atomic", [True, False])
def test_blocks_are_found_by_bytes_with_tags_of_either_kind(atomic):
    tokenizer, trace = tiny_tokenizer(atomic_tags=atomic), teacher_record(1).trace
    ids = tokenizer.encode_trace(trace)
    tokens = np.asarray([[*ids, *[tokenizer.pad_id] * 3], [*ids[:5], *[tokenizer.pad_id] * (len(ids) - 2)]])
    mask = np.arange(tokens.shape[1]) < np.asarray([[len(ids)], [5]])
    blocks = block_of_tokens(tokenizer, tokens, mask)
    assert not blocks[~mask].any() and not blocks[1].any()
    texts = [tokenizer.decode([i for i, b in zip(ids, blocks[0], strict=False) if b == n]) for n in range(3)]
    assert "".join(texts) == trace
    ends = [trace.index(tag) + len(tag) for tag in ("</think>", "</action>")]
    # A token that holds the end of one block and the start of the next belongs to where it begins.
    assert 0 <= len(texts[0].encode()) - ends[0] < 12 and 0 <= len((texts[0] + texts[1]).encode()) - ends[1] < 12


def test_the_value_head_learns_the_prompts_rewards_and_is_the_baseline(student, lora):
    value = fresh_value(student.decoder.config.d_model)
    value["bias"] = jnp.float32(0.25)
    _, got = rollout(student, lora, value=value, baseline="value", kl_coef=0.0)
    np.testing.assert_allclose(got.batch.advantages, np.tile(np.asarray(SPREAD) - 0.25, (4, 1)), atol=1e-6)
    features = prompt_features(student.decoder, student.params, got.batch.prompt_tokens, got.batch.prompt_lengths)
    np.testing.assert_array_equal(features, got.features)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1.0, atol=1e-5)
    rewards = np.asarray([[0.9, 0.7], [0.1, 0.3], [0.5, np.nan], [0.0, 0.0]], np.float32)
    valid = np.isfinite(rewards) & np.asarray([[True], [True], [True], [False]])
    value = fresh_value(student.decoder.config.d_model)
    for _ in range(3000):
        value = learn(value, features, np.nan_to_num(rewards), valid, 0.5)
    np.testing.assert_allclose(guess(value, features)[:3], [0.8, 0.2, 0.5], atol=0.05)


def test_a_teacher_is_a_member_that_is_imitated(student, lora):
    # A budget that holds the teacher's trace, which takes more tokens than the random student's.
    config = tiny_config()
    config.sampling.max_new_tokens, config.sampling.max_think_tokens = 160, 24
    roomy = dataclasses.replace(
        student, sampling=dataclasses.replace(student.sampling, max_new_tokens=160, max_think_tokens=24)
    )
    config.grpo.teacher_in_group, config.grpo.kl_coef = True, 0.3
    config.reward.match_gate = 0.5  # which the teacher passes: it matches what it matches
    service = Scripted(lambda number: (0.1, 0.1, 0.1) if number else (0.1, UNSCORED, 0.3))
    service.size = 3
    got = collect_rollouts(roomy, lora, CountingStream(), jax.random.key(0), service, config, step_settings(config))
    batch = got.batch
    assert batch.completions.shape[:2] == (4, 4) and got.drawn.valid.shape == (4, 3)
    assert np.asarray(batch.imitated).tolist() == [[False, False, False, True]] * 4
    for p in range(4):
        ids = np.asarray(batch.completions[p, 3])[np.asarray(batch.completion_mask[p, 3])]
        assert roomy.tokenizer.decode_trace(ids.tolist()) == got.used.records[p].trace
    assert got.metrics["kept_groups"] == 1.0, "equal students and a better teacher do teach"
    # (.1, .1, .1, 1): the teacher's .675, and no share in the others' KL.
    np.testing.assert_allclose(np.asarray(batch.advantages)[1:, 3], 0.675, atol=1e-5)
    _, metrics = update(roomy, lora, batch, imitation_gamma=0.1)
    assert metrics["skipped"] == 0
    assert metrics["logprob_gap"] < 1e-4, "the teacher's row has no ratio"
    _, apart = update(roomy, lora, batch._replace(old_logprobs=batch.old_logprobs - 0.09), imitation_gamma=0.1)
    assert apart["logprob_gap"] == pytest.approx(0.09, abs=1e-4), "nor does it make the others' gap look smaller"
    assert apart["ratio_mean"] == pytest.approx(np.exp(0.09), abs=1e-3)
    # The teacher's row by itself: what is maximised, the mean of p / (p + gamma), and the mean p rise with it.
    own = np.asarray(batch.imitated)[..., None] & np.asarray(batch.completion_mask)
    new, _ = update(roomy, lora, batch._replace(completion_mask=jnp.asarray(own)), imitation_gamma=0.1)
    before, after = (np.exp(scored(roomy, adapters, batch).logprobs)[own] for adapters in (lora, new.lora))
    assert (after / (after + 0.1)).mean() > (before / (before + 0.1)).mean() and after.mean() > before.mean()


def test_a_teacher_that_cannot_be_sampled_takes_no_part(student, lora):
    _, got = rollout(student, lora, lambda number: SPREAD[:3], teacher_in_group=True)
    members = with_teachers(student, got.drawn, tiny_config())
    assert not members.valid[:, 3].any() and "cannot be sampled" in members.scores[0][3].unscored
    assert not np.asarray(got.batch.completion_mask)[:, 3].any()
    np.testing.assert_allclose(np.asarray(got.batch.advantages)[:, 3], 0.0)
