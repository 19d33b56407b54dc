"""Which tasks are offered to the teacher: how many per split and slice, and from which rules."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from data_pipeline.config import DataSetConfig
from data_pipeline.splits import SPLITS
from data_pipeline.tasks.generated import generate
from data_pipeline.tasks.rule import Draft, Rule


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
