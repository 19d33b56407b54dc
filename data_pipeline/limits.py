"""What a step may use while data are built."""

from dataclasses import replace

from srl_jax.sandbox.isolation import Limits
from srl_jax.sandbox.runner import Sandbox, SandboxConfig

# Processor time, which a step uses alike on a busy machine and on a free one, is what must stop it: if the clock did,
# the same seed would not give the same bytes. The clock is there for a step that sleeps.
_PATIENCE = 30.0


def open_sandbox(slots: int) -> Sandbox:
    """A sandbox in which a step's outcome does not depend on how busy the machine is."""
    plain = SandboxConfig(slots=slots)

    def patient(limits: Limits) -> Limits:
        return replace(limits, wall_s=_PATIENCE * limits.wall_s)

    return Sandbox(replace(plain, engine_limits=patient(plain.engine_limits), test_limits=patient(plain.test_limits)))
