"""Where model-written actions and their tests run, and nothing escapes: see runner.Sandbox."""

from srl_jax.sandbox.engine import EngineResult, Status
from srl_jax.sandbox.isolation import Limits, SandboxCrash, SandboxUnavailable
from srl_jax.sandbox.runner import EnvReport, RunnerUnavailable, Sandbox, SandboxConfig, TestOutcome

__all__ = [
    "EngineResult",
    "EnvReport",
    "Limits",
    "RunnerUnavailable",
    "Sandbox",
    "SandboxConfig",
    "SandboxCrash",
    "SandboxUnavailable",
    "Status",
    "TestOutcome",
]
