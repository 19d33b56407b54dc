"""Intervals: exact small cases by hand, and the coverage they promise."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from srl_jax.intervals import Interval, bootstrap_ci, paired_bootstrap_ci

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
