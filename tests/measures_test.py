"""Measures: pass@k by hand and by enumeration, samples with and without a verdict, kinds of tasks."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srl_jax.measures import KINDS, MEASURES, kinds_of, pass_at_k, values_of
from tests.report_test import MALFORMED, item


def answer(success: bool | None, reward: float | None = 0.5, rejection: str | None = None, kl: float = 0.1) -> dict:
    return {"success": success, "reward": reward, "rejection": rejection, "kl": kl}


@pytest.mark.parametrize(
    ("samples", "successes", "k", "value"),
    [
        (4, 1, 1, 1 / 4),
        (4, 1, 2, 1 / 2),  # 1 - C(3,2)/C(4,2) = 1 - 3/6
        (4, 2, 2, 5 / 6),  # 1 - C(2,2)/C(4,2) = 1 - 1/6
        (8, 2, 4, 11 / 14),  # 1 - C(6,4)/C(8,4) = 1 - 15/70
        (5, 3, 3, 1.0),  # only two fail, so three hold a success
        (5, 0, 5, 0.0),
        (1, 1, 1, 1.0),
    ],
)
def test_pass_at_k_by_hand(samples, successes, k, value):
    assert pass_at_k(samples, successes, k) == pytest.approx(value)


@given(st.integers(1, 7).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_all_draws(case):
    samples, successes, k = case
    draws = list(itertools.combinations([True] * successes + [False] * (samples - successes), k))
    assert pass_at_k(samples, successes, k) == pytest.approx(sum(map(any, draws)) / len(draws))


@pytest.mark.parametrize("case", [(2, 3, 1), (2, -1, 1), (2, 1, 3), (2, 1, 0), (0, 0, 1)])
def test_impossible_draws_are_errors(case):
    with pytest.raises(ValueError, match="no such draw"):
        pass_at_k(*case)


def test_samples_are_means_over_a_task_and_the_unknown_is_left_out():
    one = item(0, sampled=[answer(True, 0.8), answer(False, 0.4), answer(None, None)])
    assert MEASURES["sampled: reward"](one) == pytest.approx(0.6)
    assert MEASURES["sampled: pass@1"](one) == pytest.approx(0.5)
    assert MEASURES["sampled: pass@2"](one) == 1.0
    assert MEASURES["sampled: pass@4"](one) is None, "three samples, two with a verdict"
    assert MEASURES["sampled: reward"](item(0)) is None


def test_the_free_parse_rate_is_apart_from_the_constrained_one():
    free = [answer(False, -0.2, "truncated"), answer(True), answer(False, -0.2, "missing_tag"), answer(False)]
    one = item(0, free=free)
    assert MEASURES["parse rate"](one) == 1.0 and MEASURES["without the grammar: parse rate"](one) == 0.5
    assert MEASURES["without the grammar: reward"](one) == pytest.approx((0.5 + 0.5 - 0.4) / 4)
    assert MEASURES["without the grammar: execution success"](one) == 0.25
    assert values_of([one, item(1), {**item(2), **MALFORMED}], "without the grammar: parse rate") == [0.5]


def test_kinds_split_tasks_and_old_evaluations_have_none():
    tasks = [
        item(0, language="python", source="generated", step=None, rule_seen=False),
        item(1, language="java", source="real", step=2, rule_seen=False),
        item(2, language="java", source="user", step=3, rule_seen=True),
    ]
    found = kinds_of(tasks)
    assert list(found) == [
        ("language", "java"), ("language", "python"),
        ("code", "a user's own"), ("code", "real"), ("code", "synthetic"),
        ("rule", "held out"), ("rule", "seen in training"),
        ("place", "a task of its own"), ("place", "step 2 of an episode"), ("place", "step 3 of an episode"),
    ]  # fmt: skip
    assert found["language", "java"] == tasks[1:] and found["place", "a task of its own"] == tasks[:1]
    for kind in KINDS:
        assert sum(len(some) for (name, _), some in found.items() if name == kind) == 3
    assert kinds_of([item(0)]) == {}
