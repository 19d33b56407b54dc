"""The frozen base in 16, 8 or 4 bits (QLoRA, arXiv 2305.14314): adapters stay float32 and nothing else is rounded.

Only the linear maps of the layers are quantised; embeddings, head, norms and biases stay as they are. A quantised
kernel stands where the kernel stood, so one tree serves sampler, trainer, reference and export.

The numbers are qwix's (`qwix.quantize`, `qwix.dequantize`). Its providers are not used: they patch `dot_general` under
a whole Flax module and quantise a tree that exists in full precision, where this decoder scans over stacked layers and
loads tensor by tensor. Nor is its container for nf4: XLA for CPUs unpacks a `uint4` array to a byte a weight, for all
layers at once (measured), so two codes are packed into a byte here.

In bfloat16 what is multiplied with a kernel is rounded too, and sums are float32: what CPUs with AMX do five times as
fast as float32 (measured: 1.3 TFLOP/s for .26 on two cores), while norms, attention and adapters stay in the model's
dtype. A whole model in bfloat16 is slower there than float32, since XLA widens and narrows around everything else it
computes. Kernels are held as bits: bfloat16 itself XLA for CPUs would carry through the loop over layers as float32.
"""

from functools import cache, partial

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import qwix
from jaxtyping import Array, Float, Int8, UInt8, UInt16

from srl_jax.model.families import ModelConfig, UnsupportedModel

TILE = 64  # inputs that share a scale in nf4, as in the QLoRA paper


@flax.struct.dataclass
class QuantizedKernel:
    """A kernel [.., I, O] in int8, one scale an output, or in nf4, one scale for each tile of inputs to an output.

    Byte r of a tile of nf4 holds the codes of its rows r (low half) and r + TILE/2 (high half). In bfloat16 the codes
    are its bits, and there is no scale.
    """

    codes: Int8[Array, "*L I O"] | UInt8[Array, "*L I/2 O"] | UInt16[Array, "*L I O"]
    scale: Float[Array, "*L 1 O"] | Float[Array, "*L I/TILE O"] | None


def check(config: ModelConfig, scheme: str) -> None:
    """Raises `UnsupportedModel` when a linear map of the model cannot be cut into whole tiles."""
    if scheme != "nf4":
        return
    widths = {"d_model": config.d_model, "n_heads * head_dim": config.n_heads * config.head_dim, "d_ff": config.d_ff}
    for name, width in widths.items():
        if width % TILE:
            raise UnsupportedModel(
                f"model.quantize = 'nf4': {name} = {width} is not a multiple of {TILE}, the tile that shares a scale; "
                "use int8"
            )


@partial(jax.jit, static_argnames=("scheme", "dtype"))
def quantize(kernel: Float[Array, "*L I O"], scheme: str, dtype: jnp.dtype) -> QuantizedKernel:
    """`kernel` in "bfloat16", "int8" or "nf4"; `dtype` is that of the scales, and so what the latter dequantise to."""
    if scheme == "bfloat16":
        return QuantizedKernel(jax.lax.bitcast_convert_type(kernel.astype(jnp.bfloat16), jnp.uint16), None)
    inputs = kernel.ndim - 2
    made = qwix.quantize(
        kernel.astype(jnp.float32),
        {"int8": jnp.int8, "nf4": "nf4"}[scheme],
        channelwise_axes=[axis for axis in range(kernel.ndim) if axis != inputs],
        tiled_axes={inputs: TILE} if scheme == "nf4" else {},
        scale_dtype=dtype,
    )
    if scheme == "int8":
        return QuantizedKernel(made.qvalue, made.scale)
    low, high = jnp.split(_tiles(made.qvalue.astype(jnp.uint8), TILE), 2, axis=-2)
    *lead, fan_in, fan_out = kernel.shape
    return QuantizedKernel((low | high << 4).reshape(*lead, fan_in // 2, fan_out), made.scale)


def _tiles(array: Array, rows: int) -> Array:
    """[.., I, O] as [.., I/rows, rows, O]."""
    *lead, fan_in, fan_out = array.shape
    return array.reshape(*lead, fan_in // rows, rows, fan_out)


def abstract(kernel: jax.ShapeDtypeStruct, scheme: str, dtype: jnp.dtype) -> QuantizedKernel:
    """Shapes and types of `quantize`'s result, nothing computed."""
    return jax.eval_shape(partial(quantize, scheme=scheme, dtype=dtype), kernel)


@cache
def _nf4_values() -> np.ndarray:
    """The sixteen numbers that nf4's codes stand for, float32, in the order of the codes."""
    with jax.ensure_compile_time_eval():
        codes = jnp.arange(16, dtype=jnp.uint4)[None]
        return np.asarray(qwix.dequantize(qwix.QArray(codes, jnp.ones((1, 16)), qtype="nf4"))[0])


def dequantize(kernel: QuantizedKernel) -> Float[Array, "*L I O"]:
    """The numbers a quantised kernel stands for, in its scales' dtype; bfloat16 where it has none."""
    if kernel.scale is None:
        return jax.lax.bitcast_convert_type(kernel.codes, jnp.bfloat16)
    if kernel.codes.dtype == jnp.int8:
        return qwix.dequantize(qwix.QArray(kernel.codes, kernel.scale))
    packed = _tiles(kernel.codes, TILE // 2)
    codes = jnp.concatenate([packed & 15, packed >> 4], axis=-2)
    # As qwix looks them up, but not in a flattened array, for which XLA would first gather a sharded one.
    values = jnp.asarray(_nf4_values(), kernel.scale.dtype)[codes.astype(jnp.int32)]
    *lead, half, fan_out = kernel.codes.shape
    return (values * kernel.scale[..., None, :]).reshape(*lead, 2 * half, fan_out)


@jax.custom_vjp
def quantized_matmul(x: Float[Array, "n I"], kernel: QuantizedKernel) -> Float[Array, "n O"]:
    """`x @ kernel`. Only `x` has a gradient; for it the kernel is dequantised again.

    Derived by JAX, the scan over layers would keep every dequantised kernel until the backward pass: the whole base in
    full precision, which quantising is to avoid.
    """
    return _product(x, kernel, 0)


def _product(x: Float[Array, "n X"], kernel: QuantizedKernel, axis: int) -> Float[Array, "n Y"]:
    """`x` by the kernel's numbers, summed along the kernel's `axis`."""
    weights, dims = dequantize(kernel), (((1,), (axis,)), ((), ()))
    if kernel.scale is not None:
        return jax.lax.dot_general(x, weights.astype(x.dtype), dims)
    narrow = x.astype(weights.dtype)
    return jax.lax.dot_general(narrow, weights, dims, preferred_element_type=jnp.float32).astype(x.dtype)


def _forward(x, kernel):
    return quantized_matmul(x, kernel), kernel


def _backward(kernel, d_out):
    return _product(d_out, kernel, 1), None


quantized_matmul.defvjp(_forward, _backward)
