"""How fast this machine could be at best: bytes and operations of a step over rates measured on the spot."""

import concurrent.futures
import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from srl_jax.bench.workload import Workload
from srl_jax.model.families import ModelConfig

_REPEATS = 5
_READ_BYTES = 512 * 2**20  # far beyond any cache
_GEMM_BYTES = 2**30  # of weights at most


@dataclasses.dataclass(frozen=True)
class Machine:
    """Measured rates: bytes read per second, and floating-point operations per second of products with n rows."""

    bandwidth: float
    gemm: dict[int, float]


def _best(run: Callable[[], object]) -> float:
    run()
    times = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _read_seconds() -> float:
    if jax.default_backend() != "cpu":
        data = jnp.ones(_READ_BYTES // 4, jnp.float32)
        total = jax.jit(jnp.sum)
        return _best(lambda: total(data).block_until_ready())
    # XLA:CPU adds up on one core; numpy lets go of the interpreter's lock, so each core reads its share.
    shares = np.array_split(np.ones(_READ_BYTES // 4, np.float32), cores())
    with concurrent.futures.ThreadPoolExecutor(len(shares)) as pool:
        return _best(lambda: list(pool.map(np.max, shares)))


@jax.jit
def _products(x, up, down):
    """x through every layer's two largest maps, nothing between them: what the rest of a step adds to."""
    return jax.lax.scan(lambda x, weights: ((x @ weights[0]) @ weights[1] * 1e-3, None), x, (up, down))[0]


@jax.jit
def _head(x, head):
    return jnp.einsum("nd,vd->nv", x, head)


def measure(config: ModelConfig, dtype: str, rows: Sequence[int]) -> Machine:
    """Rates on the default device, the best of five; of products the faster of the layers' largest and the head's."""
    layer_bytes = 2 * config.d_model * config.d_ff * jnp.dtype(dtype).itemsize
    layers = max(1, min(config.n_layers, _GEMM_BYTES // layer_bytes))
    up = jnp.full((layers, config.d_model, config.d_ff), 0.01, dtype)
    down = jnp.full((layers, config.d_ff, config.d_model), 0.01, dtype)
    head, gemm = jnp.full((config.vocab_size, config.d_model), 0.01, dtype), {}
    for n in sorted(set(rows)):
        x = jnp.ones((n, config.d_model), dtype)
        seconds = _best(lambda x=x: _products(x, up, down).block_until_ready())
        of_head = _best(lambda x=x: _head(x, head).block_until_ready())
        operations = 4 * n * config.d_model * config.d_ff * layers, 2 * n * head.size
        gemm[n] = max(operations[0] / seconds, operations[1] / of_head)
    return Machine(_READ_BYTES / _read_seconds(), gemm)


@dataclasses.dataclass(frozen=True)
class Floor:
    """Least seconds of a part: of reading its bytes at the bandwidth, of its products at their rate, the longer.

    The rate is what this project's own library reaches for products of so many rows, no property of the processor.
    """

    bytes: float
    flops: float
    reading: float
    multiplying: float

    @property
    def seconds(self) -> float:
        return max(self.reading, self.multiplying)

    def to_dict(self) -> dict[str, float]:
        return {**dataclasses.asdict(self), "seconds": self.seconds}


def _floor(machine: Machine, rows: int, bytes_: float, flops: float, times: int = 1) -> Floor:
    all_bytes, all_flops = times * bytes_, times * flops
    return Floor(all_bytes, all_flops, all_bytes / machine.bandwidth, all_flops / machine.gemm[rows])


def rows_needed(w: Workload) -> tuple[int, int, int]:
    """Rows of the products of a decode step, of prefill, and of one pass of the update (one group)."""
    return w.rows, w.prompts * w.prompt_tokens, w.prompt_tokens + w.group_size * w.new_tokens


def floors(config: ModelConfig, w: Workload, machine: Machine, scored: int | None = None) -> dict[str, Floor]:
    """Floors of prefill, decode and update as this project does them: each prompt once, adapters merged to sample.

    The update is the reference's forward, the policy's forward and the backward through frozen weights, so three
    times a forward's products and four times its attention; its head sees the `scored` completion tokens only, those
    that the grammar does not force (None: all). Decoding is floored a token at a time, forced or not.
    """
    c, width = config, jnp.dtype(w.dtype).itemsize
    maps = [
        (c.d_model, c.n_heads * c.head_dim),
        (c.d_model, c.n_kv_heads * c.head_dim),
        (c.d_model, c.n_kv_heads * c.head_dim),
        (c.n_heads * c.head_dim, c.d_model),
        (c.d_model, c.d_ff),
        (c.d_model, c.d_ff),
        (c.d_ff, c.d_model),
    ]
    linear = 2 * c.n_layers * sum(i * o for i, o in maps)  # operations of one token
    adapter = 2 * c.n_layers * sum(w.lora_rank * (i + o) for i, o in maps)
    head = 2 * c.vocab_size * c.d_model
    attention = lambda seen: 4 * c.n_layers * c.n_heads * c.head_dim * seen
    kv = 2 * c.n_layers * c.n_kv_heads * c.head_dim * width  # bytes of one position
    weights = (linear + head) / 2 * width
    decode_rows, prefill_rows, update_rows = rows_needed(w)
    floor = partial(_floor, machine)
    seen = w.prompt_tokens + w.new_tokens / 2
    prompt, completion = w.prompts * w.prompt_tokens, w.tokens
    update = 3 * ((prompt + completion) * (linear + adapter) + (completion if scored is None else scored) * head)
    update += 4 * (prompt * attention(w.prompt_tokens / 2) + completion * attention(seen))
    live = kv * (w.prompts * w.prompt_tokens + w.rows * w.new_tokens / 2)
    return {
        "prefill": floor(prefill_rows, weights, prompt * (linear + attention(w.prompt_tokens / 2))),
        "decode": floor(
            decode_rows,
            weights + live + 4 * w.rows * c.vocab_size,
            w.rows * (linear + head + attention(seen)),
            times=w.new_tokens,
        ),
        "update": floor(update_rows, 3 * w.prompts * weights, update),
    }
