"""A whole trajectory against the committed one, and the same trajectory once more from its stored rollouts.

While a step samples the golden tokens, it and all steps before it computed what the golden run did, so its numbers must
agree. How closely: compiled for AVX2 instead of AVX-512, which sums in another order, the run sampled the same tokens
twenty steps long and no number was off by more than 6e-7; a relative 1e-3 is allowed for what other processors
may do. One of those may also round a draw to another token. From there on it is another sample of the same
training, which nothing here can judge; five steps at least must come before.

Replayed, the same arrays are scored by one program more: the numbers differed by 2e-7, the adapters (up to .5) by 3e-6.
"""

import json

import jax
import numpy as np
import pytest

from srl_jax.replay import replay_stream
from tests.trajectory import GOLDEN, SHOWN, STEPS, recipe, run_live, run_steps, sampled, trajectory


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    folder = tmp_path_factory.mktemp("live")
    return folder, *run_live(recipe(), folder)


def test_the_trajectory_is_the_committed_one(live):
    folder, metrics, _ = live
    golden, now = json.loads(GOLDEN.read_text()), trajectory(metrics, sampled(recipe(), folder))
    assert golden["columns"] == now["columns"] and len(golden["steps"]) == len(now["steps"]) == STEPS
    same = [ours[0] == theirs[0] for ours, theirs in zip(now["steps"], golden["steps"], strict=True)]
    same_until = same.index(False) if False in same else STEPS
    assert same_until >= 5, f"step {same_until + 1} sampled other tokens"
    for step in range(same_until):
        for name, ours, theirs in zip(SHOWN, now["steps"][step][1:], golden["steps"][step][1:], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5), (step + 1, name)


def test_its_stored_rollouts_give_the_same_trajectory_without_sampling(live):
    folder, metrics, lora = live
    config = recipe()
    config.method, config.replay.dir = "replay", str(folder / "replay")
    again, replayed = run_steps(config, folder / "again", replay_stream(folder / "replay", shuffle=False, seed=0))
    assert all(step["replay/age"] == 0 and step["replay/ess"] > 0.9999 for step in again)
    for one, other in zip(again, metrics, strict=True):
        for name in ("reward/total", "kl", "entropy", "kept_groups", "grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-5, abs=1e-6), name
    for one, other in zip(jax.tree.leaves(replayed), jax.tree.leaves(lora), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
