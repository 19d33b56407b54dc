"""From the catalogue to a data set on disk: tasks -> teacher -> validate -> quality -> write.

Every stage works on whole lists in a fixed order and every random choice hangs on the seed and the rule's name, so
the same seed gives the same bytes whatever the number of workers.
"""

import dataclasses
import itertools
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from data_pipeline.config import DataSetConfig, validate
from data_pipeline.quality import THRESHOLD, trace_quality
from data_pipeline.splits import SPLITS, split_rules
from data_pipeline.tasks.catalogue import CATALOGUE
from data_pipeline.tasks.generated import generate
from data_pipeline.tasks.real import default_roots, real_draft, source_files
from data_pipeline.tasks.rule import Draft, Rule
from data_pipeline.teacher import OracleTeacher, Teacher
from data_pipeline.validate import Drop, Verdict
from data_pipeline.validate import validate as check_step
from data_pipeline.write import FORMAT, begin, commit, file_entry, write_raw, write_shards
from srl_jax.embedding import load_embedder
from srl_jax.records import SCHEMA_VERSION, SourceFile, TeacherRecord, Versions
from srl_jax.rewards import REWARD_VERSION
from srl_jax.sandbox.runner import Sandbox, SandboxConfig

# Generated tasks cost nothing until they are executed; some are dropped (too long, duplicate), so more are offered.
OFFERED = 5
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


def quotas(config: DataSetConfig) -> dict[tuple[str, str], int]:
    """(split, slice) -> records wanted; languages share a split evenly, the first ones taking the remainder."""
    wanted = {}
    for split in SPLITS:
        total, count = getattr(config, split), len(config.languages)
        for position, language in enumerate(config.languages):
            share = total // count + (position < total % count)
            real = round(share * config.real_share)
            wanted[split, f"{language}/generated"] = share - real
            wanted[split, f"{language}/real"] = real
    return wanted


def generated_drafts(rules: Sequence[Rule], count: int, seed: int, max_excerpt: int) -> Iterator[Draft]:
    """At most `count` generated tasks, going round the rules that have scenes."""
    usable = [rule for rule in rules if rule.scenes]
    for index in range(count if usable else 0):
        yield generate(usable[index % len(usable)], index // len(usable), seed, max_excerpt)


def real_candidates(
    rules: Mapping[str, Sequence[Rule]], wanted: Mapping[str, int], files: Iterable[tuple[str, str]]
) -> dict[str, list[tuple[Rule, str, str]]]:
    """split -> (rule, path, text) whose hint matches; no rule gets more than three times its even share."""
    found: dict[str, list[tuple[Rule, str, str]]] = {split: [] for split in rules}
    hints = {
        split: [(rule, re.compile(rule.real, re.M)) for rule in group if rule.real] for split, group in rules.items()
    }
    taken: Counter[str] = Counter()
    for path, text in files:
        for split, group in hints.items():
            limit = max(2, 3 * wanted[split] // max(1, len(group)))
            for rule, hint in group:
                if len(found[split]) < 2 * wanted[split] and taken[rule.name] < limit and hint.search(text):
                    taken[rule.name] += 1
                    found[split].append((rule, path, text))
                    break  # one task a file: near-duplicates teach nothing
        if all(len(found[split]) >= 2 * wanted[split] for split in rules):
            break
    return found


class Run:
    """The stages with what they share: sandbox, threads, progress, counts."""

    def __init__(self, config: DataSetConfig, sandbox: Sandbox, teacher: Teacher, progress: Progress) -> None:
        self.config, self.sandbox, self.teacher, self.progress = config, sandbox, teacher, progress
        self.rejections = Rejections()
        self.raw: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
        self._seen: set[tuple[str, tuple[SourceFile, ...]]] = set()

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
                lambda numbered: real_draft(
                    *numbered[1], numbered[0], config.seed, self.sandbox.apply, config.max_excerpt
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
        return Step(draft, text, check_step(draft, text, self.sandbox, self.config.max_trace))

    def _is_new(self, draft: Draft) -> bool:
        key = (draft.task.instruction, draft.task.context)
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
            quality = trace_quality(step.verdict.trace, step.verdict.env_report)
            if quality < THRESHOLD:
                self.rejections.add(slice_name, Drop.LOW_QUALITY)
                continue
            records.append(
                TeacherRecord(
                    step.draft.task, step.text, embedding, quality, step.verdict.env_report, versions, self.teacher.name
                )
            )
        return records


def prepare(
    config: DataSetConfig, out: Path, *, teacher: Teacher | None = None, embedder: Embeds | None = None
) -> dict[str, Any]:
    """Builds the data set in `out` and returns its manifest. DataError for a bad configuration or target."""
    validate(config)
    teacher = teacher or OracleTeacher()
    rules = split_rules([rule for rule in CATALOGUE if rule.language in config.languages], config.seed)
    partial = begin(out)
    wanted = quotas(config)
    columns = (TextColumn("{task.description:<32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Sandbox(SandboxConfig(slots=config.workers)) as sandbox, Progress(*columns) as progress:
        run = Run(config, sandbox, teacher, progress)
        languages = [language for language in config.languages if _runner(language) in sandbox.runners]
        missing = sorted(set(config.languages) - set(languages))
        real = {
            language: run.real_drafts(language, rules, {split: wanted[split, f"{language}/real"] for split in SPLITS})
            for language in languages
        }
        steps: dict[tuple[str, str], list[Step]] = {}
        for split, language in itertools.product(SPLITS, languages):
            own = [rule for rule in rules[split] if rule.language == language]
            number = wanted[split, f"{language}/generated"]
            drafts = {
                f"{language}/generated": generated_drafts(own, OFFERED * number, config.seed, config.max_excerpt),
                f"{language}/real": real[language][split],
            }
            for slice_name, candidates in drafts.items():
                steps[split, slice_name] = run.steps(split, slice_name, candidates, wanted[split, slice_name])
        embedder = embedder or load_embedder()
        task = progress.add_task("embed rationales", total=sum(map(len, steps.values())))
        splits: dict[str, Any] = {
            split: {"rules": [rule.name for rule in rules[split]], "slices": {}} for split in SPLITS
        }
        for (split, slice_name), kept in steps.items():
            records = run.records(slice_name, kept, embedder)
            progress.advance(task, len(kept))
            if records:
                shards = write_shards(partial / split, slice_name, records, config.records_per_shard)
                splits[split]["slices"][slice_name] = {
                    "records": len(records), "wanted": wanted[split, slice_name], "shards": shards
                }  # fmt: skip
        raw = []
        for split, lines in run.raw.items():
            path = partial / "raw" / f"{split}.jsonl.gz"
            write_raw(path, lines)
            raw.append({**file_entry(path, partial), "records": len(lines)})
        manifest = {
            "format": FORMAT,
            "schema": SCHEMA_VERSION,
            "reward": REWARD_VERSION,
            "dataset": config.tag,
            "teacher": teacher.name,
            "seed": config.seed,
            "config": _plain_config(config),
            "languages_left_out": missing,
            "splits": splits,
            "rejections": run.rejections.to_dict(),
            "raw": raw,
            "tools": sandbox.versions,
        }
    commit(partial, out, manifest)
    return manifest


def _plain_config(config: DataSetConfig) -> dict[str, Any]:
    """What decides the bytes, as JSON data: everything but the number of workers."""
    values = {key: value for key, value in dataclasses.asdict(config).items() if key != "workers"}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def _runner(language: str) -> str:
    return "unittest" if language == "python" else "node"
