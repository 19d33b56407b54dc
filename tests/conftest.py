"""What every test runs under. Only the environment is set here, so that host-only tests never import JAX."""

import gc
import os
import sys
from pathlib import Path

import hypothesis
import pytest

_VIRTUAL_DEVICES = "--xla_force_host_platform_device_count=8"

# JAX reads these when it is first imported, which is after this file. An accelerator would make tolerances
# and device counts depend on the machine; `JAX_PLATFORMS=cuda make test` still chooses one on purpose.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if _VIRTUAL_DEVICES not in os.environ.get("XLA_FLAGS", ""):  # a worker process inherits what its parent set
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_VIRTUAL_DEVICES}".strip()
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".cache" / "xla-tests"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
# Figures are drawn to files; no display is ever needed.
os.environ.setdefault("MPLBACKEND", "Agg")

# Compilation makes first examples slow, so there is no deadline; `CI` repeats the same examples every time.
hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


@pytest.fixture(scope="module", autouse=True)
def _programs_are_let_go():
    """Frees a module's compiled programs after it: each holds memory maps, and a process may have 65,530 of these."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
        gc.collect()


@pytest.fixture(scope="module")
def student():
    """The tiny random model. Imported here: host-only tests must not load JAX."""
    from tests.fakes import tiny_student

    return tiny_student()


@pytest.fixture(scope="module")
def lora(student):
    """Adapters of that model that change its answers."""
    from tests.fakes import perturbed

    return perturbed(student.fresh_lora(0))
