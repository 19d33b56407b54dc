"""Training state on disk: adapters, optimiser, RNG, data iterator and identity, saved as one atomic thing.

Orbax writes each step into a temporary directory and renames it, so a kill at any moment leaves the previous step
usable. Two things are added. Orbax returns flipped bits in array data without a word (measured: 25 of 25), so every
array carries a checksum; and a checkpoint knows which tokenizer, base weights and record schema it belongs to, because
adapters on anything else are silently wrong.
"""

import base64
import dataclasses
import errno
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils

from srl_jax import hosts

FORMAT = "srl-checkpoint/2"
_FOR_EVER_S = 10 * 365 * 86_400

_REMEDIES = {
    "format": "this checkpoint was written by another version of srl_jax; use that version or a new workdir",
    "tokenizer": "resume with the tokenizer the run was started with, or start a new workdir",
    "base_weights": "the adapters only fit the base model they were trained on; restore config.model.source or "
    "start a new workdir",
    "schema": "rebuild the data set with the schema the run was started with, or start a new workdir",
    "reward": "rewards before and after would not be comparable; start a new workdir",
}


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or none could be read; the message says what to do."""


class CheckpointMismatch(CheckpointError):
    """A healthy checkpoint that belongs to something else."""

    def __init__(self, directory: Path, field: str, saved: object, current: object, remedy: str):
        self.field = field
        super().__init__(f"{directory}: {field} is {saved!r} in the checkpoint but {current!r} now; {remedy}")


@dataclasses.dataclass(frozen=True)
class CheckpointMeta:
    """What a checkpoint belongs to. All but `config` must match on restore; a changed `config` is only logged."""

    config: str  # config.config_hash
    tokenizer: str  # Tokenizer.fingerprint
    base_weights: str  # SHA-256 of the frozen parameters
    schema: str  # records.SCHEMA_VERSION
    reward: str  # rewards.REWARD_VERSION


class Checkpointer:
    """Saves and restores the newest `keep` training states under `directory`.

    `read_only=True` is for a process beside the trainer: it neither cleans up nor moves anything.
    """

    def __init__(self, directory: str | os.PathLike[str], keep: int, meta: CheckpointMeta, *, read_only: bool = False):
        self._directory = Path(directory).absolute()
        self._meta = meta
        self._read_only = read_only
        self._saving: int | None = None
        # Orbax limits a write by the wall clock: one that jumps forward would end it. The limit is there to notice that
        # another host is gone; alone, a write ends when it ends.
        limit = ocp.AsyncOptions(timeout_secs=_FOR_EVER_S) if jax.process_count() == 1 else ocp.AsyncOptions()
        options = ocp.CheckpointManagerOptions(
            async_options=limit,
            max_to_keep=None if read_only else keep,
            create=not read_only,
            cleanup_tmp_directories=not read_only,  # what a killed save left behind
            read_only=read_only,
        )
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None or not issubclass(kind, hosts.HostLost):  # a save that lacks a host would never be complete
            self.close()

    def latest_step(self) -> int | None:
        """The newest committed step, or None where there is none."""
        return self._manager.latest_step()

    def prepare(self, state: Any) -> None:
        """Compiles what `save` runs on such a state; otherwise the first save holds the run up for that."""
        _describe(state)

    def save(self, step: int, state: Any, iterator_state: Mapping[str, Any] | bytes) -> None:
        """Starts saving `state` (a pytree of JAX arrays) as `step`; the write itself goes on in the background.

        Returns once the arrays may be donated or replaced. A step already saved is left as it is. Errors of a
        background write, a full disk among them, are raised as `CheckpointError` by the next `save` or by `wait`;
        earlier checkpoints stay usable.
        """
        self.wait()
        if self._manager.latest_step() == step:
            return
        self._saving = step
        if isinstance(iterator_state, bytes):
            iterator = {"bytes": base64.b64encode(iterator_state).decode("ascii")}
        else:
            iterator = {"json": dict(iterator_state)}
        meta = {"format": FORMAT, **dataclasses.asdict(self._meta), "arrays": _describe(state)}
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), iterator=ocp.args.JsonSave(iterator), meta=ocp.args.JsonSave(meta)
        )
        try:
            self._manager.save(step, args=items, force=True)
        except Exception as error:
            raise self._abandoned_save(error) from error

    def wait(self) -> None:
        """Blocks until the last save is committed; raises `CheckpointError` if it was not."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._abandoned_save(error) from error

    def restore(self, state_like: Any) -> tuple[int, Any, dict[str, Any] | bytes] | None:
        """Returns (step, state, iterator state) of the newest usable checkpoint, None where none was ever saved.

        `state_like` gives structure, shapes, dtypes and shardings: arrays or `jax.ShapeDtypeStruct`. A checkpoint
        that cannot be read, or whose arrays fail their checksum, is moved to `<step>.corrupt` with a warning and
        the one before it is taken. Raises `CheckpointMismatch` for one that belongs to another tokenizer, base
        model, schema, reward or state shape, and `CheckpointError` when checkpoints exist and none can be read.
        """
        self.wait()
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            reason, restored = "", None
            try:
                meta = self._read_meta(step, state_like)
                restored = self._read(step, state_like)
            except (CheckpointMismatch, MemoryError, jax.errors.JaxRuntimeError):
                raise  # nothing is wrong with the files
            except Exception as error:  # Orbax raises a bare Exception for a missing data file
                reason = str(error).partition("\n")[0][:300] or type(error).__name__
            # One host's part may be unreadable. Only when every host has its own can all compute the checksums.
            if hosts.greatest(bool(reason)):
                reason = reason or "another host cannot read its part"
            else:
                reason = self._wrong_bits(restored[0], meta)
            if not reason:
                return step, *restored
            logging.warning("%s: checkpoint %d is unusable: %s", self._directory, step, reason)
            self._set_aside(step)
        if steps:
            raise CheckpointError(
                f"{self._directory}: none of the checkpoints {sorted(steps)} can be read; "
                "restore the directory from a copy, or start a new workdir"
            )
        return None

    def close(self) -> None:
        """Waits for the last save and releases Orbax's threads."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def _read_meta(self, step: int, state_like: Any) -> Mapping[str, Any]:
        meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
        self._verify_meta(step, meta, state_like)
        return meta

    def _read(self, step: int, state_like: Any) -> tuple[Any, dict[str, Any] | bytes]:
        items = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, state_like)),
                iterator=ocp.args.JsonRestore(),
            ),
        )
        iterator = items.iterator
        return items.state, base64.b64decode(iterator["bytes"]) if "bytes" in iterator else iterator["json"]

    @staticmethod
    def _wrong_bits(state: Any, meta: Mapping[str, Any]) -> str:
        """Which array is not as it was saved; "" when all are."""
        for name, array in _describe(state).items():
            if array["checksum"] != meta["arrays"][name].get("checksum"):
                return f"the bits of {name} are not those that were saved"
        return ""

    def _verify_meta(self, step: int, meta: Mapping[str, Any], state_like: Any) -> None:
        directory = self._directory / str(step)
        current = {"format": FORMAT, **dataclasses.asdict(self._meta)}
        for field, remedy in _REMEDIES.items():
            if meta[field] != current[field]:
                raise CheckpointMismatch(directory, field, meta[field], current[field], remedy)
        saved = {name: _shape_text(array) for name, array in meta["arrays"].items()}
        wanted = {name: _shape_text(_shape(leaf)) for name, leaf in _named_leaves(state_like)}
        for name in sorted(saved.keys() | wanted.keys()):
            if saved.get(name) != wanted.get(name):
                raise CheckpointMismatch(
                    directory,
                    name,
                    saved.get(name, "absent"),
                    wanted.get(name, "absent"),
                    "config.lora, config.model and config.optim must be those the run was started with",
                )
        if meta["config"] != current["config"] and not self._read_only:
            logging.warning("%s was saved under another configuration; going on with the present one", directory)

    def _abandoned_save(self, error: Exception) -> CheckpointError:
        """Frees what the failed save took and says in one line what happened."""
        for partial in self._directory.glob(f"{self._saving}.orbax-checkpoint-tmp*"):
            shutil.rmtree(partial, ignore_errors=True)
        self._manager.reload()
        usable = self._manager.latest_step()
        if usable is None:
            kept = "there is no earlier checkpoint"
        else:
            kept = f"checkpoint {usable} is untouched: run the same command again to go on from it"
        return CheckpointError(f"{self._directory}: saving step {self._saving} failed: {_reason(error)}; {kept}")

    def _set_aside(self, step: int) -> None:
        if self._read_only:
            return
        if jax.process_index() == 0:
            aside = self._directory / f"{step}.corrupt"
            shutil.rmtree(aside, ignore_errors=True)
            (self._directory / str(step)).rename(aside)
        multihost_utils.sync_global_devices(f"checkpoint {step} set aside")
        self._manager.reload()


def saved_checksums(directory: Path) -> dict[str, Any]:
    """Step, and checksum of every array, of the newest checkpoint under `directory`; {} where there is none."""
    steps = sorted(int(path.name) for path in directory.glob("*") if path.name.isdigit())
    if not steps:
        return {}
    meta = json.loads((directory / str(steps[-1]) / "meta" / "metadata").read_text(encoding="utf-8"))
    return {"step": steps[-1]} | {name: array["checksum"] for name, array in meta["arrays"].items()}


def _reason(error: Exception) -> str:
    text = str(error)
    if isinstance(error, OSError) and error.errno is not None:
        code = error.errno
    else:  # TensorStore reports the operating system's error number in its message only
        match = re.search(r"os_error_code='(\d+)'", text)
        code = int(match.group(1)) if match else 0
    if code in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full; free space or lower config.checkpoint.keep"
    return os.strerror(code) if code else text.partition("\n")[0][:300]


def _named_leaves(tree: Any) -> list[tuple[str, Any]]:
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]]


def _shape(leaf: jax.Array | jax.ShapeDtypeStruct) -> dict[str, Any]:
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}


def _shape_text(array: Mapping[str, Any]) -> str:
    return f"{array['dtype']}{array['shape']}"


def _describe(state: Any) -> dict[str, dict[str, Any]]:
    """Shape, dtype and checksum of every array, by its path in the tree."""
    names, leaves = zip(*_named_leaves(state), strict=True)
    sums = jax.device_get(_checksums(leaves))
    return {
        name: {**_shape(leaf), "checksum": int(value)} for name, leaf, value in zip(names, leaves, sums, strict=True)
    }


@jax.jit
def _checksums(leaves: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """One uint32 per array: sum of (2i + 1) * word_i modulo 2^32.

    Odd weights are invertible, so any change within one word changes the sum, and wrapping addition commutes, so
    the value is the same on every mesh: computed on the devices, sharded arrays stay where they are.
    """
    return tuple(_checksum(leaf) for leaf in leaves)


def _checksum(leaf: jax.Array) -> jax.Array:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if leaf.dtype == jnp.bool_:
        words = leaf
    else:
        bits = min(leaf.dtype.itemsize * 8, 32)  # a 64-bit value becomes two words
        words = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{bits}"))
    weights = 2 * jnp.arange(words.size, dtype=jnp.uint32).reshape(words.shape) + 1
    return jnp.sum(words.astype(jnp.uint32) * weights, dtype=jnp.uint32)
