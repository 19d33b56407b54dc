"""The short soak: what `sandbox_soak.py` does for ten minutes, for 48 requests at most."""

import random

from srl_jax.sandbox.service import Score
from tests.sandbox_soak import fault, make_request, soak


def test_nothing_is_lost_and_nothing_is_left():
    result = soak(48, 5.0, slots=2, pause_s=0.4, seed=1)
    assert result["faults"] == []
    assert result["leaks"] == {}
    assert result["answered"] == result["requests"] >= 16
    assert result["killed"] > 0


def test_a_fault_would_be_seen():
    asked = next(a for a in (make_request(i, random.Random(i)) for i in range(99)) if a.kind == "malformed")
    assert fault(asked, Score(None, None, "lost"))
    right = next(a for a in (make_request(i, random.Random(i)) for i in range(99)) if a.kind == "right")
    assert fault(right, Score(None))
