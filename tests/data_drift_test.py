"""Counting rejections, and noticing that they have changed."""

import pytest

from data_pipeline.drift import Tally, compare, report


def tally(**reasons):
    counted = Tally()
    for key, count in reasons.items():
        for _ in range(count):
            counted.add("python/generated", "t@1", None if key == "kept" else key)
    return counted


def test_counts_add_up_by_slice_and_by_teacher():
    counted = tally(kept=5, bad_json=3)
    counted.add("java/real", "t@1", "action:no_match")
    counted.add("java/real", "u@2", None)
    assert (counted.judged, counted.kept) == (10, 6)
    groups = counted.groups()
    assert groups["teacher t@1"] == (9, {"bad_json": 3, "action:no_match": 1})
    assert groups["slice java/real"] == (2, {"action:no_match": 1}) and groups["teacher u@2"] == (1, {})
    assert Tally.from_list(counted.to_list()).to_list() == counted.to_list()
    lines = report(counted)
    assert lines[0] == "6 of 10 steps kept" and "slice java/real: 1 of 2 kept" in lines
    assert any(line.split() == ["3", "37.5%", "bad_json"] for line in lines)


def test_a_new_reason_is_named_with_where_it_shows():
    found = compare(tally(kept=180, bad_json=20), tally(kept=120, bad_json=20, stray_text=60))
    assert [(drift.where, drift.reason) for drift in found] == [
        ("slice python/generated", "stray_text"),
        ("teacher t@1", "stray_text"),
    ]
    assert str(found[0]) == "drift: slice python/generated: stray_text rose from 0.0% to 30.0% of its steps"
    [fell, *_] = compare(tally(kept=100, bad_json=100), tally(kept=200))
    assert "fell from 50.0% to 0.0%" in str(fell)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"kept": 180, "bad_json": 20}, {"kept": 178, "bad_json": 22}),  # within chance
        ({"kept": 8, "bad_json": 2}, {"kept": 5, "bad_json": 5}),  # too few to tell: p = .35
        ({"kept": 99000, "bad_json": 1000}, {"kept": 98500, "bad_json": 1500}),  # sure, but half a point
        ({"kept": 10}, {"kept": 10}),
    ],
)
def test_chance_and_trifles_are_not_drift(before, after):
    assert compare(tally(**before), tally(**after)) == []


def test_only_what_both_runs_judged_is_compared():
    other = Tally()
    for _ in range(100):
        other.add("java/real", "u@2", "bad_json")
    assert compare(tally(kept=100), other) == []
