"""The stages that a cluster may run: pure functions of a sandbox and a shard, see `executor`."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from data_pipeline.executor import retried
from data_pipeline.quality import DEFAULT, QualityConfig, trace_quality
from data_pipeline.tasks.rule import Draft
from data_pipeline.teacher import Answer
from data_pipeline.validate import Drop, Verdict, validate
from srl_jax.embedding import load_embedder
from srl_jax.records import SCHEMA_VERSION, Task, TeacherRecord, Versions
from srl_jax.rewards import REWARD_VERSION
from srl_jax.sandbox.runner import Sandbox


class Embeds(Protocol):
    """What turns rationales into unit vectors, float32 [n, 384]."""

    def embed(self, texts: Sequence[str]) -> np.ndarray: ...


@dataclass(frozen=True)
class Judging:
    """The stage from answers to verdicts. `max_trace` bounds a trace's characters."""

    max_trace: int
    quality: QualityConfig = DEFAULT

    def __call__(self, sandbox: Sandbox, shard: Sequence[tuple[Draft, Answer]]) -> list[Verdict]:
        return [retried(functools.partial(self.judge, draft, answer, sandbox)) for draft, answer in shard]

    def judge(self, draft: Draft, answer: Answer, sandbox: Sandbox) -> Verdict:
        """Parsed, executed, scored; nothing is repaired. An answer that was given up keeps the reason it was for."""
        if answer.cut and answer.cut != "length":  # one that ran out of tokens is read as far as it goes: truncated
            return Verdict(f"{Drop.MALFORMED}:{answer.cut}")
        verdict = validate(draft, answer.text, sandbox, self.max_trace)
        if verdict.reason is not None:
            return verdict
        quality = trace_quality(verdict.trace, verdict.env_report, self.quality)
        return replace(verdict, quality=quality, reason=None if quality >= self.quality.threshold else Drop.LOW_QUALITY)


@dataclass(frozen=True)
class Kept:
    """A step that is worth a record."""

    task: Task
    trace: str
    think: str
    quality: float
    env_report: dict[str, object]
    teacher: str


@dataclass(frozen=True)
class Scoring:
    """The stage from kept steps to records. Without an `embedder` each process loads the pinned one, once."""

    dataset: str
    embedder: Embeds | None = None

    def __call__(self, sandbox: Sandbox | None, shard: Sequence[Kept]) -> list[TeacherRecord]:
        versions = Versions(SCHEMA_VERSION, self.dataset, REWARD_VERSION)
        embeddings = (self.embedder or _own_embedder()).embed([step.think for step in shard])
        return [
            TeacherRecord(step.task, step.trace, embedding, step.quality, step.env_report, versions, step.teacher)
            for step, embedding in zip(shard, embeddings, strict=True)
        ]


@functools.cache
def _own_embedder() -> Embeds:
    return load_embedder()
