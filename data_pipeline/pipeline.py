"""From the catalogue to a data set on disk: tasks -> teacher -> validate -> quality -> write.

Every stage works on whole lists in a fixed order and every random choice hangs on the seed and the rule's name, so
the same seed gives the same bytes whatever the number of workers.
"""

import dataclasses
import itertools
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from data_pipeline.config import DataSetConfig, validate
from data_pipeline.offers import generated_drafts, quotas, real_candidates
from data_pipeline.quality import THRESHOLD, trace_quality
from data_pipeline.splits import SPLITS, split_rules
from data_pipeline.tasks.catalogue import CATALOGUE
from data_pipeline.tasks.generated import RUNNERS
from data_pipeline.tasks.real import default_roots, real_draft, source_files
from data_pipeline.tasks.rule import Draft, Rule
from data_pipeline.teacher import OracleTeacher, Teacher
from data_pipeline.validate import Drop, Verdict
from data_pipeline.validate import validate as check_step
from data_pipeline.write import FORMAT, begin, commit, file_entry, write_raw, write_shards
from srl_jax.embedding import load_embedder
from srl_jax.records import SCHEMA_VERSION, TeacherRecord, Versions
from srl_jax.rewards import REWARD_VERSION
from srl_jax.sandbox.isolation import SandboxCrash
from srl_jax.sandbox.runner import Sandbox, SandboxConfig

# Generated tasks cost nothing until they are executed; some are dropped (too long, duplicate), so more are offered.
OFFERED = 5
# The sandbox may be killed from outside, which says nothing about the step.
ATTEMPTS = 3
T = TypeVar("T")
R = TypeVar("R")


class Embeds(Protocol):
    """What turns rationales into unit vectors, float32 [n, 384]."""

    def embed(self, texts: Sequence[str]) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Step:
    """A teacher's step on its way through the stages."""

    draft: Draft
    text: str
    verdict: Verdict


class Rejections:
    """Counts of dropped steps: slice -> reason -> number."""

    def __init__(self) -> None:
        self._counts: dict[str, Counter[str]] = defaultdict(Counter)

    def add(self, slice_name: str, reason: str) -> None:
        self._counts[slice_name][reason] += 1

    def to_dict(self) -> dict[str, dict[str, int]]:
        return {name: dict(sorted(counts.items())) for name, counts in sorted(self._counts.items())}


