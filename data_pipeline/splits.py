"""Which rules and repositories are trained on and which are held out; each belongs to one split as a whole."""

import random
from collections import defaultdict
from collections.abc import Collection, Sequence

from data_pipeline.tasks.rule import Rule

SPLITS = ("train", "dev", "test")


def split_rules(rules: Sequence[Rule], seed: int, withheld: str = "") -> dict[str, tuple[Rule, ...]]:
    """Rules by split, drawn by `seed`; all rules of the language `withheld` go to test.

    Of every (language, kind) group of two rules or more one rule goes to test, of four or more another to dev, so
    that every held-out rule asks for a kind of edit that some training rule of its language also asks for.
    """
    groups: dict[tuple[str, str], list[Rule]] = defaultdict(list)
    for rule in rules:
        groups[rule.language, rule.kind].append(rule)
    drawn: dict[str, list[Rule]] = {split: [] for split in SPLITS}
    for (language, kind), group in sorted(groups.items()):
        order = sorted(group, key=lambda rule: rule.name)
        random.Random(f"{seed}/{language}/{kind}").shuffle(order)
        if language == withheld:
            drawn["test"] += order
            continue
        test = 1 if len(order) >= 2 else 0
        dev = 1 if len(order) >= 4 else 0
        drawn["test"] += order[:test]
        drawn["dev"] += order[test : test + dev]
        drawn["train"] += order[test + dev :]
    return {split: tuple(sorted(drawn[split], key=lambda rule: rule.name)) for split in SPLITS}


def split_repositories(repositories: Collection[str], seed: int) -> dict[str, str]:
    """Repository -> split, drawn by `seed`: of three or more about a fifth (at least one) each to test and dev."""
    order = sorted(set(repositories))
    random.Random(f"{seed}/repositories").shuffle(order)
    held_out = max(1, round(len(order) / 5)) if len(order) >= 3 else 0
    return {
        name: "test" if place < held_out else "dev" if place < 2 * held_out else "train"
        for place, name in enumerate(order)
    }
