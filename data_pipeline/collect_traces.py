"""Asks teachers for traces: concurrently, each task once for ever, every word and every cent accounted for.

An answer is stored before it is used, under a key made of the teacher's fingerprint and the very request. A run that
was killed asks only what it has no answer to; a changed prompt or decoding is another question.
"""

import dataclasses
import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.raw_store import RawStore
from data_pipeline.tasks.rule import Draft
from data_pipeline.teacher import Answer, NoAnswer, OracleTeacher, Teacher, TeacherMix
from data_pipeline.teacher_config import load_teacher_config

_FIELDS = {field.name for field in dataclasses.fields(Answer)}


class Collector:
    """A mix of teachers with the store of what they said; a context manager.

    Without a store (free teachers, tests) nothing is kept. `max_cost_usd` counts what this collector spends; reaching
    it raises DataError, as does a teacher that asking on makes no sense of. All that was answered stays stored.
    """

    def __init__(self, mix: TeacherMix, store: RawStore | None = None, max_cost_usd: float = 0.0) -> None:
        self._mix, self._store, self._max_cost = mix, store, max_cost_usd
        self._spent = 0.0
        self._exit = ExitStack()

    @property
    def name(self) -> str:
        return self._mix.name

    @property
    def teachers(self) -> Sequence[Teacher]:
        return self._mix.teachers

    def __enter__(self) -> "Collector":
        if self._store is not None:
            self._exit.enter_context(self._store)
        return self

    def __exit__(self, *exception: object) -> None:
        self._exit.close()

    def collect(self, drafts: Sequence[Draft]) -> Iterator[Answer | NoAnswer]:
        """The answer to every draft, in order; `NoAnswer` where a teacher gave none after all attempts."""
        with ExitStack() as pools:
            pool_of: dict[str, ThreadPoolExecutor] = {}
            for teacher in self._mix.teachers:
                pool = ThreadPoolExecutor(teacher.concurrency)
                pools.callback(pool.shutdown, wait=True, cancel_futures=True)
                pool_of[teacher.version] = pool
            waiting: list[Future[Answer | NoAnswer]] = []
            for draft in drafts:
                teacher = self._mix.choose(draft)
                waiting.append(pool_of[teacher.version].submit(self._ask, teacher, draft))
            for future in waiting:
                yield future.result()

    def _ask(self, teacher: Teacher, draft: Draft) -> Answer | NoAnswer:
        key = hashlib.sha256(f"{teacher.version}\n{draft.task.task_id}\n{teacher.request(draft)}".encode()).hexdigest()
        stored = self._store.get(key) if self._store is not None else None
        if stored is not None:
            return Answer(**{name: value for name, value in stored.items() if name in _FIELDS})
        if self._max_cost and self._spent >= self._max_cost:
            raise DataError(
                f"max_cost_usd {self._max_cost:g} is spent; what was answered is kept, raise it and run again"
            )
        line = {"task_id": draft.task.task_id, "slice": draft.task.slice}
        try:
            answer = teacher.answer(draft)
        except NoAnswer as failure:
            self._spent += failure.cost_usd
            if self._store is not None:
                self._store.add(key, {**line, **vars(failure)}, failed=True)
            return failure
        self._spent += answer.cost_usd
        if self._store is not None:
            self._store.add(key, {**line, **dataclasses.asdict(answer)})
        return answer


def open_collector(config_path: str | Path | None, store_folder: str | Path | None) -> Collector:
    """The teachers of a YAML file, by default the oracle alone. Paid answers need a folder to be kept in."""
    if config_path is None:
        return Collector(TeacherMix([OracleTeacher()], [1.0]), RawStore(Path(store_folder)) if store_folder else None)
    config = load_teacher_config(Path(config_path))
    if store_folder is None:
        raise DataError("a teacher's answers are kept for ever; give the folder for them with --store")
    # Here: the client takes a second to import, and the oracle needs none.
    from data_pipeline.endpoint import EndpointTeacher
    from data_pipeline.paraphrase import ParaphrasingTeacher

    endpoints = {spec.name: EndpointTeacher(config, spec) for spec in config.teachers if spec.kind == "openai"}
    used = [spec for spec in config.teachers if spec.weight > 0]
    teachers: list[Teacher] = [endpoints.get(spec.name) or OracleTeacher() for spec in used]
    if config.paraphrase is not None:
        writer, share = endpoints[config.paraphrase.teacher], config.paraphrase.share
        teachers = [ParaphrasingTeacher(teacher, writer, share) for teacher in teachers]
    mix = TeacherMix(teachers, [spec.weight for spec in used], config.seed)
    return Collector(mix, RawStore(Path(store_folder)), config.max_cost_usd)


class Spending:
    """Per teacher what its answers and failures took: how many, attempts, tokens, US dollars."""

    _NUMBERS = ("attempts", "prompt_tokens", "completion_tokens", "wasted_tokens", "cost_usd")

    def __init__(self) -> None:
        self._totals: dict[str, Counter[str]] = defaultdict(Counter)

    def add(self, teacher: str, outcome: Answer | NoAnswer | Mapping[str, Any]) -> None:
        """Counts an outcome, or the stored line of one."""
        values = outcome if isinstance(outcome, Mapping) else vars(outcome)
        own = self._totals[teacher]
        own["answers" if "text" in values else "failures"] += 1
        for name in self._NUMBERS:
            own[name] += values.get(name, 0)

    def to_dict(self) -> dict[str, dict[str, float]]:
        return {
            teacher: {name: round(value, 9) for name, value in sorted(own.items())}
            for teacher, own in sorted(self._totals.items())
        }


def spending(store: RawStore) -> dict[str, dict[str, float]]:
    """What everything in a store took."""
    spent = Spending()
    for line in [*store.answers(), *store.failures()]:
        spent.add(line["teacher"], line)
    return spent.to_dict()
