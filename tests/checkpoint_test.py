"""Checkpoints: bit-exact, atomic under SIGKILL and a full disk, verified against silent corruption and mix-ups."""

import dataclasses
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from srl_jax import checkpoint
from srl_jax.checkpoint import Checkpointer, CheckpointError, CheckpointMeta, CheckpointMismatch
from srl_jax.compiles import count_compiles

ROOT = Path(__file__).parents[1]
META = CheckpointMeta(config="c0", tokenizer="t0", base_weights="w0", schema="s0", reward="r0")
ITERATOR = {"next_index": 7, "parents": [{"seed": 3}]}


def make_state(seed: int = 0, rank: int = 4) -> dict:
    key = jax.random.key(seed)
    lora = {
        "a": jax.random.normal(key, (3, 64, rank)),
        "b": jnp.zeros((3, rank, 64)),
        "bf16": jax.random.normal(key, (5,), jnp.bfloat16),
    }
    return {"lora": lora, "opt": optax.adamw(1e-3).init(lora), "rng": key, "step": jnp.int32(seed)}


def bits(tree: object) -> list[bytes]:
    unkeyed = [
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in jax.tree.leaves(tree)
    ]
    return [np.asarray(leaf).tobytes() for leaf in unkeyed]


def save_steps(directory: Path, *steps: int, keep: int = 3) -> None:
    with Checkpointer(directory, keep, META) as checkpointer:
        for step in steps:
            checkpointer.save(step, make_state(step), {**ITERATOR, "next_index": step})


