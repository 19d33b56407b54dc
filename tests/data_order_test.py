"""The order of a training stream: arithmetic that can be checked by counting."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.order import ENDLESS, Order, Plan, SliceIndex

SIZES = {"a": 30, "b": 7}


def slices(sizes=SIZES):
    rng = np.random.default_rng(0)
    return {
        name: SliceIndex(size, rng.integers(1, 4, size, np.int32), rng.integers(100, 900, size, np.int32))
        for name, size in sizes.items()
    }


def first(count, plan, index=None):
    order = Order(index or slices(), plan)
    return [order[position] for position in range(count)]


@given(
    st.lists(st.floats(0.001, 50), min_size=1, max_size=6),
    st.lists(st.integers(1, 300), min_size=6, max_size=6),
    st.integers(0, 2**31),
)
def test_slices_keep_their_weights_and_epochs_are_permutations(weights, sizes, seed):
    index = {f"s{i}": SliceIndex(sizes[i]) for i in range(len(weights))}
    plan = Plan(seed, {f"s{i}": weight for i, weight in enumerate(weights)})
    drawn = first(3000, plan, index)
    counted = Counter(name for name, _ in drawn)
    for number, weight in enumerate(weights):
        share = weight / sum(weights)
        assert abs(counted[f"s{number}"] / 3000 - share) < 0.004
        own = [i for name, i in drawn if name == f"s{number}"]
        for start in range(0, len(own) - sizes[number] + 1, sizes[number]):
            assert sorted(own[start : start + sizes[number]]) == list(range(sizes[number]))
    assert drawn == first(3000, plan, index)


def test_weights_are_kept_at_every_point_not_only_in_the_end():
    drawn = [name for name, _ in first(4096 * 2 + 100, Plan(0, {"a": 3.0, "b": 1.0}))]
    for count in range(4, len(drawn), 97):
        assert abs(drawn[:count].count("a") - 0.75 * count) <= 2


def test_a_slice_of_no_weight_is_never_drawn_and_a_rare_one_now_and_then():
    assert {name for name, _ in first(500, Plan(0, {"a": 1.0, "b": 0.0}))} == {"a"}
    rare = Counter(name for name, _ in first(4096, Plan(0, {"a": 1.0, "b": 1e-9})))
    assert rare["b"] == 1


def test_one_pass_takes_everything_once():
    for hosts in (1, 2, 5):
        orders = [Order(slices(), Plan(3, None, host=host, hosts=hosts)) for host in range(hosts)]
        seen = [order[position] for order in orders for position in range(len(order))]
        assert Counter(seen) == Counter((name, i) for name, size in SIZES.items() for i in range(size))
        assert max(map(len, orders)) - min(map(len, orders)) <= 1
    with pytest.raises(IndexError):
        orders[0][len(orders[0])]


@pytest.mark.parametrize("bucket", [1, 3])
def test_hosts_together_read_what_one_big_host_reads(bucket):
    weights = {"a": 2.0, "b": 1.0}
    alone = first(24 * 6, Plan(1, weights, bucket=bucket, batch_size=12))
    hosts = [first(24 * 2, Plan(1, weights, bucket=bucket, batch_size=4, host=host, hosts=3)) for host in range(3)]
    for batch in range(12):
        together = [item for own in hosts for item in own[batch * 4 : batch * 4 + 4]]
        assert sorted(together) == sorted(alone[batch * 12 : batch * 12 + 12])


def test_the_curriculum_starts_easy_and_short_and_then_shuffles():
    index = slices({"a": 200})
    keys = list(zip(index["a"].difficulty, index["a"].length, strict=True))
    strict = [i for _, i in first(400, Plan(0, {"a": 1.0}, curriculum=1.0), index)]
    assert [keys[i] for i in strict[:200]] == sorted(keys)
    assert sorted(strict[200:]) == list(range(200)) and [keys[i] for i in strict[200:]] != sorted(keys)
    soft = [i for _, i in first(200, Plan(0, {"a": 1.0}, curriculum=0.5), index)]
    assert sorted(soft) == list(range(200)) and soft != strict[:200]
    rank = {i: place for place, i in enumerate(strict[:200])}
    assert np.mean([rank[i] for i in soft[:60]]) < 60 < 99 < np.mean([rank[i] for i in soft[-60:]])
    assert first(200, Plan(0, {"a": 1.0}), index) != first(200, Plan(0, {"a": 1.0}, curriculum=0.5), index)


def test_buckets_hold_like_lengths_and_lose_nothing():
    index = slices({"a": 300, "b": 100})
    weights = {"a": 3.0, "b": 1.0}

    def spread(drawn):
        lengths = np.array([index[name].length[i] for name, i in drawn]).reshape(-1, 10)
        return np.mean(lengths.max(1) - lengths.min(1))

    plain = first(400, Plan(0, weights, batch_size=10), index)
    bucketed = first(400, Plan(0, weights, bucket=20, batch_size=10), index)
    assert Counter(plain[:200]) == Counter(bucketed[:200]) and Counter(plain) == Counter(bucketed)
    assert spread(bucketed) < spread(plain) / 5
    means = [np.mean([index[name].length[i] for name, i in bucketed[k : k + 10]]) for k in range(0, 200, 10)]
    assert means != sorted(means)  # batches themselves come in no order of length


def test_a_short_last_batch_of_a_bucketed_pass_comes_last():
    index = slices({"a": 23})
    order = Order(index, Plan(0, None, bucket=10, batch_size=5))
    drawn = [order[position][1] for position in range(len(order))]
    assert sorted(drawn) == list(range(23))
    assert min(index["a"].length[drawn[20:]]) >= max(index["a"].length[drawn[:20]])


def test_an_endless_order_has_room_for_any_run():
    assert len(Order(slices(), Plan(0, {"a": 1.0}))) == ENDLESS
    far = Order(slices(), Plan(0, {"a": 1.0}))
    assert far[10**15][0] == "a"
