"""The mesh, and where each array lives on it.

Axes: `data` splits the batch, `fsdp` splits the batch and the weights, `tensor` splits heads and the feed-forward.
The decoder names each weight's axes where it makes the weight; the rules here map those names to the mesh. Nothing
in this project names a GPU: the same step runs on one CPU, two GPUs, a TPU slice or several hosts.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from srl_jax.model import quantize as quantization
from srl_jax.model.decoder import Decoder, abstract_variables

AXES = ("data", "fsdp", "tensor")

# Logical axis (declared beside each weight in model/decoder.py) -> mesh axis.
RULES = (
    ("vocab", "tensor"),
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("ff", "tensor"),
    ("rank", None),
    ("norm", None),
    ("layers", None),
)

# Every batch array is split over its leading (prompt) axis, by both axes that see different data.
BATCH = PartitionSpec(("data", "fsdp"))


class BadMesh(ValueError):
    """The requested mesh does not fit the devices or the model; the message says which number to change."""


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A (data, fsdp, tensor) mesh over `devices` (default: all). One size may be -1: whatever is left."""
    devices = list(jax.devices() if devices is None else devices)
    sizes = [data, fsdp, tensor]
    if sizes.count(-1) > 1 or any(size == 0 or size < -1 for size in sizes):
        raise BadMesh(f"mesh sizes data={data}, fsdp={fsdp}, tensor={tensor}: each must be >= 1, at most one may be -1")
    if -1 in sizes:
        known = -int(np.prod(sizes))
        if len(devices) % known:
            raise BadMesh(f"mesh fsdp={fsdp}, tensor={tensor}: {len(devices)} devices do not divide by {known}")
        sizes[sizes.index(-1)] = len(devices) // known
    wanted = int(np.prod(sizes))
    if wanted > len(devices):
        raise BadMesh(f"mesh {dict(zip(AXES, sizes, strict=True))} needs {wanted} devices, {len(devices)} are here")
    if wanted < len(devices) and jax.process_count() > 1:
        raise BadMesh(
            f"mesh {dict(zip(AXES, sizes, strict=True))} leaves devices of several hosts out; use all {len(devices)}"
        )
    used = np.asarray(devices[:wanted]).reshape(sizes)
    # Auto: the compiler places intermediate values; Explicit (JAX's newer default) would need a type at each op.
    return Mesh(used, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def check_divisible(mesh: Mesh, decoder: Decoder, prompts: int) -> None:
    """Raises `BadMesh` when heads, widths or the batch do not split evenly over the mesh."""
    shape, c = mesh.shape, decoder.config
    wants = [
        ("prompts at once", prompts, shape["data"] * shape["fsdp"], "data*fsdp"),
        ("d_model", c.d_model, shape["fsdp"], "fsdp"),
        ("n_heads", c.n_heads, shape["tensor"], "tensor"),
        ("n_kv_heads", c.n_kv_heads, shape["tensor"], "tensor"),
        ("d_ff", c.d_ff, shape["tensor"], "tensor"),
    ]
    for name, value, parts, axis in wants:
        if value % parts:
            raise BadMesh(f"{name}={value} does not divide by mesh {axis}={parts}; choose a {axis} that divides it")


def variable_shardings(mesh: Mesh, decoder: Decoder) -> dict:
    """`NamedSharding` of every leaf of the `params` and `lora` collections.

    Of a quantised kernel: a `QuantizedKernel` of them, the scales split like the numbers they scale.
    """
    abstract = abstract_variables(decoder)
    specs = nn.get_partition_spec(abstract)
    rules = list(RULES)
    if decoder.config.vocab_size % mesh.shape["tensor"]:
        # The tags make odd vocabularies; an uneven axis cannot be split, so the table is kept whole on `tensor`.
        rules[0] = ("vocab", None)
    shardings = nn.logical_to_mesh_sharding(specs, mesh, rules)
    if decoder.quantize != "none":
        for name, weights in shardings["params"]["layers"].items():
            if "kernel" in weights:
                kernel = nn.unbox(abstract["params"]["layers"][name]["kernel"])
                weights["kernel"] = _quantised(weights["kernel"], kernel, decoder.quantize)
    return shardings


def _quantised(whole: NamedSharding, kernel: jax.ShapeDtypeStruct, scheme: str) -> quantization.QuantizedKernel:
    """Shardings of a quantised kernel's parts: that of the kernel, but whole along an axis that would not divide."""

    def part(array: jax.ShapeDtypeStruct) -> NamedSharding:
        spec = [
            axis if axis is not None and size % whole.mesh.shape[axis] == 0 else None
            for axis, size in zip(whole.spec, array.shape, strict=True)
        ]
        return NamedSharding(whole.mesh, PartitionSpec(*spec))

    return jax.tree.map(part, quantization.abstract(kernel, scheme, kernel.dtype))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of arrays whose leading axis is the prompt axis."""
    return NamedSharding(mesh, BATCH)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())
