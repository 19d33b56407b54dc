"""What a run's numbers depend on beside its seed: kept in every run's directory, compared when a run is repeated."""

import hashlib
import os
import platform
import subprocess
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from srl_jax import rewards
from srl_jax.config import ConfigError, TrainConfig, config_hash
from srl_jax.records import SCHEMA_VERSION
from srl_jax.student import Student

ENVIRONMENT_FILE = "environment.json"
_PACKAGES = (
    "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "tokenizers", "torch",
    "sentence-transformers", "ast-grep-cli", "numpy",
)  # fmt: skip
# Without these being the same, a repetition is another experiment; the rest may change the last digits.
_DECISIVE = {
    "data": "point config.data.dir (or replay.dir) at the data set of that run, or build it again from its recipe",
    "tokenizer": "restore the model files of that run",
    "base_weights": "restore the model files of that run",
    "config": "config.json of that run was changed; restore it",
    "schema": "use the version of srl_jax of that run",
    "reward": "use the version of srl_jax of that run",
}


def environment(config: TrainConfig, student: Student) -> dict[str, Any]:
    """Versions, driver, commit, machine, and hashes of configuration, data, tokenizer and base weights."""
    return {
        "config": config_hash(config),
        "data": data_hash(config),
        "tokenizer": student.tokenizer.fingerprint,
        "base_weights": student.base_hash,
        "schema": SCHEMA_VERSION,
        "reward": rewards.REWARD_VERSION,
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in _PACKAGES},
        "machine": platform.platform(),
        "processor": processor(),
        "cpus": os.cpu_count(),
        "devices": [device.device_kind for device in jax.devices()],
        "driver": _driver(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def data_hash(config: TrainConfig) -> str:
    """SHA-256 of the data set's manifest, which holds its files' own; of the stored rollouts for method "replay"."""
    digest = hashlib.sha256()
    manifest = Path(config.data.dir) / "manifest.json"
    digest.update(manifest.read_bytes() if manifest.is_file() else b"none")
    if config.method == "replay":
        for path in sorted(Path(config.replay.dir).glob("*.arrayrecord")):
            digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def check_same(recorded: Mapping[str, Any], now: Mapping[str, Any], workdir: Path) -> list[str]:
    """What differs but may not matter, one line each; raises `ConfigError` for what makes a repetition pointless."""
    for name, remedy in _DECISIVE.items():
        if recorded.get(name) != now[name]:
            raise ConfigError(
                "", str(workdir), f"cannot be repeated here: its {name} was {recorded.get(name)}, "
                f"here it is {now[name]}; {remedy}",
            )  # fmt: skip
    notes = []
    for name in ("commit", "python", "machine", "processor", "devices", "driver", "xla_flags"):
        if recorded.get(name) != now[name]:
            notes.append(f"{name} was {recorded.get(name)}, here {now[name]}")
    for name, version in now["packages"].items():
        if recorded.get("packages", {}).get(name) != version:
            notes.append(f"{name} was {recorded.get('packages', {}).get(name)}, here {version}")
    return notes


def _commit() -> str:
    """The commit of this source tree, "-changed" where files differ from it, "" outside a repository."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return ""
    git = lambda *arguments: subprocess.run(
        ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=30, check=False
    )
    try:
        head, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return head.stdout.strip() + ("-changed" if changes.stdout.strip() else "") if head.returncode == 0 else ""


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _driver() -> str:
    """The accelerator's driver as the system and JAX's runtime name it."""
    nvidia = Path("/proc/driver/nvidia/version")
    kernel = nvidia.read_text().partition("\n")[0].strip() if nvidia.is_file() else ""
    runtime = " ".join(jax.devices()[0].client.platform_version.split())
    return f"{kernel} {runtime}".strip()
