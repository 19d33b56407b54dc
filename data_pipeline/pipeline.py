"""From the catalogue to a data set on disk: tasks -> teacher -> validate -> quality -> write.

Every stage works on whole lists in a fixed order and every random choice hangs on the seed and the rule's name, so
the same seed gives the same bytes whatever the number of workers and wherever they are.
"""

import dataclasses
import json
import logging
import random
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from data_pipeline.collect_traces import Collector, Spending, open_collector
from data_pipeline.config import DataSetConfig, validate
from data_pipeline.corpus import corpus_root
from data_pipeline.drift import Tally, compare
from data_pipeline.duplicates import NearDuplicates
from data_pipeline.errors import DataError
from data_pipeline.executor import Executor, cut, open_executor, retried
from data_pipeline.journal import Journal
from data_pipeline.limits import open_sandbox
from data_pipeline.offers import episode_drafts, generated_drafts, quotas, real_candidates
from data_pipeline.quality import DEFAULT as QUALITY
from data_pipeline.splits import SPLITS, split_repositories, split_rules
from data_pipeline.stages import Embeds, Judging, Scoring
from data_pipeline.steps import Step, kept_step, raw_line, step_of
from data_pipeline.tasks.catalogue import CATALOGUE
from data_pipeline.tasks.generated import RUNNERS
from data_pipeline.tasks.imported import read_user_tasks
from data_pipeline.tasks.real import default_roots, find_files, read_files, real_draft
from data_pipeline.tasks.rule import Draft, Rule
from data_pipeline.teacher import Answer, NoAnswer, OracleTeacher
from data_pipeline.validate import Drop
from data_pipeline.write import FORMAT, MANIFEST, RAW_STEP, begin, commit, file_entry, write_raw, write_shards
from srl_jax.records import SCHEMA_VERSION
from srl_jax.rewards import REWARD_VERSION
from srl_jax.sandbox.engine import EngineResult, Status
from srl_jax.sandbox.runner import ENV_REPORT_VERSION, Sandbox
from srl_jax.trace import Action

log = logging.getLogger(__name__)

# Generated tasks cost nothing until they are executed; some are dropped (too long, duplicate), so more are offered.
OFFERED = 5
# A shard is what a worker does at a time, and what is done again when it dies.
STEPS_PER_SHARD, RECORDS_PER_SHARD = 8, 256
# Ends that are the machine's as often as the step's: the next run executes such a step again.
_PASSING = (":timeout", ":crash", ":cut")
T = TypeVar("T")
R = TypeVar("R")


class Rejections:
    """Counts of dropped steps: slice -> reason -> number."""

    def __init__(self) -> None:
        self._counts: dict[str, Counter[str]] = defaultdict(Counter)

    def add(self, slice_name: str, reason: str) -> None:
        self._counts[slice_name][reason] += 1

    def to_dict(self) -> dict[str, dict[str, int]]:
        return {name: dict(sorted(counts.items())) for name, counts in sorted(self._counts.items())}

    def most_frequent(self, count: int = 3) -> str:
        """The reasons that dropped most, with their numbers."""
        total = sum(self._counts.values(), Counter())
        return ", ".join(f"{number} {reason}" for reason, number in total.most_common(count))


