"""Which tasks are offered to the teacher: how many per split and slice, and from which rules."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from data_pipeline.config import DataSetConfig
from data_pipeline.splits import SPLITS
from data_pipeline.tasks.episodes import episode
from data_pipeline.tasks.generated import generate
from data_pipeline.tasks.real import RealFile
from data_pipeline.tasks.rule import Draft, Rule


def quotas(config: DataSetConfig) -> dict[tuple[str, str], int]:
    """(split, slice) -> records wanted; languages share a split evenly, the first ones taking the remainder.

    A withheld language is in the test split only.
    """
    wanted = {}
    for split in SPLITS:
        taught = [name for name in config.languages if split == "test" or name != config.withheld_language]
        total, count = getattr(config, split), len(taught)
        for position, language in enumerate(taught):
            share = total // count + (position < total % count)
            real, episodes = round(share * config.real_share), round(share * config.episode_share)
            wanted[split, f"{language}/generated"] = share - real - episodes
            wanted[split, f"{language}/real"] = real
            wanted[split, f"{language}/episodes"] = episodes
    return wanted


def generated_drafts(rules: Sequence[Rule], count: int, seed: int, max_excerpt: int) -> Iterator[list[Draft]]:
    """At most `count` generated tasks, each a group of its own, going round the rules that have scenes."""
    usable = [rule for rule in rules if rule.scenes]
    for index in range(count if usable else 0):
        yield [generate(usable[index % len(usable)], index // len(usable), seed, max_excerpt)]


def episode_drafts(rules: Sequence[Rule], count: int, seed: int, max_excerpt: int) -> Iterator[list[Draft]]:
    """Episodes of at least `count` steps in all, as long as the rules give any."""
    index = 0
    while count > 0:
        drafts = episode(rules, index, seed, max_excerpt)
        if not drafts:
            return
        index, count = index + 1, count - len(drafts)
        yield drafts


def real_candidates(
    rules: Mapping[str, Sequence[Rule]],
    wanted: Mapping[str, int],
    files: Iterable[tuple[RealFile, str]],
    splits: Mapping[str, str] | None = None,
) -> dict[str, list[tuple[Rule, str, str]]]:
    """split -> (rule, path, text) whose hint matches; no rule gets more than three times its even share.

    With `splits` (repository -> split) a file serves its repository's split only.
    """
    found: dict[str, list[tuple[Rule, str, str]]] = {split: [] for split in rules}
    hints = {
        split: [(rule, re.compile(rule.real, re.M)) for rule in group if rule.real] for split, group in rules.items()
    }
    taken: Counter[str] = Counter()
    for file, text in files:
        for split, group in hints.items():
            if splits is not None and splits[file.repository] != split:
                continue
            limit = max(2, 3 * wanted[split] // max(1, len(group)))
            for rule, hint in group:
                if len(found[split]) < 2 * wanted[split] and taken[rule.name] < limit and hint.search(text):
                    taken[rule.name] += 1
                    found[split].append((rule, file.path, text))
                    break  # one task a file: near-duplicates teach nothing
        if all(len(found[split]) >= 2 * wanted[split] for split in rules):
            break
    return found
