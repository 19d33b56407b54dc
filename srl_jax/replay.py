"""Stored rollouts (records of kind B): written beside a live run, read back by Grain alone.

One ArrayRecord file a step, written by a thread while the next step samples, each put in its place whole. A run that
was killed and goes on writes the same steps anew, with the same content.
"""

import os
import queue
import re
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import grain
import numpy as np
from array_record.python import array_record_module
from array_record.python.array_record_data_source import ArrayRecordDataSource

from srl_jax.records import (
    SCHEMA_VERSION,
    CorruptRecord,
    ReplayGroup,
    SamplerSettings,
    TeacherRecord,
    Versions,
    decode_replay,
    encode_replay,
)
from srl_jax.rewards import REWARD_VERSION

_FILE = re.compile(r"step-\d{8}\.arrayrecord")
_WAITING = 4  # steps that may wait for the disk before the run waits too


class ReplayError(ValueError):
    """Stored rollouts that cannot be trained on; the message names the directory or field and the remedy."""


def stored_group(
    record: TeacherRecord,
    arrays: Mapping[str, np.ndarray],
    rewards: np.ndarray,
    valid: np.ndarray,
    malformed: np.ndarray,
    *,
    policy_version: str,
    policy_step: int,
    tokenizer: str,
    sampler: SamplerSettings,
) -> ReplayGroup:
    """One group as it is stored. `arrays` are its prompt_tokens [Lp], prompt_lengths, and tokens, mask, logprobs and
    grammar_states [G, T]; `rewards`, `valid` (scored) and `malformed` are [G]."""
    return ReplayGroup(
        task_id=record.task.task_id,
        slice=record.task.slice,
        prompt_ids=arrays["prompt_tokens"][: int(arrays["prompt_lengths"])],
        completion_ids=arrays["tokens"],
        completion_mask=arrays["mask"] & valid[:, None],
        sampler_logprobs=arrays["logprobs"],
        grammar_states=arrays["grammar_states"],
        rewards=np.where(valid, rewards, 0.0).astype(np.float32),
        malformed=malformed,
        policy_version=policy_version,
        policy_step=policy_step,
        tokenizer=tokenizer,
        sampler=sampler,
        versions=Versions(SCHEMA_VERSION, record.versions.dataset, REWARD_VERSION),
    )


class ReplayWriter:
    """Writes steps into `directory` in the background. A context manager; leaving it waits for the disk.

    An error of the disk is raised by the next `add`, or on leaving.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self._directory = Path(directory)
        self._queue: queue.Queue[tuple[int, Sequence[ReplayGroup]] | None] = queue.Queue(_WAITING)
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._work, name="replay-writer", daemon=True)

    def __enter__(self) -> Self:
        self._directory.mkdir(parents=True, exist_ok=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._queue.put(None)
        self._thread.join()
        if kind is None:
            self._raise()

    def add(self, step: int, groups: Sequence[ReplayGroup]) -> None:
        """Hands one step's groups over; waits only when the disk is several steps behind."""
        self._raise()
        self._queue.put((step, groups))

    def wait(self) -> None:
        """Blocks until everything handed over is on disk."""
        self._queue.join()
        self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            try:
                if self._error is None:  # after an error steps are taken and left, so that nobody waits for ever
                    self._write(*item)
            except Exception as error:  # carried to the training thread, which raises it
                self._error = error
            finally:
                self._queue.task_done()

    def _write(self, step: int, groups: Sequence[ReplayGroup]) -> None:
        path = self._directory / f"step-{step:08d}.arrayrecord"
        temporary = path.with_suffix(".tmp")
        encoded = [encode_replay(group) for group in groups]
        try:
            writer = array_record_module.ArrayRecordWriter(str(temporary), "group_size:1")
            for data in encoded:
                writer.write(data)
            writer.close()
        except RuntimeError as error:  # how this library tells what the disk refused
            reason = str(error).partition("\n")[0][:300]
            raise ReplayError(f"{path} cannot be written: {reason}; free space and run it again") from error
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)


class _Source:
    """Random access to every stored group, in the order recorded."""

    def __init__(self, directory: Path) -> None:
        paths = sorted(path for path in directory.glob("*.arrayrecord") if _FILE.fullmatch(path.name))
        if not paths:
            raise ReplayError(
                f"{directory} holds no step-<number>.arrayrecord; give config.replay.dir the replay directory of a "
                "run with config.replay.record=True"
            )
        self._directory = directory
        try:
            self._records = ArrayRecordDataSource([str(path) for path in paths])
        except (RuntimeError, ValueError, OSError) as error:  # a damaged container, known by its own checksums
            raise ReplayError(f"{directory}: a file is damaged ({error}); record the run again") from error

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> ReplayGroup:
        try:
            return decode_replay(self._records[index])
        except (CorruptRecord, RuntimeError, ValueError) as error:
            raise ReplayError(f"{self._directory}: group {index} cannot be read: {error}") from error


def replay_stream(directory: str | os.PathLike[str], *, shuffle: bool, seed: int) -> Any:
    """An endless Grain iterator of `ReplayGroup`s with `get_state()` and `set_state(state)`.

    In the order recorded, or shuffled anew in every pass. Raises `ReplayError` where nothing is stored, or what is
    stored cannot be read.
    """
    groups = grain.MapDataset.source(_Source(Path(directory))).seed(seed)
    groups = groups.shuffle() if shuffle else groups
    return iter(groups.repeat().to_iter_dataset(grain.ReadOptions(num_threads=4, prefetch_buffer_size=64)))