class Run:
    """The stages with what they share: sandbox, threads, progress, counts."""

    def __init__(self, config: DataSetConfig, sandbox: Sandbox, teacher: Teacher, progress: Progress) -> None:
        self.config, self.sandbox, self.teacher, self.progress = config, sandbox, teacher, progress
        self.languages = [name for name in config.languages if RUNNERS.get(name, "unittest") in sandbox.runners]
        self.rejections = Rejections()
        self.raw: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
        self._seen: set[tuple[str, ...]] = set()

    def each(self, title: str, action: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
        """`action` over `items` on the workers, results in order, with a progress bar."""
        if not items:
            return
        task = self.progress.add_task(title, total=len(items))
        with ThreadPoolExecutor(self.config.workers) as pool:
            for result in pool.map(action, items):
                self.progress.advance(task)
                yield result

    def real_drafts(
        self, language: str, rules: Mapping[str, Sequence[Rule]], wanted: Mapping[str, int]
    ) -> dict[str, list[Draft]]:
        """split -> tasks from real code of `language`."""
        config, drafts = self.config, {}
        chosen = config.python_roots if language == "python" else config.javascript_roots
        roots = [Path(root) for root in chosen] or default_roots(language)
        rng = random.Random(f"{config.seed}/{language}/files")
        own = {split: [rule for rule in group if rule.language == language] for split, group in rules.items()}
        task = self.progress.add_task(f"read {language}", total=config.max_files)
        files = self._counted(source_files(roots, language, rng, config.max_files), task)
        found = real_candidates(own, wanted, files)
        self.progress.update(task, total=self.progress.tasks[task].completed)
        for split, candidates in found.items():
            made = self.each(
                f"real {language} {split}",
                lambda numbered: retried(
                    lambda: real_draft(*numbered[1], numbered[0], config.seed, self.sandbox.apply, config.max_excerpt)
                ),
                list(enumerate(candidates)),
            )
            drafts[split] = []
            for draft in made:
                if isinstance(draft, str):
                    self.rejections.add(f"{language}/real", f"no_task:{draft}")
                else:
                    drafts[split].append(draft)
        return drafts

    def _counted(self, items: Iterable[T], task: TaskID) -> Iterator[T]:
        for item in items:
            self.progress.advance(task)
            yield item

    def steps(self, split: str, slice_name: str, drafts: Iterable[Draft], wanted: int) -> list[Step]:
        """Validated steps, `wanted` of them unless `drafts` end first; all the teacher said is kept in `raw`."""
        offered, kept = iter(drafts), []
        while len(kept) < wanted:
            batch = list(itertools.islice(offered, wanted - len(kept)))
            if not batch:
                break
            batch = [draft for draft in batch if self._is_new(draft)]
            for step in self.each(f"check {slice_name} {split}", self._judge, batch):
                reason = step.verdict.reason
                if reason is None:
                    kept.append(step)
                else:
                    self.rejections.add(slice_name, reason)
                self.raw[split].append(
                    {"task_id": step.draft.task.task_id, "slice": slice_name, "text": step.text, "rejected": reason}
                )
        return kept

    def _judge(self, draft: Draft) -> Step:
        text = self.teacher.write(draft)
        return retried(lambda: Step(draft, text, check_step(draft, text, self.sandbox, self.config.max_trace)))

    def _is_new(self, draft: Draft) -> bool:
        # Not the path: packages ship the same file twice (commonjs and esm).
        key = (draft.rule.name, *(file.text for file in draft.task.context))
        if key in self._seen:
            self.rejections.add(draft.task.slice, Drop.DUPLICATE)
            return False
        self._seen.add(key)
        return True

    def records(self, slice_name: str, steps: Sequence[Step], embedder: Embeds) -> list[TeacherRecord]:
        """Scored records of the steps that reach the quality threshold."""
        versions = Versions(SCHEMA_VERSION, self.config.tag, REWARD_VERSION)
        embeddings = embedder.embed([step.verdict.trace.think for step in steps])
        records = []
        for step, embedding in zip(steps, embeddings, strict=True):
            report = step.verdict.env_report
            quality = trace_quality(step.verdict.trace, report)
            if quality < THRESHOLD:
                self.rejections.add(slice_name, Drop.LOW_QUALITY)
            else:
                records.append(
                    TeacherRecord(step.draft.task, step.text, embedding, quality, report, versions, self.teacher.name)
                )
        return records

    def all_steps(self, rules: Mapping[str, Sequence[Rule]]) -> dict[tuple[str, str], list[Step]]:
        """(split, slice) -> kept steps. Training comes first, so that a duplicate is dropped from what is held out."""
        wanted, config = quotas(self.config), self.config
        real = {
            language: self.real_drafts(language, rules, {split: wanted[split, f"{language}/real"] for split in SPLITS})
            for language in self.languages
        }
        steps = {}
        for split, language in itertools.product(SPLITS, self.languages):
            own = [rule for rule in rules[split] if rule.language == language]
            generated, found = f"{language}/generated", f"{language}/real"
            offered = generated_drafts(own, OFFERED * wanted[split, generated], config.seed, config.max_excerpt)
            steps[split, generated] = self.steps(split, generated, offered, wanted[split, generated])
            steps[split, found] = self.steps(split, found, real[language][split], wanted[split, found])
        return steps

    def write_records(
        self, folder: Path, steps: Mapping[tuple[str, str], Sequence[Step]], embedder: Embeds
    ) -> dict[str, dict[str, Any]]:
        """Scores and writes every slice that has records; split -> slice -> the manifest's entry."""
        wanted, entries = quotas(self.config), {split: {} for split in SPLITS}
        task = self.progress.add_task("embed rationales", total=sum(map(len, steps.values())))
        for (split, slice_name), kept in steps.items():
            records = self.records(slice_name, kept, embedder)
            self.progress.advance(task, len(kept))
            if records:
                shards = write_shards(folder / split, slice_name, records, self.config.records_per_shard)
                counts = {"records": len(records), "wanted": wanted[split, slice_name]}
                entries[split][slice_name] = {**counts, "shards": shards}
        return entries

    def write_raw_output(self, folder: Path) -> list[dict[str, Any]]:
        """Writes what the teacher said, kept or not; the manifest's entries."""
        entries = []
        for split, lines in self.raw.items():
            path = folder / "raw" / f"{split}.jsonl.gz"
            write_raw(path, lines)
            entries.append({**file_entry(path, folder), "records": len(lines)})
        return entries


def prepare(
    config: DataSetConfig, out: Path, *, teacher: Teacher | None = None, embedder: Embeds | None = None
) -> dict[str, Any]:
    """Builds the data set in `out` and returns its manifest.

    Raises DataError for a bad configuration or target, SandboxUnavailable where nothing can be executed safely. A
    language whose tests this machine cannot run is left out and named in the manifest.
    """
    validate(config)
    rules = split_rules([rule for rule in CATALOGUE if rule.language in config.languages], config.seed)
    partial = begin(out)
    columns = (TextColumn("{task.description:<32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Sandbox(SandboxConfig(slots=config.workers)) as sandbox, Progress(*columns) as progress:
        run = Run(config, sandbox, teacher or OracleTeacher(), progress)
        steps = run.all_steps(rules)
        entries = run.write_records(partial, steps, embedder or load_embedder())
        manifest = {
            "format": FORMAT,
            "schema": SCHEMA_VERSION,
            "reward": REWARD_VERSION,
            "dataset": config.tag,
            "teacher": run.teacher.name,
            "seed": config.seed,
            "config": _plain_config(config),
            "languages_left_out": sorted(set(config.languages) - set(run.languages)),
            "splits": {
                split: {"rules": [rule.name for rule in rules[split]], "slices": entries[split]} for split in SPLITS
            },
            "rejections": run.rejections.to_dict(),
            "raw": run.write_raw_output(partial),
            "tools": sandbox.versions,
        }
    commit(partial, out, manifest)
    return manifest


def retried(action: Callable[[], R]) -> R:
    """`action()`, up to `ATTEMPTS` times while the sandbox itself crashes."""
    for _ in range(ATTEMPTS - 1):
        try:
            return action()
        except SandboxCrash:
            continue
    return action()


def _plain_config(config: DataSetConfig) -> dict[str, Any]:
    """What decides the bytes, as JSON data: everything but the number of workers."""
    values = {key: value for key, value in dataclasses.asdict(config).items() if key != "workers"}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
