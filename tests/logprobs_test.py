"""The chunked form against the full one, written out with a [N, V] log-softmax."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from srl_jax.logprobs import FORBIDDEN_LOGPROB, TokenLogprobs, token_logprobs

N, D, V, STATES = 53, 16, 101, 4
FORCED = 3  # the state that allows one token only
FORCED_TOKEN = 5


def automaton(seed=0):
    """A random table of allowed tokens; the last state forces one."""
    table = np.random.default_rng(seed).random((STATES, V)) < 0.3
    table[:, FORCED_TOKEN] = True
    table[FORCED] = np.arange(V) == FORCED_TOKEN
    return jnp.asarray(table)


def problem(seed=0, n=N, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    table = np.asarray(automaton(seed))
    states = rng.integers(0, STATES, n)
    targets = np.array([rng.choice(np.flatnonzero(table[s])) for s in states], np.int32)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    return {
        "hidden": draw(n, D),
        "head": draw(V, D),
        "targets": jnp.asarray(targets),
        "states": jnp.asarray(states),
        "reference_hidden": draw(n, D),
        "weights": draw(n).astype(jnp.float32),
    }


def full(hidden, x, table, temperature=1.0, softcap=None) -> TokenLogprobs:
    def distribution(h):
        logits = jnp.einsum("nd,vd->nv", h, x["head"], preferred_element_type=jnp.float32)
        if softcap is not None:
            logits = softcap * jnp.tanh(logits / softcap)
        if table is not None:
            # A finite stand-in for -inf, so that differentiating this oracle meets no inf - inf.
            logits = jnp.where(table[x["states"]], logits, -1e30)
        return jax.nn.log_softmax(logits / temperature)

    at = lambda logprobs: jnp.take_along_axis(logprobs, x["targets"][:, None], axis=1)[:, 0]
    p, q = distribution(hidden), distribution(x["reference_hidden"])
    expect = lambda values: jnp.sum(jnp.where(p > -1e20, jnp.exp(p) * values, 0.0), axis=1)
    return TokenLogprobs(at(p), -expect(p), at(q), expect(p - q))


def chunked(hidden, x, table, *, blocks=1, wanted=None, **kwargs) -> TokenLogprobs:
    """Of flat tokens, as `blocks` equal parts."""
    split = lambda a: a.reshape(blocks, -1, *a.shape[1:])
    if table is not None:
        kwargs |= {"allowed_from": lambda states: table[states], "constraint": split(x["states"])}
    if wanted is not None:
        kwargs["wanted"] = split(wanted)
    rows, reference = split(hidden), split(x["reference_hidden"])
    got = token_logprobs(rows, x["head"], split(x["targets"]), reference_hidden=reference, compute_kl=True, **kwargs)
    return jax.tree.map(jnp.ravel, got)


def assert_close(got, expected, **tolerance):
    for name, a, b in zip(TokenLogprobs._fields, got, expected, strict=True):
        np.testing.assert_allclose(a, b, err_msg=name, **tolerance)


VARIANTS = [
    {},
    {"temperature": 0.7},
    {"softcap": 5.0},
    {"temperature": 1.3, "softcap": 5.0},
]


@pytest.mark.parametrize(
    "masked, variant, chunk_size",
    [(True, variant, 20) for variant in VARIANTS] + [(True, {}, 8), (False, VARIANTS[3], 20), (False, {}, 1000)],
    ids=str,
)
def test_values_and_gradients_equal_the_full_form(masked, variant, chunk_size):
    x, table = problem(), automaton() if masked else None
    mine = partial(chunked, x=x, table=table, chunk_size=chunk_size, entropy_gradient=True, kl_gradient=True, **variant)
    oracle = partial(full, x=x, table=table, **variant)

    def values_and_gradients(form):
        values, pull = jax.vjp(form, x["hidden"])
        none = jax.tree.map(jnp.zeros_like, values)
        weigh = lambda field: pull(none._replace(**{field: x["weights"]}))[0]
        return values, {field: weigh(field) for field in ("logprobs", "entropy", "kl")}

    values, gradients = jax.jit(partial(values_and_gradients, mine))()
    expected_values, expected = jax.jit(partial(values_and_gradients, oracle))()
    assert_close(values, expected_values, rtol=1e-5, atol=1e-5)
    for field, gradient in gradients.items():
        scale = np.abs(expected[field]).max()
        np.testing.assert_allclose(gradient, expected[field], rtol=1e-3, atol=2e-5 * scale, err_msg=field)


@settings(max_examples=15)
@given(seed=st.integers(0, 2**31), chunk_size=st.sampled_from([8, 16, 40]), temperature=st.floats(0.3, 2.0))
def test_any_numbers(seed, chunk_size, temperature):
    x, table = problem(seed), automaton(seed)
    got = _jitted(x["hidden"], x, table, temperature, chunk_size)
    assert_close(got, full(x["hidden"], x, table, temperature), rtol=1e-4, atol=5e-5)


@partial(jax.jit, static_argnames="chunk_size")
def _jitted(hidden, x, table, temperature, chunk_size):
    return chunked(hidden, x, table, temperature=temperature, chunk_size=chunk_size)


def test_worked_by_hand():
    """Logits (0, ln 2, ln 5) with the third token forbidden: p = (1/3, 2/3), entropy .636514."""
    hidden, head, target = jnp.ones((1, 1, 1)), jnp.log(jnp.array([[1.0], [2.0], [5.0]])), jnp.array([[1]])
    mask = jnp.array([[[True, True, False]]])
    got = token_logprobs(hidden, head, target, allowed_from=lambda mask: mask, constraint=mask)
    np.testing.assert_allclose([got.logprobs[0, 0], got.entropy[0, 0]], [np.log(2 / 3), 0.636514], rtol=1e-6)
    assert got.ref_logprobs is None and got.kl is None
    # At temperature .5 the odds square: p = (1/5, 4/5).
    cold = token_logprobs(hidden, head[:2], target, temperature=0.5, compute_entropy=False)
    np.testing.assert_allclose(cold.logprobs, [[np.log(0.8)]], rtol=1e-6)
    assert cold.entropy is None


@pytest.mark.parametrize("dtype, variant", [(jnp.float32, {}), (jnp.float32, VARIANTS[3]), (jnp.bfloat16, {})], ids=str)
def test_a_forced_token_is_exactly_certain(dtype, variant):
    x, table = problem(dtype=dtype), automaton()
    x["states"], x["targets"] = jnp.full(N, FORCED), jnp.full(N, FORCED_TOKEN)
    total = lambda h: sum(
        jnp.sum(x["weights"] * value)
        for value in chunked(h, x, table, chunk_size=16, entropy_gradient=True, kl_gradient=True, **variant)
    )
    got, gradient = chunked(x["hidden"], x, table, chunk_size=16, **variant), jax.grad(total)(x["hidden"])
    for value in (*got, gradient):
        assert not np.any(np.asarray(value, np.float32))


def test_the_policy_minus_itself_is_exactly_zero():
    """B = 0: the adapted and the frozen model give the same hidden rows, hence K = 0 and ratio 1, no rounding."""
    x, table = problem(), automaton()
    x["reference_hidden"] = x["hidden"]
    got = jax.jit(partial(chunked, x=x, table=table, chunk_size=16))(x["hidden"])
    assert np.array_equal(got.logprobs, got.ref_logprobs) and not np.any(got.kl)


class TestHostile:
    def test_a_forbidden_target_is_finite_and_flat(self):
        x, table = problem(), automaton()
        x["states"], x["targets"] = jnp.full(N, FORCED), jnp.full(N, FORCED_TOKEN + 1)
        mine = lambda h: chunked(h, x, table, chunk_size=16)
        assert np.all(mine(x["hidden"]).logprobs == FORBIDDEN_LOGPROB)
        assert not np.any(jax.grad(lambda h: mine(h).logprobs.sum())(x["hidden"]))

    def test_a_row_that_allows_nothing_is_finite_and_flat(self):
        x, table = problem(), jnp.zeros((STATES, V), bool)
        mine = partial(chunked, x=x, table=table, chunk_size=16, entropy_gradient=True, kl_gradient=True)
        got = mine(x["hidden"])
        assert np.all(got.logprobs == FORBIDDEN_LOGPROB) and not np.any(got.entropy) and not np.any(got.kl)
        gradient = jax.grad(lambda h: sum(jnp.sum(value) for value in mine(h)))(x["hidden"])
        assert not np.any(gradient)

    def test_huge_logits(self):
        x, table = problem(), automaton()
        hidden = 1e6 * x["hidden"]
        value, gradient = jax.value_and_grad(lambda h: chunked(h, x, table, chunk_size=16).logprobs.sum())(hidden)
        assert np.isfinite(value) and np.all(np.isfinite(gradient))

    def test_a_broken_model_is_seen(self):
        x, table = problem(), automaton()
        got = chunked(x["hidden"].at[7].set(jnp.nan), x, table, chunk_size=16)
        for value in (got.logprobs, got.entropy, got.kl):
            assert np.isnan(value[7]) and np.isnan(value).sum() == 1

    def test_padding_rows_do_not_touch_the_others(self):
        x = problem()
        one = lambda h: chunked(h, x, automaton(), chunk_size=8).logprobs
        jacobian = jax.jacobian(one)(x["hidden"])  # [N, N, D]
        off_diagonal = jnp.where(jnp.eye(N, dtype=bool)[..., None], 0.0, jacobian)
        assert not np.any(off_diagonal)

    @pytest.mark.parametrize(
        "change, message",
        [
            ({"hidden": jnp.zeros((N, D + 1))}, "both end in D"),
            ({"constraint": jnp.zeros(N)}, "go together"),
            ({"compute_kl": True}, "reference_hidden"),
            ({"chunk_size": 0}, "chunk_size=0"),
        ],
    )
    def test_wrong_arguments(self, change, message):
        x = problem()
        arguments = {name: x[name] for name in ("hidden", "head", "targets")} | change
        with pytest.raises(ValueError, match=message):
            token_logprobs(**arguments)


def test_bfloat16_accumulates_in_fp32():
    x, table = problem(dtype=jnp.bfloat16), automaton()
    mine = partial(chunked, x=x, table=table, chunk_size=16)
    got = mine(x["hidden"])
    assert all(value.dtype == jnp.float32 for value in got)
    # The oracle's product is of the same bf16 operands with fp32 accumulation: only summation order differs.
    assert_close(got, full(x["hidden"], x, table), rtol=1e-4, atol=1e-4)
    gradient = jax.grad(lambda h: jnp.sum(x["weights"] * mine(h).logprobs))(x["hidden"])
    expected = jax.grad(lambda h: jnp.sum(x["weights"] * full(h, x, table).logprobs))(x["hidden"])
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(gradient, np.float32), np.asarray(expected, np.float32), rtol=0.02, atol=0.02)


def test_only_hidden_gets_a_gradient():
    x, table = problem(), automaton()

    def total(hidden, head, reference_hidden, temperature):
        y = x | {"head": head, "reference_hidden": reference_hidden}
        return sum(jnp.sum(v) for v in chunked(hidden, y, table, temperature=temperature, chunk_size=16))

    arguments = (x["hidden"], x["head"], x["reference_hidden"], 0.7)
    gradients = jax.grad(total, argnums=(0, 1, 2, 3))(*arguments)
    assert np.any(gradients[0]) and not any(np.any(g) for g in gradients[1:])


def test_diagnostics_have_no_gradient_unless_asked():
    x, table = problem(), automaton()
    for field in ("entropy", "kl", "ref_logprobs"):
        scalar = lambda h, field=field: chunked(h, x, table, chunk_size=16)._asdict()[field].sum()
        assert not np.any(jax.grad(scalar)(x["hidden"]))


@pytest.mark.parametrize("wrap", ["remat", "scan", "nested-jit"])
def test_inside_other_transformations(wrap):
    """The mask closes over a traced table, under every transformation a train step may put around it."""
    x, table = problem(n=48), automaton()

    def loss(hidden, table, x):
        return jnp.sum(x["weights"] * chunked(hidden, x, table, chunk_size=8).logprobs)

    def scanned(hidden, table, x):
        head = x["head"]
        rows = {name: value for name, value in x.items() if name != "head"}
        micro = jax.tree.map(lambda a: a.reshape(3, 16, *a.shape[1:]), (hidden, rows))
        body = lambda total, m: (total + loss(m[0], table, m[1] | {"head": head}), None)
        return jax.lax.scan(body, 0.0, micro)[0]

    wrapped = {"remat": jax.checkpoint(loss), "scan": scanned, "nested-jit": jax.jit(loss)}[wrap]
    got = jax.jit(jax.grad(wrapped))(x["hidden"], table, x)
    np.testing.assert_allclose(got, jax.grad(loss)(x["hidden"], table, x), rtol=1e-5, atol=1e-6)


def test_a_pytree_of_constraints_is_sliced_together():
    x, table = problem(), automaton()
    constraint = {"state": x["states"], "closed": jnp.arange(N) % 3 == 0}

    def allowed(rows):
        return table[rows["state"]] & (~rows["closed"][:, None] | (jnp.arange(V) == FORCED_TOKEN)[None, :])

    constraint, rows, targets = jax.tree.map(lambda a: a[None], (constraint, x["hidden"], x["targets"]))
    score = partial(token_logprobs, rows, x["head"], targets, allowed_from=allowed, constraint=constraint)
    got, whole = score(chunk_size=8), score(chunk_size=N)
    for a, b in zip(got[:2], whole[:2], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert not np.any(got.entropy[0, ::3])


@pytest.mark.parametrize("blocks, chunk_size", [(1, 8), (4, 8), (4, 2), (1, 1000)])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_only_what_is_wanted_is_computed_and_the_rest_is_zero(blocks, chunk_size, share):
    x, table = problem(n=52), automaton()
    wanted = jnp.asarray(np.random.default_rng(1).random(52) < share)
    # What is not wanted is not looked at either.
    hidden = jnp.where(wanted[:, None], x["hidden"], jnp.nan)
    asked = {"entropy_gradient": True, "kl_gradient": True}

    def weighed(form):
        def loss(hidden):
            values = form(hidden)
            return sum(jnp.where(wanted, x["weights"] * value, 0.0).sum() for value in values), values

        return jax.jit(jax.grad(loss, has_aux=True))

    mine = partial(chunked, x=x, table=table, blocks=blocks, wanted=wanted, chunk_size=chunk_size, **asked)
    gradient, got = weighed(mine)(hidden)
    expected_gradient, expected = weighed(partial(full, x=x, table=table))(x["hidden"])
    assert_close(got, [jnp.where(wanted, value, 0.0) for value in expected], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-3, atol=1e-5)
    assert not np.any(np.asarray(gradient)[~wanted])


def test_chunks_without_a_wanted_token_are_not_run():
    x = problem(n=64)
    seen = []

    def allowed(states):
        jax.debug.callback(lambda n: seen.append(int(n)), states.shape[0])
        return automaton()[states]

    wanted = jnp.arange(64) % 8 < 3  # 24 of 64
    score = partial(token_logprobs, x["hidden"][None], x["head"], x["targets"][None], allowed_from=allowed)
    jax.block_until_ready(score(constraint=x["states"][None], wanted=wanted[None], chunk_size=8))
    jax.effects_barrier()
    assert seen == [8, 8, 8]


def head_products(compiled) -> int:
    return len(re.findall(r"= \S+ dot\(", compiled.as_text()))


def test_two_head_products_when_differentiated_and_one_when_not():
    x, table = problem(), automaton()
    values = partial(chunked, x=x, table=table, chunk_size=8)
    lowered = jax.jit(lambda h: values(h)._replace(ref_logprobs=None, kl=None)).lower(x["hidden"])
    assert head_products(lowered.compile()) == 1
    gradient = jax.jit(jax.value_and_grad(lambda h: values(h).logprobs.sum())).lower(x["hidden"])
    assert head_products(gradient.compile()) == 2


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("weights", [(1.0, 0.0, 0.0), (1.0, 0.1, 0.1)], ids=["log-probs", "entropy and exact KL too"])
def test_temporaries_stay_under_a_tenth_of_the_full_form(weights, dtype):
    """Compiled for a real size and not run: T 8192, D 896, V 151,936 (Qwen2), under a grammar's mask."""
    n, d, v = 8192, 896, 151_936
    shape = jax.ShapeDtypeStruct
    hidden, ids = shape((n, d), dtype), shape((n,), jnp.int32)
    x = {"head": shape((v, d), dtype), "targets": ids, "states": ids, "reference_hidden": hidden}
    asked = {"entropy_gradient": weights[1] > 0, "kl_gradient": weights[2] > 0}

    def temporaries(form):
        def loss(hidden, x, table):
            got = form(hidden, x, table)
            terms = zip(weights, (got.logprobs, got.entropy, got.kl), strict=True)
            # All of them are computed, whatever is differentiated.
            return sum(weight * term.sum() for weight, term in terms if weight), got

        table = shape((STATES, v), jnp.bool_)
        compiled = jax.jit(jax.grad(loss, has_aux=True)).lower(hidden, x, table).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(partial(chunked, **asked)) < 0.1 * temporaries(full)


