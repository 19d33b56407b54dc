"""Samples follow the masked distribution, rows keep to themselves, and the trainer agrees with the sampler."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from srl_jax import grammar, sampling, sharding
from srl_jax.model import hf, shapes
from srl_jax.model.decoder import Decoder, completion_hidden
from srl_jax.rollout import decode_completions, make_batch
from srl_jax.sampling import draw, look_up, sample
from srl_jax.student import pad_prompts
from srl_jax.trace import parse_trace
from srl_jax.train_step import policy_logprobs
from tests.fakes import perturbed, tiny_config, tiny_student
from tests.tiny_tokenizer import tiny_tokenizer


def _prompts(count, width=24, seed=0):
    rng = np.random.default_rng(seed)
    rows = [rng.integers(0, 49152, width - 5 * (i % 3)).tolist() for i in range(count)]
    return pad_prompts(rows, width, 0)


def _sample(student, lora, prompts, key=0, group_size=4, slots=0, **changes):
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
        slots=slots,
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


def test_draw_takes_no_zero_where_running_sums_round_upwards():
    # Sums over many blocks are made in parallel, and grow by a rounding where nothing is added.
    rng = np.random.default_rng(0)
    weights = (rng.random((32, 1187)) * (rng.random((32, 1187)) < 0.3)).astype(np.float32)
    sums = np.asarray(jax.jit(functools.partial(jnp.cumsum, axis=-1))(weights))
    rows, fractions = [], []
    for row, place in np.argwhere((np.diff(sums) > 0) & (weights[:, 1:] == 0)):
        near = np.float32(sums[row, place] / sums[row, -1])
        for fraction in (near, np.nextafter(near, np.float32(0)), np.nextafter(near, np.float32(1))):
            if fraction * sums[row, -1] == sums[row, place] and rows.count(row) < 4:
                rows.append(row)
                fractions.append(fraction)
    assert len(rows) > 32
    probs = np.zeros((len(rows), 1187, 128), np.float32)  # a token a block
    probs[:, :, 0] = weights[rows]
    probs = probs.reshape(len(rows), -1)
    drawn = np.asarray(draw(jnp.asarray(probs), jnp.stack([jnp.asarray(fractions), jnp.zeros(len(rows))], axis=-1)))
    assert (probs[np.arange(len(rows)), drawn] > 0).all()


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


def test_whole_rollouts_follow_the_masked_distribution():
    """Chi-square on a vocabulary of hundreds, under the grammar: of one token, and of all that are not forced.

    A token drawn from p lies at a uniform place of p's cumulative sum, whatever came before it.
    """
    tokenizer = tiny_tokenizer()
    decoder = Decoder(shapes.tiny(tokenizer.vocab_size), lora_rank=4, lora_alpha=8.0)
    params = hf.random_params(decoder.config, seed=1)
    params["embedding"] = params["embedding"] * 4  # some tokens much likelier than others
    automaton = grammar.compile_grammar(tokenizer, vocab_size=tokenizer.vocab_size)
    budget = grammar.shortest_trace(automaton) + 12
    settings, rows = sampling.SamplingConfig(budget, budget - 1, temperature=0.8), 1024
    prompt, length = jnp.asarray([[5, 9, 17, 30]]), jnp.asarray([4])
    drawn = sample(
        decoder, {"params": params}, automaton, prompt, length, jax.random.key(2),
        group_size=rows, settings=settings, pad_id=tokenizer.pad_id,
    )  # fmt: skip
    tokens, mask = np.asarray(drawn.tokens[0]), np.asarray(drawn.mask[0])
    states = grammar.replay(automaton, drawn.tokens[0], budget, settings.max_think_tokens)
    hidden = completion_hidden(decoder, {"params": params}, prompt, length, drawn.tokens)[0]
    scores = np.asarray(jnp.einsum("gtd,vd->gtv", hidden, params["embedding"]), np.float64) / 0.8
    scores = np.where(np.asarray(grammar.allowed_tokens(automaton, states)), scores, -np.inf)
    probs = np.exp(scores - scores.max(-1, keepdims=True))
    probs /= probs.sum(-1, keepdims=True)
    own = np.take_along_axis(probs, tokens[..., None], -1)[..., 0]
    assert (own[mask] > 0).all()

    first = probs[0, 1]  # after <think>, which is forced: the same for every row
    counts, expected = np.bincount(tokens[:, 1], minlength=len(first)), rows * first
    rare = expected < 5
    counts = [*counts[~rare], counts[rare].sum()]
    assert scipy.stats.chisquare(counts, [*expected[~rare], expected[rare].sum()]).pvalue > 1e-3

    free = mask & (own < 1 - 1e-6)
    before = np.take_along_axis(probs.cumsum(-1), tokens[..., None], -1)[..., 0] - own
    places = (before + np.random.default_rng(0).random(own.shape) * own)[free]
    assert len(places) > 10_000
    assert scipy.stats.chisquare(np.histogram(places, bins=20, range=(0, 1))[0]).pvalue > 1e-3


def test_sampler_and_trainer_agree_in_bfloat16():
    student = tiny_student(tiny_config(dtype="bfloat16"))
    lora = perturbed(student.fresh_lora(0))
    prompts = _prompts(4)
    drawn = _sample(student, lora, prompts)
    arrays = {"prompt_tokens": prompts[0], "prompt_lengths": prompts[1]}
    arrays |= {name: np.asarray(getattr(drawn, name)) for name in ("tokens", "mask", "logprobs")}
    batch, variables = make_batch(student, arrays, np.zeros((4, 4))), {"params": student.params, "lora": lora}
    scored = policy_logprobs(student.decoder, variables, student.automaton, batch, temperature=1.0, chunk=64)
    gap = np.abs(np.asarray(scored.logprobs) - arrays["logprobs"])[arrays["mask"]]
    assert gap.mean() <= 1e-2


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


def _ending_often(student, one_in):
    """Free sampling that ends at every token whose id divides by `one_in`: rows of very different lengths."""
    free = grammar.free_automaton(student.tokenizer)
    ids = np.arange(free.kind_of_token.shape[0])
    end = free.kind_of_token[student.tokenizer.eos_id]
    return dataclasses.replace(free, kind_of_token=jnp.where(ids % one_in == 0, end, free.kind_of_token))


@pytest.mark.parametrize(
    ("prompts", "group_size", "slots", "refills", "compactions"),
    [(5, 4, 0, 0, 1), (7, 3, 3, 1, 0), (12, 1, 0, 0, 1), (9, 2, 8, 1, 1), (6, 4, 5, 1, 1)],
)
def test_neither_waiting_nor_compaction_changes_a_token(
    student, lora, monkeypatch, prompts, group_size, slots, refills, compactions
):
    seen = {"_refill": 0, "compact": 0}
    for name in seen:

        def counted(name, own, *args, **kwargs):
            seen[name] += 1
            return own(*args, **kwargs)

        monkeypatch.setattr(sampling, name, functools.partial(counted, name, getattr(sampling, name)))
    automaton = _ending_often(student, 12)
    given = {"automaton": automaton, "max_new_tokens": 24, "group_size": group_size}
    drawn = _sample(student, lora, _prompts(prompts), key=3, slots=slots, **given)
    assert seen["_refill"] >= refills and seen["compact"] >= compactions
    lengths = np.asarray(drawn.mask).sum(-1)
    assert lengths.min() < 6 and lengths.max() > 12
    before = dict(seen)
    monkeypatch.setattr(sampling, "LEAST_ROWS", 1000)
    plain = _sample(student, lora, _prompts(prompts), key=3, **given)
    assert seen == before
    np.testing.assert_array_equal(drawn.tokens, plain.tokens)
    np.testing.assert_array_equal(drawn.mask, plain.mask)
    np.testing.assert_array_equal(drawn.finished, plain.finished)
    np.testing.assert_allclose(drawn.logprobs, plain.logprobs, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(drawn.logprobs)[~np.asarray(drawn.mask)], 0)


@given(st.integers(1, 9), st.integers(1, 9), st.booleans(), st.randoms(use_true_random=False))
def test_a_smaller_batch_holds_every_living_row_once_beside_its_own_prompt(p, g, divide_slots, random):
    alive = np.asarray([[random.random() < 0.3 for _ in range(g)] for _ in range(p)])
    alive[random.randrange(p), random.randrange(g)] = False
    slots, rows = sampling.smaller(alive, divide_slots=divide_slots)
    taken = alive.reshape(-1)[rows]
    assert sorted(rows[taken]) == np.flatnonzero(alive).tolist()
    for slot, members in zip(slots, rows, strict=True):
        assert all(row // g == slot for row in members if alive.reshape(-1)[row])
    assert divide_slots or len(slots) == p
    counts = alive.sum(axis=1)
    if p * g > sampling.LEAST_ROWS and g > 1 and (-(-counts // (g // 2))).sum() <= p:
        assert rows.size <= p * g / 2, "this is where `decode` comes back for it"


def test_nine_of_64_rows_in_five_slots_need_a_quarter_of_the_batch():
    alive = np.zeros((8, 8), bool)
    alive[0, :5] = alive[[2, 3, 5, 7], 1] = True
    slots, rows = sampling.smaller(alive, divide_slots=False)
    assert rows.shape == (8, 2) and slots.tolist() == [0, 0, 0, 2, 3, 5, 7, 0]


@pytest.mark.parametrize(("prompts", "slots"), [(8, 0), (24, 8)])
def test_eight_devices_keep_their_shares_of_the_slots_and_draw_what_one_draws(
    student, lora, monkeypatch, prompts, slots
):
    config = tiny_config()
    config.grpo.micro_batch = 8
    wide = tiny_student(config, devices=8)
    held, changed = [], []

    def noting(own, seen, *args, **kwargs):
        flight = own(*args, **kwargs)
        seen.append(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), flight))
        return flight

    given = {"automaton": _ending_often(student, 12), "max_new_tokens": 24, "group_size": 4}
    one = _sample(student, lora, _prompts(prompts), key=3, slots=slots, **given)
    for name, seen in (("prefill", held), ("_refill" if slots else "compact", changed)):
        monkeypatch.setattr(sampling, name, functools.partial(noting, getattr(sampling, name), seen))
    placed = jax.device_put(_prompts(prompts), sharding.batch_sharding(wide.mesh))
    given["automaton"] = jax.device_put(given["automaton"], sharding.replicated(wide.mesh))
    own = wide.place_lora(jax.tree.map(np.asarray, lora))
    decode, layouts = sampling.decode, []

    def share(x, axis):
        return x.shape[axis] // x.sharding.shard_shape(x.shape)[axis]

    def decoding(*args, **kwargs):
        after = decode(*args, **kwargs)
        for flight in (args[3], after):
            layouts.append([share(x, 1) for x in jax.tree.leaves((flight.cache, flight.prefix[:2]))])
            layouts.append([share(x, 0) for x in (flight.tokens, flight.age, flight.prefix.mask, flight.prompts)])
        return after

    monkeypatch.setattr(sampling, "decode", decoding)
    eight = _sample(wide, own, placed, key=3, slots=slots, **given)
    np.testing.assert_array_equal(one.tokens, eight.tokens)
    np.testing.assert_array_equal(one.mask, eight.mask)
    assert len(held) == 1 + (len(changed) if slots else 0) and changed
    for flight in changed:
        layouts.append([share(x, 1) for x in jax.tree.leaves((flight.cache, flight.prefix[:2]))])
    assert all(share == 8 for layout in layouts for share in layout), layouts


def test_windows_are_kept_when_a_slot_changes_hands(lora):
    config = tiny_config()
    student = tiny_student(config)
    windowed = student.decoder.clone(config=dataclasses.replace(student.decoder.config, windows=(4, 0)))
    student = dataclasses.replace(student, decoder=windowed)
    given = {"automaton": _ending_often(student, 12), "max_new_tokens": 16, "group_size": 2}
    drawn = _sample(student, lora, _prompts(6), key=1, slots=2, **given)
    plain = _sample(student, lora, _prompts(6), key=1, **given)
    np.testing.assert_array_equal(drawn.tokens, plain.tokens)


def test_the_same_shapes_are_compiled_once(student, lora):
    given = {"automaton": _ending_often(student, 12), "max_new_tokens": 24, "group_size": 3, "slots": 3}
    _sample(student, lora, _prompts(8), key=0, **given)
    before = sampling.decode._cache_size(), sampling.prefill._cache_size(), sampling._refill._cache_size()
    for key in range(1, 5):
        _sample(student, lora, _prompts(8, seed=key), key=key, **given)
    after = sampling.decode._cache_size(), sampling.prefill._cache_size(), sampling._refill._cache_size()
    assert after[1:] == before[1:] and after[0] <= before[0] + 2  # smaller batches may come up for the first time


def test_look_up_copies_what_followed_the_nearest_same_pair():
    context = jnp.asarray([[5, 6, 7, 8, 5, 6, 9, 1, 5, 6, 0, 0], [1, 2, 3, 1, 2, 0, 0, 0, 0, 0, 0, 0]])
    known = jnp.asarray([[True] * 10 + [False] * 2, [True] * 5 + [False] * 7])
    drafts = look_up(context, known, jnp.asarray([[5, 6], [1, 2]]), 3)
    assert drafts.tolist() == [[9, 1, 5], [3, 1, 2]]
    assert look_up(context, known, jnp.asarray([[8, 5], [2, 1]]), 2).tolist() == [[6, 9], [-1, -1]]
    assert look_up(context, known, jnp.asarray([[1, 5], [1, 2]]), 5).tolist() == [
        [6, -1, -1, -1, -1],
        [3, 1, 2, -1, -1],
    ]


@pytest.mark.parametrize("drafts", [1, 4])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_speculation_changes_no_token(student, lora, drafts, temperature):
    # A vocabulary of few likely tokens repeats itself, so that guesses come true often.
    prompts = _prompts(3)
    given = {"temperature": temperature, "max_new_tokens": 64, "max_think_tokens": 8, "group_size": 3}
    plain = _sample(student, lora, prompts, key=4, **given)
    drafted = _sample(student, lora, prompts, key=4, drafts=drafts, **given)
    np.testing.assert_array_equal(drafted.tokens, plain.tokens)
    np.testing.assert_array_equal(drafted.mask, plain.mask)
    np.testing.assert_allclose(drafted.logprobs, plain.logprobs, atol=2e-5)


@pytest.mark.parametrize("constrained, top_k", [(True, 0), (True, 3), (False, 0)])
def test_reading_forced_tokens_at_once_changes_no_token_and_takes_fewer_steps(
    student, lora, constrained, top_k, monkeypatch
):
    steps = []

    def counted(*arguments):
        jax.debug.callback(lambda: steps.append(1))
        return logits(*arguments)

    logits = sampling.logits
    monkeypatch.setattr(sampling, "logits", counted)
    prompts, shortest = _prompts(3), grammar.shortest_trace(student.automaton)
    given = {"key": 7, "max_new_tokens": shortest + 7, "group_size": 4, "top_k": top_k}
    if not constrained:
        given["automaton"] = student.without_grammar().automaton

    def run():
        jax.clear_caches()
        steps.clear()
        drawn = jax.block_until_ready(_sample(student, lora, prompts, **given))
        jax.effects_barrier()
        return drawn, len(steps)

    leaping, few = run()
    monkeypatch.setattr(grammar, "only_token", lambda automaton, state: jnp.full_like(state.state, -1))
    plain, many = run()
    assert few < 0.6 * many if constrained else few == many
    assert many >= shortest + 7 if constrained else many > 0
    for name in ("tokens", "mask", "finished", *(["kept"] if top_k else [])):
        np.testing.assert_array_equal(getattr(leaping, name), getattr(plain, name), err_msg=name)
    np.testing.assert_allclose(leaping.logprobs, plain.logprobs, atol=2e-5)
    if constrained:
        assert (np.asarray(leaping.logprobs)[np.asarray(leaping.mask)] == 0).mean() > 0.3