class Run:
    """The stages with what they share: sandbox, workers, teachers, progress, counts."""

    def __init__(
        self,
        config: DataSetConfig,
        sandbox: Sandbox,
        collector: Collector,
        executor: Executor,
        progress: Progress,
        journal: Journal,
    ) -> None:
        self.config, self.sandbox, self.collector, self.progress = config, sandbox, collector, progress
        self.executor, self.journal = executor, journal
        self.languages = [name for name in config.languages if RUNNERS.get(name, "unittest") in sandbox.runners]
        self.rejections, self.tally, self.spent = Rejections(), Tally(), Spending()
        self.wanted = quotas(config)
        self._own: dict[tuple[str, str], list[list[Draft]]] = defaultdict(list)
        if config.user_tasks:
            self._read_user_tasks()
        self.raw: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
        self._seen: set[tuple[str, ...]] = set()
        self._near: dict[str, NearDuplicates] = {}
        self._tools = [sandbox.versions, sandbox.isolation, ENV_REPORT_VERSION, SCHEMA_VERSION]

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
    ) -> dict[str, list[list[Draft]]]:
        """split -> tasks from real code of `language`, each a group of its own."""
        config, drafts = self.config, {}
        roots, corpus = self._roots(language)
        rng = random.Random(f"{config.seed}/{language}/files")
        own = {split: [rule for rule in group if rule.language == language] for split, group in rules.items()}
        listed = find_files(roots, language, shorten=corpus or language == "java")
        splits = None
        if config.split_repositories and language != config.withheld_language:
            splits = split_repositories([file.repository for file in listed], config.seed)
        task = self.progress.add_task(f"read {language}", total=min(config.max_files, len(listed)))
        files = self._counted(read_files(listed, rng, config.max_files), task)
        found = real_candidates(own, wanted, files, splits)
        self.progress.update(task, total=self.progress.tasks[task].completed)
        for split, candidates in found.items():
            made = self.each(
                f"real {language} {split}",
                lambda numbered: retried(
                    lambda: real_draft(*numbered[1], numbered[0], config.seed, self._apply, config.max_excerpt)
                ),
                list(enumerate(candidates)),
            )
            drafts[split] = []
            for draft in made:
                if isinstance(draft, str):
                    self.rejections.add(f"{language}/real", f"no_task:{draft}")
                else:
                    drafts[split].append([draft])
        return drafts

    def _read_user_tasks(self) -> None:
        if any(isinstance(teacher, OracleTeacher) for teacher in self.collector.teachers):
            raise DataError("user_tasks needs a teacher of its own: the catalogue does not know the right edits")
        found = read_user_tasks(Path(self.config.user_tasks), self.config.max_excerpt)
        splits = split_repositories([repository for repository, _ in found], self.config.seed)
        for repository, draft in found:
            if draft.task.language in self.languages:
                self._own[splits[repository], draft.task.slice].append([draft])
        self.wanted.update({place: len(groups) for place, groups in self._own.items()})

    def _roots(self, language: str) -> tuple[list[Path], bool]:
        """Where real code of `language` lies, and whether that is the pinned corpus."""
        config = self.config
        named = {
            "python": config.python_roots,
            "javascript": config.javascript_roots,
            "typescript": config.typescript_roots,
            "java": config.java_roots,
        }[language]
        if named:
            return [Path(root) for root in named], False
        if config.corpus and config.real_share:
            return corpus_root(config.corpus, language), True
        return default_roots(language), False

    def _counted(self, items: Iterable[T], task: TaskID) -> Iterator[T]:
        for item in items:
            self.progress.advance(task)
            yield item

    def steps(self, split: str, slice_name: str, offered: Iterable[list[Draft]], wanted: int) -> list[Step]:
        """Validated steps, `wanted` of them unless `offered` ends first; all the teacher said is kept in `raw`.

        `offered` are groups that are kept or dropped as a whole (the steps of an episode, or one task), so the last one
        may go a few steps over.
        """
        groups, kept = iter(offered), []
        while len(kept) < wanted:
            batch: list[list[Draft]] = []
            while sum(map(len, batch)) < wanted - len(kept) and (group := next(groups, None)):
                batch.append(group)
            if not batch:
                break
            batch = [group for group in batch if self._is_new(group, split)]
            judged = self._judged(f"check {slice_name} {split}", [draft for group in batch for draft in group])
            for group in batch:
                steps = [next(judged) for _ in group]
                whole = all(step.verdict.reason is None for step in steps)
                for step in steps:
                    reason = step.verdict.reason or (None if whole else Drop.EPISODE.value)
                    self.tally.add(slice_name, step.teacher, reason)
                    self.spent.add(step.teacher, step.answer)
                    self.raw[split].append(raw_line(step, reason))
                    if reason is None:
                        kept.append(step)
                    else:
                        self.rejections.add(slice_name, reason)
        return kept

    def _judged(self, title: str, drafts: Sequence[Draft]) -> Iterator[Step]:
        """Asks, then judges on the workers what the journal has no verdict on; steps in the order of `drafts`."""
        if not drafts:
            return
        progress = self.progress.add_task(title, total=len(drafts))
        heard: deque[tuple[Draft, Answer | NoAnswer, Any]] = deque()
        size = max(1, min(STEPS_PER_SHARD, len(drafts) // (2 * self.executor.workers)))  # nobody idle in a short batch

        def unjudged() -> Iterator[list[tuple[Draft, Answer]]]:
            shard = []
            for draft, answer in zip(drafts, self.collector.collect(drafts), strict=True):
                known = None if isinstance(answer, NoAnswer) else self.journal.look_up(self._question(draft, answer))
                heard.append((draft, answer, known))
                if known is None and isinstance(answer, Answer):
                    shard.append((draft, answer))
                if len(shard) == size:
                    yield shard
                    shard = []
            if shard:
                yield shard

        def next_known() -> Iterator[Step]:
            while heard and (heard[0][2] is not None or isinstance(heard[0][1], NoAnswer)):
                draft, answer, told = heard.popleft()
                self.progress.advance(progress)
                yield step_of(draft, answer, told)

        for verdicts in self.executor.run(Judging(self.config.max_trace), unjudged()):
            for verdict in verdicts:
                yield from next_known()
                draft, answer, _ = heard.popleft()
                told = {"reason": verdict.reason, "env_report": verdict.env_report, "quality": verdict.quality}
                if not (verdict.reason or "").endswith(_PASSING):
                    self.journal.tell(self._question(draft, answer), told)
                self.progress.advance(progress)
                yield step_of(draft, answer, told)
        yield from next_known()

    def _question(self, draft: Draft, answer: Answer) -> list[Any]:
        judging = [self.config.max_trace, dataclasses.asdict(QUALITY), self._tools]
        return ["step", dataclasses.asdict(draft.task), answer.text, answer.cut, judging]

    def _apply(self, action: Action, files: Mapping[str, str]) -> EngineResult:
        def answer() -> dict[str, Any]:
            result = self.sandbox.apply(action, files)
            changed = {path: text for path, text in result.files_after.items() if text != files[path]}
            return {"status": result.status, "changed": changed, "matches": result.matches, "overlaps": result.overlaps}

        told = self.journal.ask(["apply", dataclasses.asdict(action), dict(files), self._tools], answer)
        after = {**files, **told["changed"]}
        return EngineResult(Status(told["status"]), after, matches=told["matches"], overlaps=told["overlaps"])

    def _is_new(self, group: Sequence[Draft], split: str) -> bool:
        # Not the path: packages ship the same file twice (commonjs and esm).
        keys = [
            (draft.task.rule if draft.rule else draft.task.instruction, *(file.text for file in draft.task.context))
            for draft in group
        ]
        reason = None
        if len(set(keys)) < len(keys) or not self._seen.isdisjoint(keys):
            reason = Drop.DUPLICATE
        elif any(
            nearest.nearest(_words(draft)) > self.config.max_similarity
            for earlier, nearest in self._near.items()
            for draft in group
            if earlier != split
        ):
            reason = Drop.NEAR_DUPLICATE
        if reason is not None:
            for draft in group:
                self.rejections.add(draft.task.slice, reason)
            return False
        self._seen.update(keys)
        return True

    def all_steps(self, rules: Mapping[str, Sequence[Rule]]) -> dict[tuple[str, str], list[Step]]:
        """(split, slice) -> kept steps. Training comes first, so that a duplicate is dropped from what is held out."""
        wanted, config = self.wanted, self.config
        real = {
            language: self.real_drafts(
                language, rules, {split: wanted.get((split, f"{language}/real"), 0) for split in SPLITS}
            )
            for language in self.languages
        }
        steps = {}
        for split in SPLITS:
            for language in self.languages:
                own = [rule for rule in rules[split] if rule.language == language]
                for source, groups in (
                    ("generated", lambda count, own=own: generated_drafts(own, count, config.seed, config.max_excerpt)),
                    ("real", lambda _, language=language, split=split: real[language][split]),
                    ("user", lambda _, place=(split, f"{language}/user"): self._own.get(place, [])),
                    ("episodes", lambda count, own=own: episode_drafts(own, count, config.seed, config.max_excerpt)),
                ):
                    name = f"{language}/{source}"
                    count = wanted.get((split, name), 0)
                    steps[split, name] = self.steps(split, name, groups(OFFERED * count), count)
            if config.max_similarity < 1.0:
                near = self._near[split] = NearDuplicates()
                for (where, _), kept in steps.items():
                    for step in kept if where == split else ():
                        near.add(_words(step.draft))
        return steps

    def write_records(
        self, folder: Path, steps: Mapping[tuple[str, str], Sequence[Step]], embedder: Embeds | None
    ) -> dict[str, dict[str, Any]]:
        """Scores and writes every slice that has records; split -> slice -> the manifest's entry."""
        wanted, entries = self.wanted, {split: {} for split in SPLITS}
        scoring = Scoring(self.config.tag, embedder)
        task = self.progress.add_task("embed rationales", total=sum(map(len, steps.values())))
        for (split, slice_name), kept in steps.items():
            records = []
            for part in self.executor.run(scoring, cut([kept_step(step) for step in kept], RECORDS_PER_SHARD)):
                self.progress.advance(task, len(part))
                records += part
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
    config: DataSetConfig,
    out: Path,
    *,
    collector: Collector | None = None,
    embedder: Embeds | None = None,
    executor: str = "local",
    cluster: str = "",
) -> dict[str, Any]:
    """Builds the data set in `out` and returns its manifest; by default the catalogue's oracle is the teacher.

    `executor` is "local" or "ray", then on the cluster at address `cluster` ("": one on this machine). Where `out` is
    replaced, reasons for rejections that have become more or less frequent since are logged as warnings.

    Raises DataError for a bad configuration or target and where nothing is kept, SandboxUnavailable where nothing can
    be executed safely. A language whose tests this machine cannot run is left out and named in the manifest.
    """
    validate(config)
    known = [rule for rule in CATALOGUE if rule.language in config.languages]
    rules = split_rules(known, config.seed, config.withheld_language)
    partial = begin(out)
    columns = (TextColumn("{task.description:<32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        Journal(out.with_name(out.name + ".journal")) as journal,
        open_sandbox(config.workers) as sandbox,
        Progress(*columns) as progress,
        collector or open_collector(None, None) as asked,
        closing(open_executor(executor, sandbox, cluster)) as workers,
    ):
        if len(journal):
            progress.console.print(f"going on with an interrupted build: {len(journal)} answers are known")
        run = Run(config, sandbox, asked, workers, progress, journal)
        steps = run.all_steps(rules)
        entries = run.write_records(partial, steps, embedder)
        manifest = {
            "format": FORMAT,
            "schema": SCHEMA_VERSION,
            "reward": REWARD_VERSION,
            "dataset": config.tag,
            "teacher": asked.name,
            "teachers": {teacher.name: teacher.pinned for teacher in asked.teachers},
            "spending": run.spent.to_dict(),
            "quality": dataclasses.asdict(QUALITY),
            "seed": config.seed,
            "config": _plain_config(config),
            "languages_left_out": sorted(set(config.languages) - set(run.languages)),
            "splits": {
                split: {"rules": [rule.name for rule in rules[split]], "slices": entries[split]} for split in SPLITS
            },
            "rejections": run.rejections.to_dict(),
            "tally": run.tally.to_list(),
            "raw_format": RAW_STEP,
            "raw": run.write_raw_output(partial),
            "tools": sandbox.versions,
        }
    if not any(entries.values()):
        if manifest["languages_left_out"] and not run.languages:
            raise DataError(f"{out}: no test runner here for {', '.join(manifest['languages_left_out'])}; install one")
        raise DataError(
            f"{out}: nothing was kept of what {asked.name} wrote ({run.rejections.most_frequent()}), so there is no "
            f"data set; what it said is in {partial / 'raw'}. launch/collect_traces.py tells what a teacher is worth"
        )
    before = tally_of(out)
    commit(partial, out, manifest)
    journal.remove()
    for drift in compare(before, run.tally) if before is not None else ():
        log.warning("%s", drift)
    return manifest


def tally_of(data_dir: Path) -> Tally | None:
    """The counts of the data set in a folder, or None where there is none that has any."""
    path = data_dir / MANIFEST
    try:
        return Tally.from_list(json.loads(path.read_text(encoding="utf-8"))["tally"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _words(draft: Draft) -> str:
    """What makes two tasks alike: instruction and shown code."""
    return "\n".join((draft.task.instruction, *(file.text for file in draft.task.context)))


def _plain_config(config: DataSetConfig) -> dict[str, Any]:
    """What decides the bytes, as JSON data: everything but the number of workers."""
    values = {key: value for key, value in dataclasses.asdict(config).items() if key != "workers"}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
