"""Host memory while a model is loaded from shards: the model, one leaf of it, and never a second copy."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from srl_jax.model import families, hf

ROOT = Path(__file__).parents[1]
_CONFIG = families.ModelConfig("llama", 1024, d_model=512, n_layers=8, n_heads=8, n_kv_heads=8, head_dim=64, d_ff=2048)

# Anonymous memory only: pages of the files are the system's to drop. Read where most is held, as a leaf is placed. It
# is placed by numpy: XLA would make a copy of its own for the way and drop it some time after the array is ready.
_WORKER = """
import json, sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from srl_jax.model import hf

def anonymous():
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024

jax.block_until_ready(jnp.ones(8) + 1)
hf.load_params(Path(sys.argv[1]) / "small", quantize=sys.argv[2])  # what a load imports and compiles
before, seen = anonymous(), []

def place(leaf, array):
    placed = jax.tree.map(np.array, array)
    seen.append(anonymous())
    return placed

_, params = hf.load_params(Path(sys.argv[1]) / "model", quantize=sys.argv[2], place=place)
held = sum(x.nbytes for x in jax.tree.leaves(params))
print(json.dumps({"held": held, "peak": max(seen) - before}))
"""


def _write(directory: Path, config: families.ModelConfig) -> int:
    """A model of random weights in a shard a layer; returns its bytes."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(families.to_hf(config)))
    rng, shapes, weight_map, total = np.random.default_rng(0), hf.expected_shapes(config), {}, 0
    for i in range(-1, config.n_layers):
        tensors = {}
        for leaf, shape in shapes.items():
            if (leaf[0] == "layers") != (i >= 0):
                continue
            shape = shape[1:] if i >= 0 else shape
            name = hf.tensor_names(config, leaf)[0].format(i=i)
            tensors[name] = rng.standard_normal(shape[::-1] if leaf[-1] == "kernel" else shape, np.float32)
        file = f"model-{i + 1}.safetensors"
        save_file(tensors, directory / file)
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return total


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    small = families.ModelConfig("llama", 64, d_model=64, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=64, d_ff=64)
    _write(directory / "small", small)
    return directory, _write(directory / "model", _CONFIG)


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_no_second_copy_of_the_model(models, quantize):
    directory, size = models
    # glibc would keep freed tensors for itself from the second one on; so they go back to the system.
    as_users_run_it = {"XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "false"}
    environment = {**os.environ, **as_users_run_it, "PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "262144"}
    reports = []
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", _WORKER, str(directory), quantize],
            cwd=ROOT, capture_output=True, text=True, timeout=600, env=environment,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        reports.append(json.loads(done.stdout))
    # Quantising goes through XLA, which lets go of a host array when it next has the time, so now and then one more is
    # held. A second copy, which this is about, would be held every time.
    report = min(reports, key=lambda one: one["peak"])
    # The largest leaf is a quarter of the layers: it is held twice while it is placed.
    leaf = max(4 * int(np.prod(shape)) for shape in hf.expected_shapes(_CONFIG).values())
    assert leaf < 0.27 * size
    if quantize == "none":
        assert report["held"] == size
        assert 0.9 * size < report["peak"] < size + 1.5 * leaf
    else:
        # Measured 0.23 above what is held: a tensor, its quantisation. A leaf in full precision would add another 0.25.
        assert report["held"] < 0.17 * size
        assert report["peak"] < report["held"] + 0.3 * size
