"""Whether one run repeated another: the metrics of every step, and the bits of the final adapters."""

import json
from pathlib import Path
from typing import Any

from srl_jax.checkpoint import saved_checksums
from srl_jax.config import NotARun, read_config
from srl_jax.environment import ENVIRONMENT_FILE
from srl_jax.metrics import is_timing, read_metrics


def recorded_environment(workdir: Path) -> dict[str, Any]:
    """The environment a run was started in; raises `NotARun` where there is none."""
    path = workdir / ENVIRONMENT_FILE
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError) as error:
        raise NotARun(f"{path}: no environment record to repeat the run by ({error})") from None


def verdict(original: Path, repetition: Path) -> tuple[bool, str]:
    """Whether every metric that is no time, and the final state, are the same to the bit; and a line about it."""
    ours, theirs = read_metrics(repetition), read_metrics(original)
    for one, other in zip(ours, theirs, strict=False):
        names = sorted(name for name in one.keys() | other.keys() if not is_timing(name))
        for name in names:
            if one.get(name) != other.get(name):
                return False, (
                    f"not reproduced: {name} of step {one['step']} is {one.get(name)}, "
                    f"in {original} it is {other.get(name)}"
                )
    steps = read_config(repetition).steps
    if len(ours) != len(theirs):
        return False, f"not reproduced: {len(ours)} steps of {steps} here, {len(theirs)} in {original}"
    if saved_checksums(repetition / "checkpoints") != saved_checksums(original / "checkpoints"):
        return False, "not reproduced: the metrics are the same, the bits of the last checkpoint are not"
    return True, f"reproduced: {len(ours)} steps and the last checkpoint are those of {original}, bit for bit"
