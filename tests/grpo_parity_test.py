"""Losses and gradients equal TRL's own on the same arrays, for the configurations both have.

The arrays come from `GRPOTrainer._compute_loss` (golden/make_trl_losses.py, which says how to regenerate them and
with which version). TRL counts a completion without trained tokens in its means; this project does not, so every
row here has some.
"""

from pathlib import Path

import jax
import numpy as np
import pytest

from srl_jax import grpo

with np.load(Path(__file__).parent / "golden" / "trl_losses.npz") as archive:
    GOLDEN = dict(archive)
CLIP_LOW, CLIP_HIGH, BETA, ENTROPY_COEF, MAX_LENGTH = GOLDEN["settings"].tolist()
CLIP = {"clip_epsilon_low": CLIP_LOW, "clip_epsilon_high": CLIP_HIGH}
INPUTS = {
    name: GOLDEN[f"inputs/{name}"]
    for name in ("logprobs", "old_logprobs", "ref_logprobs", "sampler_ratio", "entropy", "advantages", "mask")
}


def policy(logprobs, x, aggregation, **kwargs):
    return grpo.clipped_surrogate(
        logprobs,
        x["old_logprobs"],
        x["advantages"],
        x["mask"],
        **CLIP,
        aggregation=aggregation,
        max_length=int(MAX_LENGTH),
        **kwargs,
    )


def plain_k3(logprobs, entropy, x):
    """TRL's default in-loss KL: k3 differentiated as it stands, which is not the reverse KL's gradient."""
    kl = grpo.kl_estimate(logprobs, x["ref_logprobs"], "k3")
    return policy(logprobs, x, "sequence") + BETA * grpo.aggregate(kl, x["mask"], aggregation="sequence")


def unbiased_k3(logprobs, entropy, x):
    kl = grpo.kl_loss(logprobs, x["old_logprobs"], x["ref_logprobs"], x["mask"], estimator="k3", aggregation="token")
    return policy(logprobs, x, "token") + BETA * kl


def entropy_bonus(logprobs, entropy, x):
    bonus = grpo.aggregate(entropy, x["mask"], aggregation="token")
    return policy(logprobs, x, "token") - ENTROPY_COEF * bonus


def accumulated(logprobs, entropy, x):
    """Three micro-batches added up under one global denominator."""
    total = grpo.loss_denominator(x["mask"], aggregation="token")
    micro = [slice(0, 2), slice(2, 4), slice(4, 6)]
    return sum(
        policy(logprobs[rows], {name: array[rows] for name, array in x.items()}, "token", denominator=total)
        for rows in micro
    )


LOSSES = {
    "grpo": lambda logprobs, entropy, x: policy(logprobs, x, "sequence"),
    "dapo": lambda logprobs, entropy, x: policy(logprobs, x, "token"),
    "dr_grpo": lambda logprobs, entropy, x: policy(logprobs, x, "constant"),
    "gspo": lambda logprobs, entropy, x: policy(logprobs, x, "sequence", level="sequence"),
    "grpo_k3": plain_k3,
    "dapo_k3_unbiased": unbiased_k3,
    "dapo_weights": lambda logprobs, entropy, x: policy(logprobs, x, "token", token_weights=x["sampler_ratio"]),
    "dapo_entropy": entropy_bonus,
    "dapo_accumulated": accumulated,
}


@pytest.mark.parametrize("case", LOSSES)
def test_loss_and_gradient_equal_trl_s(case):
    loss = jax.jit(jax.value_and_grad(LOSSES[case], argnums=(0, 1)))
    value, (d_logprobs, d_entropy) = loss(INPUTS["logprobs"], INPUTS["entropy"], INPUTS)
    np.testing.assert_allclose(value, GOLDEN[f"{case}/loss"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(d_logprobs, GOLDEN[f"{case}/d_logprobs"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(d_entropy, GOLDEN[f"{case}/d_entropy"], rtol=1e-5, atol=1e-6)


def test_every_golden_case_is_compared():
    cases = {name.split("/")[0] for name in GOLDEN if "/" in name} - {"inputs"}
    assert cases == set(LOSSES)


def test_clip_fractions_equal_trl_s():
    got = grpo.clip_fractions(INPUTS["logprobs"], INPUTS["old_logprobs"], INPUTS["advantages"], INPUTS["mask"], **CLIP)
    np.testing.assert_allclose([got.low, got.high], [GOLDEN["dapo/clip_low"], GOLDEN["dapo/clip_high"]], rtol=1e-6)
    assert got.low > 0 and got.high > 0


def test_the_arrays_take_every_branch_of_the_clip():
    ratio = np.exp(INPUTS["logprobs"] - INPUTS["old_logprobs"])[INPUTS["mask"] == 1]
    sign = np.broadcast_to(np.sign(INPUTS["advantages"])[:, None], INPUTS["mask"].shape)[INPUTS["mask"] == 1]
    region = np.digitize(ratio, [1 - CLIP_LOW, 1 + CLIP_HIGH])
    assert {(r, s) for r, s in zip(region, sign, strict=True)} == {(r, s) for r in (0, 1, 2) for s in (-1, 1)}
