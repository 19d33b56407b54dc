"""A whole trajectory against the committed one, and the same trajectory once more from its stored rollouts.

Another processor rounds differently; a sampled token at a boundary then flips, and with it the rest of its completion.
TOLERANCE is what one flipped completion of sixteen a step may move and what rounding may, from the runs described in
`test_the_trajectory_is_the_committed_one`; a changed advantage, mask, KL or schedule moves several of these at once.
"""

import json

import jax
import numpy as np
import pytest

from srl_jax.replay import ReplayWriter, replay_stream
from tests.fakes import CountingStream
from tests.trajectory import GOLDEN, STEPS, recipe, run_steps, shown


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    folder = tmp_path_factory.mktemp("live")
    with ReplayWriter(folder / "replay") as recorder:
        metrics, lora = run_steps(recipe(), folder / "run", CountingStream(), recorder)
    return folder, metrics, lora


def test_the_trajectory_is_the_committed_one(live):
    golden, now = json.loads(GOLDEN.read_text()), shown(live[1])
    assert len(golden) == len(now) == STEPS
    # Before anything was updated there is rounding only.
    for name, value in golden[0].items():
        assert now[0][name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
    column = lambda steps, name: np.asarray([step[name] for step in steps])
    for name, every, overall in (
        ("reward/total", 0.06, 0.01), ("reward/action", 0.1, 0.02), ("entropy", 0.15, 0.03), ("kl", 0.06, 0.02),
    ):  # fmt: skip
        difference = np.abs(column(now, name) - column(golden, name))
        assert difference.max() < every and difference.mean() < overall, (name, difference.round(4).tolist())


def test_its_stored_rollouts_give_the_same_trajectory_without_sampling(live):
    folder, metrics, lora = live
    config = recipe()
    config.method, config.replay.dir = "replay", str(folder / "replay")
    stream = replay_stream(folder / "replay", shuffle=False, seed=0)
    again, replayed = run_steps(config, folder / "again", stream)
    assert all(step["replay/age"] == 0 and step["replay/ess"] > 0.999 for step in again)
    for one, other in zip(again, metrics, strict=True):
        for name in ("reward/total", "loss", "kl", "entropy", "kept_groups"):
            assert one[name] == pytest.approx(other[name], rel=2e-3, abs=2e-4), (name, one[name], other[name])
    for one, other in zip(jax.tree.leaves(replayed), jax.tree.leaves(lora), strict=True):
        np.testing.assert_allclose(one, other, atol=5e-4)