@pytest.mark.parametrize(
    "mesh_shape, rows, head",
    [
        ((8, 1, 1), PartitionSpec("data"), PartitionSpec()),
        ((2, 2, 2), PartitionSpec(("data", "fsdp")), PartitionSpec("tensor", "fsdp")),
    ],
    ids=["data", "data-fsdp-tensor"],
)
def test_eight_devices_are_one(mesh_shape, rows, head):
    mesh = jax.make_mesh(mesh_shape, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    x, table = problem(n=128), automaton()
    head_rows = jnp.pad(x["head"], ((0, 3), (0, 0)))  # 104 divides by the tensor axis
    x, table = x | {"head": head_rows}, jnp.pad(table, ((0, 0), (0, 3)))
    where = {name: NamedSharding(mesh, rows) for name in x} | {"head": NamedSharding(mesh, head)}
    spread = {name: jax.device_put(np.asarray(value), where[name]) for name, value in x.items()}

    @jax.jit
    def step(x, table):
        def loss(hidden):
            got = chunked(hidden, x, table, blocks=8, chunk_size=32)
            return jnp.sum(x["weights"] * got.logprobs), got

        return jax.grad(loss, has_aux=True)(x["hidden"])

    one, eight = step(x, table), jax.block_until_ready(step(spread, table))
    for a, b in zip(jax.tree.leaves(eight), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert eight[0].sharding.is_equivalent_to(where["hidden"], 2)


def test_chunks_do_not_gather_sharded_tokens():
    """Each device works on its own tokens of every chunk: no collective at all when only N is split."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows, everywhere = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    x, table = problem(n=128), automaton()
    wanted = jnp.arange(128) % 3 > 0
    loss = lambda hidden, head, table: jnp.vdot(
        x["weights"], chunked(hidden, x | {"head": head}, table, blocks=8, wanted=wanted, chunk_size=32).logprobs
    )
    compiled = (
        jax.jit(jax.grad(loss), in_shardings=(rows, everywhere, everywhere), out_shardings=rows)
        .lower(x["hidden"], x["head"], table)
        .compile()
    )
    assert not re.findall(r"all-gather|all-to-all|collective-permute", compiled.as_text())
