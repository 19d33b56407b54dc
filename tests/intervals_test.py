"""Intervals: exact small cases by hand, and the coverage they promise."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from srl_jax.intervals import Interval, bootstrap_ci, paired_bootstrap_ci, sign_flip_p

finite = st.floats(-1e3, 1e3)


@pytest.mark.parametrize(
    ("values", "low", "high"),
    [
        ([0.7] * 5, 0.7, 0.7),
        ([0.0, 1.0], 0.0, 1.0),  # P(mean = 1) = 1/4 > 2.5 %
        ([0.0, 0.0, 1.0], 0.0, 1.0),  # P(mean = 1) = 1/27 = 3.7 %
        ([0.0, 0.0, 0.0, 1.0], 0.0, 0.75),  # P(mean = 1) = 1/256 = .4 %, P(mean >= .75) = 13/256 = 5.1 %
    ],
)
def test_small_cases_by_hand(values, low, high):
    interval = bootstrap_ci(values)
    assert interval.mean == pytest.approx(np.mean(values))
    assert (interval.low, interval.high) == (pytest.approx(low), pytest.approx(high))


def test_level_by_hand():
    # Of (0, 0, 1): P(mean = 0) = 8/27 = 29.6 %, P(mean = 1) = 3.7 %; a 50 % interval runs from 0 to 2/3.
    # P(mean <= 1/3) = 20/27 = 74 % < 75 %, so the upper quartile is 2/3; the lower one is 0.
    interval = bootstrap_ci([0.0, 0.0, 1.0], level=0.5)
    assert (interval.low, interval.high) == (0.0, pytest.approx(2 / 3))


def test_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    samples = rng.exponential(size=(300, 60))
    hits = sum(i.low <= 1.0 <= i.high for i in map(bootstrap_ci, samples))
    # The percentile bootstrap of a skewed mean at n = 60 covers about 93 %; binomial spread is 1.5 % each way.
    assert 0.88 <= hits / 300 <= 0.98


def test_pairs_cancel_what_both_share():
    rng = np.random.default_rng(2)
    difficulty = rng.uniform(size=40)
    before, after = difficulty, difficulty + 0.05
    paired = paired_bootstrap_ci(before, after)
    assert paired == Interval(*[pytest.approx(0.05)] * 3)
    assert bootstrap_ci(before).high > bootstrap_ci(after).low  # unpaired, the two overlap


def test_clusters_widen_an_interval_whose_values_are_copies():
    values = [0.0] * 20 + [1.0] * 20
    labels = ["a"] * 20 + ["b"] * 20
    assert bootstrap_ci(values, clusters=labels) == bootstrap_ci([0.0, 1.0])
    assert bootstrap_ci(values).high < 0.7
    own = bootstrap_ci(values, clusters=[f"{i:02}" for i in range(40)])
    assert own == bootstrap_ci(values)


def test_cluster_means_weigh_values_not_clusters():
    # Clusters (0, 0, 0) and (1): the four equally likely draws have means 0, 1/4, 1/4, 1.
    interval = bootstrap_ci([0.0, 0.0, 0.0, 1.0], clusters=["a", "a", "a", "b"])
    assert (interval.mean, interval.low, interval.high) == (0.25, 0.0, 1.0)


@given(st.lists(finite, min_size=1, max_size=20), st.integers(0, 3))
def test_same_seed_same_interval_and_bounds_hold(values, seed):
    interval = bootstrap_ci(values, seed=seed)
    assert interval == bootstrap_ci(values, seed=seed)
    slack = 1e-9 * max(1.0, *map(abs, values))
    assert min(values) - slack <= interval.low <= interval.high <= max(values) + slack


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [[1.0]]])
def test_nothing_to_average_is_an_error(values):
    with pytest.raises(ValueError, match="non-empty sequence of finite numbers"):
        bootstrap_ci(values)


def test_unequal_lengths_are_errors():
    with pytest.raises(ValueError, match="1 values before and 2 after"):
        paired_bootstrap_ci([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="2 values but 1 cluster labels"):
        bootstrap_ci([1.0, 2.0], clusters=["a"])


class TestSignFlips:
    @pytest.mark.parametrize(
        ("differences", "p"),
        [
            ([1, 1, 1], 2 / 8),  # of +++ to ---, only the two ends are as far from 0
            ([1, 1, -1], 1.0),  # the sums are 1 and 3: all are as far
            ([2, 1, 1], 2 / 8),
            ([3, 1, -1], 6 / 8),  # 3 +- 1 +- 1 is 5, 3, 3 or 1: one of four is nearer to 0
            ([0, 0], 1.0),
            ([5], 1.0),  # one pair can tell nothing
            ([1] * 10, 2 / 1024),
        ],
    )
    def test_small_cases_by_hand(self, differences, p):
        assert sign_flip_p([0.0] * len(differences), differences) == pytest.approx(p)
        assert sign_flip_p(differences, [0.0] * len(differences)) == pytest.approx(p), "two-sided"

    def test_drawn_flips_agree_with_all_flips(self):
        differences = np.random.default_rng(0).normal(0.3, 1.0, size=12)
        exact = sign_flip_p(np.zeros(12), differences)
        # A thirteenth pair without a difference changes no sum, and is one too many for all flips.
        drawn = sign_flip_p(np.zeros(13), [*differences, 0.0])
        assert 0.02 < exact < 0.98 and drawn == pytest.approx(exact, abs=0.02)
        assert drawn == sign_flip_p(np.zeros(13), [*differences, 0.0]), "the same every time"

    def test_a_plain_difference_is_found_and_p_is_never_zero(self):
        assert sign_flip_p([0.0] * 40, [1.0] * 40) == 1 / 10_001

    def test_no_difference_is_found_as_often_as_it_says(self):
        rng = np.random.default_rng(1)
        found = [sign_flip_p(np.zeros(10), rng.normal(size=10)) <= 0.05 for _ in range(400)]
        assert 0.02 <= np.mean(found) <= 0.09  # binomial spread is 1.1 % each way

    def test_copies_in_a_cluster_count_once(self):
        assert sign_flip_p([0.0] * 9, [1.0] * 9, clusters=list("aaabbbccc")) == pytest.approx(2 / 8)

    def test_what_is_no_pairing_is_an_error(self):
        with pytest.raises(ValueError, match="1 values before and 2 after"):
            sign_flip_p([1.0], [1.0, 2.0])
        with pytest.raises(ValueError, match="0 values before and 0 after"):
            sign_flip_p([], [])
        with pytest.raises(ValueError, match="finite"):
            sign_flip_p([1.0], [float("nan")])
        with pytest.raises(ValueError, match="2 values but 1 cluster labels"):
            sign_flip_p([1.0, 2.0], [1.0, 2.0], clusters=["a"])