def corrupt(step_directory: Path) -> Path:
    """Flips one bit in the middle of the largest file, the array data."""
    largest = max((p for p in step_directory.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    return largest


def test_a_prepared_save_compiles_nothing(tmp_path):
    state, other = make_state(1, rank=11), make_state(1, rank=13)  # shapes of this test alone
    with Checkpointer(tmp_path / "c", 2, META) as checkpointer:
        checkpointer.prepare(state)
        with count_compiles() as prepared:
            checkpointer.save(1, state, ITERATOR)
        with count_compiles() as unprepared:
            checkpointer.save(2, other, ITERATOR)
    assert prepared.count == 0 and unprepared.count > 0


@pytest.mark.parametrize("iterator_state", [ITERATOR, b'{"raw": "\xff\x00"}'])
def test_round_trip_is_bit_exact(tmp_path, iterator_state):
    state = make_state(5)
    state["lora"]["b"] = state["lora"]["b"].at[0, 0, :3].set(jnp.array([jnp.nan, -0.0, jnp.inf]))
    with Checkpointer(tmp_path / "c", 2, META) as checkpointer:
        assert checkpointer.latest_step() is None
        assert checkpointer.restore(state) is None
        checkpointer.save(5, state, iterator_state)
    with Checkpointer(tmp_path / "c", 2, META) as checkpointer:
        step, restored, iterator = checkpointer.restore(make_state(0))
    assert step == 5
    assert iterator == iterator_state
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert bits(restored) == bits(state)


def test_grain_iterator_goes_on_with_the_next_record(tmp_path):
    def records():
        return iter(grain.MapDataset.range(20).shuffle(seed=3).repeat().to_iter_dataset())

    iterator = records()
    for _ in range(7):
        next(iterator)
    with Checkpointer(tmp_path / "c", 1, META) as checkpointer:
        checkpointer.save(7, make_state(), iterator.get_state())
        expected = [next(iterator) for _ in range(20)]
        _, _, iterator_state = checkpointer.restore(make_state())
    resumed = records()
    resumed.set_state(iterator_state)
    assert [next(resumed) for _ in range(20)] == expected


def test_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    scramble = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    state = {"a": jax.random.normal(jax.random.key(0), (1 << 20,))}
    expected = bits(state)
    with Checkpointer(tmp_path / "c", 1, META) as checkpointer:
        checkpointer.save(1, state, ITERATOR)
        state["a"] = scramble(state["a"])
        state["a"].block_until_ready()
        _, restored, _ = checkpointer.restore(state)
    assert bits(restored) == expected


def test_only_the_newest_are_kept_and_a_saved_step_is_left_alone(tmp_path):
    save_steps(tmp_path / "c", 1, 2, 3, 4, keep=2)
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["3", "4"]
    with Checkpointer(tmp_path / "c", 2, META) as checkpointer:
        checkpointer.save(4, make_state(99), ITERATOR)  # SIGTERM right after a periodic save
        step, restored, _ = checkpointer.restore(make_state())
    assert (step, bits(restored)) == (4, bits(make_state(4)))


def test_restores_onto_another_device_layout(tmp_path):
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    state = {"a": jax.random.normal(jax.random.key(0), (3, 64, 4))}
    with Checkpointer(tmp_path / "c", 1, META) as checkpointer:
        checkpointer.save(1, state, ITERATOR)
        like = {"a": jax.ShapeDtypeStruct((3, 64, 4), jnp.float32, sharding=sharding)}
        _, restored, _ = checkpointer.restore(like)
        assert restored["a"].sharding == sharding
        assert bits(restored) == bits(state)
        checkpointer.save(2, restored, ITERATOR)  # and back
        _, back, _ = checkpointer.restore(state)
    assert bits(back) == bits(state)


@pytest.mark.parametrize("field", ["tokenizer", "base_weights", "schema", "reward"])
def test_foreign_checkpoint_is_refused_by_name(tmp_path, field):
    save_steps(tmp_path / "c", 3)
    other = dataclasses.replace(META, **{field: "other"})
    with (
        Checkpointer(tmp_path / "c", 3, other) as checkpointer,
        pytest.raises(CheckpointMismatch, match=rf"c/3: {field} is '.0' in the checkpoint but 'other' now; \w+"),
    ):
        checkpointer.restore(make_state())
    assert (tmp_path / "c" / "3").is_dir()  # refused, not condemned


def test_other_shapes_are_refused_by_the_array_that_differs(tmp_path):
    save_steps(tmp_path / "c", 3)
    with (
        Checkpointer(tmp_path / "c", 3, META) as checkpointer,
        pytest.raises(
            CheckpointMismatch, match=r"\['lora'\]\['a'\] is 'float32\[3, 64, 4\]'.*'float32\[3, 64, 8\]'.*config.lora"
        ),
    ):
        checkpointer.restore(make_state(rank=8))


def test_changed_config_is_logged_not_refused(tmp_path, caplog):
    save_steps(tmp_path / "c", 3)
    with Checkpointer(tmp_path / "c", 3, dataclasses.replace(META, config="c1")) as checkpointer:
        assert checkpointer.restore(make_state())[0] == 3
    assert "another configuration" in caplog.text


def test_flipped_bit_falls_back_to_the_checkpoint_before(tmp_path, caplog):
    directory = tmp_path / "c"
    save_steps(directory, 1, 2)
    corrupt(directory / "2")
    with Checkpointer(directory, 3, META) as checkpointer:
        step, restored, iterator = checkpointer.restore(make_state())
        assert (step, bits(restored), iterator["next_index"]) == (1, bits(make_state(1)), 1)
        assert "checkpoint 2 is unusable" in caplog.text
        checkpointer.save(2, make_state(2), ITERATOR)  # the number is free again
        assert checkpointer.restore(make_state())[0] == 2
    assert sorted(p.name for p in directory.iterdir()) == ["1", "2", "2.corrupt"]


@pytest.mark.parametrize("damage", ["truncate", "remove", "meta", "iterator"])
# Orbax drops the sibling reads of one that failed without awaiting them.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
def test_damaged_files_fall_back(tmp_path, damage):
    directory = tmp_path / "c"
    save_steps(directory, 1, 2)
    if damage in ("meta", "iterator"):
        (directory / "2" / damage / "metadata").write_text('{"format": "srl-che')
    else:
        largest = corrupt(directory / "2")
        if damage == "remove":
            largest.unlink()
        else:
            os.truncate(largest, 100)
    with Checkpointer(directory, 3, META) as checkpointer:
        assert checkpointer.restore(make_state())[0] == 1
    gc.collect()  # so that those coroutines are reported here and not in some later test


def test_what_another_host_cannot_read_is_taken_by_none(tmp_path, monkeypatch, caplog):
    save_steps(tmp_path / "c", 1, 2)
    others = iter([1, 0])  # of the newest, then of the one before
    monkeypatch.setattr(checkpoint.hosts, "greatest", lambda mine: max(mine, next(others)))
    with Checkpointer(tmp_path / "c", 3, META) as checkpointer:
        step, restored, _ = checkpointer.restore(make_state())
    assert (step, bits(restored)) == (1, bits(make_state(1)))
    assert (tmp_path / "c" / "2.corrupt").is_dir() and "another host cannot read its part" in caplog.text


def test_nothing_usable_is_an_error_not_a_fresh_start(tmp_path):
    save_steps(tmp_path / "c", 1, 2)
    for step in ("1", "2"):
        corrupt(tmp_path / "c" / step)
    with Checkpointer(tmp_path / "c", 3, META) as checkpointer, pytest.raises(CheckpointError, match=r"\[1, 2\]"):
        checkpointer.restore(make_state())


def test_reader_beside_a_trainer_moves_nothing(tmp_path):
    directory = tmp_path / "c"
    save_steps(directory, 1, 2)
    corrupt(directory / "2")
    (directory / "3.orbax-checkpoint-tmp").mkdir()  # the trainer's save in flight
    with Checkpointer(directory, 3, META, read_only=True) as reader:
        assert reader.restore(make_state())[0] == 1
    assert sorted(p.name for p in directory.iterdir()) == ["1", "2", "3.orbax-checkpoint-tmp"]


_CHILD = """
import json, sys
import jax, jax.numpy as jnp
from tests.checkpoint_test import META, ITERATOR
from srl_jax.checkpoint import Checkpointer, CheckpointError
directory, keep, sizes = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
checkpointer = Checkpointer(directory, keep, META)
for step, size in enumerate(sizes, start=1):
    state = {"a": jax.random.normal(jax.random.key(step), (size,))}
    try:
        checkpointer.save(step, state, ITERATOR)
        checkpointer.wait()
        print("saved", step, flush=True)
    except CheckpointError as error:
        print("error", error, flush=True)
"""


def child_command(directory: Path, keep: int, sizes: list[int]) -> list[str]:
    return [sys.executable, "-c", _CHILD, str(directory), str(keep), json.dumps(sizes)]


def restore_one(directory: Path) -> tuple[int, bytes]:
    with Checkpointer(directory, 1, META) as checkpointer:
        step = checkpointer.latest_step()
        size = {1: 1000, 2: 20_000_000}[step]
        _, state, _ = checkpointer.restore({"a": jax.ShapeDtypeStruct((size,), jnp.float32)})
    return step, np.asarray(state["a"]).tobytes()


def test_sigkill_during_a_save_leaves_the_one_before(tmp_path):
    directory = tmp_path / "c"
    process = subprocess.Popen(
        child_command(directory, 1, [1000, 20_000_000]), stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    deadline = time.monotonic() + 120
    while not (partial := list(directory.glob("2.orbax-checkpoint-tmp*"))) and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert partial, "the second save was never seen under way"
    assert restore_one(directory) == (1, np.asarray(jax.random.normal(jax.random.key(1), (1000,))).tobytes())
    deadline = time.monotonic() + 30  # Orbax clears up in the background
    while list(directory.glob("*tmp*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not list(directory.glob("*tmp*"))  # what the killed save left is gone


def assert_earlier_checkpoint_survives(output: str, directory: Path, reason: str) -> None:
    lines = output.splitlines()
    assert lines[0] == "saved 1"
    assert lines[1].startswith(f"error {directory}: saving step 2 failed: ")
    assert reason in lines[1]
    assert "checkpoint 1 is untouched" in lines[1]
    assert lines[2] == "saved 3"  # the freed space is enough for a small one
    assert not list(directory.glob("*tmp*"))


def test_refused_write_is_one_error_and_the_earlier_checkpoint_stays(tmp_path):
    directory = tmp_path / "c"
    command = child_command(directory, 1, [1000, 400_000, 1000])
    limited = "import os, resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (500_000,) * 2); "
    limited += "os.execv(sys.argv[1], sys.argv[1:])"
    # The compilation cache is off: its own files would run into the limit as well.
    environment = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    result = subprocess.run(
        [sys.executable, "-c", limited, *command],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=ROOT,
        env=environment,
    )
    assert_earlier_checkpoint_survives(result.stdout, directory, "File too large")


def test_full_disk_is_one_error_and_the_earlier_checkpoint_stays(tmp_path):
    namespace = ["unshare", "--user", "--map-root-user", "--mount"]
    mount = f"mount -t tmpfs -o size=1m none {tmp_path}"
    if not shutil.which("unshare") or subprocess.run([*namespace, "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("no permission to mount a small file system in a namespace of our own")
    directory = tmp_path / "c"
    result = subprocess.run(
        [
            *namespace,
            "sh",
            "-c",
            f'{mount} && "$@" && ls {directory}',
            "sh",
            *child_command(directory, 1, [1000, 400_000, 1000]),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=ROOT,
    )
    assert_earlier_checkpoint_survives(
        result.stdout, directory, "the disk is full; free space or lower config.checkpoint.keep"
    )
    assert result.stdout.splitlines()[3:] == ["3"]


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=9), st.integers(0, 8), st.integers(0, 31))
def test_checksum_sees_every_flipped_bit(words, index, bit):
    array = np.array(words + [0] * (9 - len(words)), np.uint32).reshape(3, 3)
    flipped = array.copy()
    flipped[index // 3, index % 3] ^= np.uint32(1 << bit)
    before, after = checkpoint._checksums((jnp.asarray(array), jnp.asarray(flipped)))
    assert int(before) != int(after)
    assert int(before) == sum((2 * i + 1) * int(word) for i, word in enumerate(array.ravel())) % 2**32
