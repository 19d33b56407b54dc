"""What every test runs under. Only the environment is set here, so that host-only tests never import JAX."""

import gc
import os
import sys
from pathlib import Path

import hypothesis
import pytest

_VIRTUAL_DEVICES = "--xla_force_host_platform_device_count=8"
# A process may have 65,530 memory maps, and every compiled program holds some; so many go with some 3 GB.
_MOST_MAPS = 10_000

# JAX reads these when it is first imported, which is after this file. An accelerator would make tolerances
# and device counts depend on the machine; `JAX_PLATFORMS=cuda make test` still chooses one on purpose.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if _VIRTUAL_DEVICES not in os.environ.get("XLA_FLAGS", ""):  # a worker process inherits what its parent set
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_VIRTUAL_DEVICES}".strip()
# Tests compile far longer than they compute; this halves the compilers' time. With false they test what users run.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".cache" / "xla-tests"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
# Figures are drawn to files; no display is ever needed.
os.environ.setdefault("MPLBACKEND", "Agg")

# Compilation makes first examples slow, so there is no deadline; `CI` repeats the same examples every time.
hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


@pytest.fixture(scope="module", autouse=True)
def _programs_are_let_go():
    """Frees compiled programs after a module, where they have become many; until then the next module uses them."""
    yield
    if "jax" in sys.modules:
        maps = Path("/proc/self/maps")
        if not maps.exists() or len(maps.read_bytes().splitlines()) > _MOST_MAPS:
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
