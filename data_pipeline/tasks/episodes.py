"""Episodes: two to five steps in one generated repository, each starting from what the step before left.

A *sweep* applies one rule to several files, a *round* applies different rules. The first state plans every step and
lists every file as an open issue; each step's state update is the next step's prior state. Between them the
repository moves on by the rewritten file alone, and tests of earlier steps must go on passing.
"""

import random
from collections.abc import Mapping, Sequence

from data_pipeline.tasks.generated import sentence, test_spec
from data_pipeline.tasks.rule import PLACEHOLDER, Draft, Rule, Scene, before_and_after, fill
from data_pipeline.tasks.state import advance, draw_plan, for_test_code
from data_pipeline.tasks.vocabulary import draw
from srl_jax.excerpt import excerpt, first_change
from srl_jax.records import EpisodeStep, SourceFile, Task

MAX_STEPS = 5
_TRIES = 40  # draws of names before a step that clashes with the others is given up


class _Part:
    """One step's share of the repository: its rule and scene with drawn names."""

    def __init__(self, rule: Rule, scene: Scene, names: Mapping[str, str]) -> None:
        self.rule, self.scene, self.names = rule, scene, names
        self.before: dict[str, str] = {}
        self.after: dict[str, str] = {}
        for path, source in scene.sources.items():
            old, new = before_and_after(source)
            self.before[fill(path, names)] = fill(old, names)
            self.after[fill(path, names)] = fill(new, names)
        self.tests = {fill(path, names): fill(text, names) for path, text in scene.tests.items()}
        self.path = next(iter(self.before))

    def fits(self, others: Sequence["_Part"]) -> bool:
        """Whether no file of this part is another text elsewhere; libraries may be shared, edited files may not."""
        own = {**self.before, **self.tests}
        for other in others:
            theirs = {**other.before, **other.tests}
            if any(own[path] != theirs[path] for path in own.keys() & theirs.keys()) or self.path == other.path:
                return False
        return True


def episode(rules: Sequence[Rule], index: int, seed: int, max_excerpt: int) -> list[Draft]:
    """The `index`-th episode over `rules` (of one language) under `seed`, two to five drafts; [] if none can be made.

    Equal arguments give equal episodes. Rules whose scenes do not compile before the rewrite are left out: in a
    compiled language they would break the other steps' tests.
    """
    usable = [rule for rule in rules if any(scene.stands_before for scene in rule.scenes)]
    if not usable:
        return []
    rng = random.Random(f"{seed}/episode/{usable[0].language}/{index}")
    wanted = rng.choice((2, 2, 3, 3, 3, 4, 4, MAX_STEPS))
    # Going round the rules, so that episodes start with each of them equally often.
    parts = _sweep(rng, usable[index % len(usable)], wanted) if rng.random() < 0.5 else []
    if len(parts) < 2:
        parts = _round(rng, usable, index, wanted)
    if len(parts) < 2:
        return []
    return _drafts(rng, parts, f"{usable[0].language}/episode/{index:05d}", max_excerpt)


def _scene(rng: random.Random, rule: Rule) -> Scene:
    return rng.choice([scene for scene in rule.scenes if scene.stands_before])


def _round(rng: random.Random, rules: Sequence[Rule], index: int, wanted: int) -> list[_Part]:
    """Different rules in one repository."""
    others = rng.sample(rules, len(rules))
    first = rules[index % len(rules)]
    parts: list[_Part] = []
    for rule in [first, *(rule for rule in others if rule is not first)]:
        for _ in range(_TRIES):
            part = _Part(rule, _scene(rng, rule), draw(rng))
            if part.fits(parts):
                parts.append(part)
                break
        if len(parts) == wanted:
            break
    return parts


def _sweep(rng: random.Random, rule: Rule, wanted: int) -> list[_Part]:
    """One rule in several files: the names it speaks of stay, the others are drawn anew."""
    scene = _scene(rng, rule)
    first = draw(rng)
    libraries = [part for path, text in list(scene.sources.items())[1:] for part in (path, text)]
    spoken = (rule.pattern, rule.replacement, rule.decision, rule.keep, *rule.instructions, *rule.think, *libraries)
    fixed = {name for text in (*spoken, repr(rule.constraints)) for name in PLACEHOLDER.findall(text)}
    fixed |= {name.lower() for name in fixed} | {name.capitalize() for name in fixed}
    fixed |= {name.upper() for name in fixed}
    parts = [_Part(rule, scene, first)]
    for _ in range(_TRIES):
        if len(parts) == wanted:
            break
        names = {key: first[key] if key in fixed else value for key, value in draw(rng).items()}
        part = _Part(rule, scene, names)
        if part.fits(parts):
            parts.append(part)
    return parts


def _drafts(rng: random.Random, parts: Sequence[_Part], episode_id: str, max_excerpt: int) -> list[Draft]:
    files = {path: text for part in parts for path, text in (*part.before.items(), *part.tests.items())}
    state = draw_plan(rng, [part.path for part in parts])
    if any(part.rule.kind == "assert" for part in parts):
        state = for_test_code(state)
    drafts: list[Draft] = []
    tests: list[SourceFile] = []
    for step, part in enumerate(parts, 1):
        rule, names = part.rule, part.names
        changed = {path: text for path, text in part.after.items() if text != files[path]}
        shown = excerpt(files[part.path], first_change(files[part.path], changed[part.path]), max_excerpt)
        tests += [SourceFile(path, text) for path, text in part.tests.items()]
        words = fill(f"{sentence(rng.choice(rule.instructions))} {sentence(rule.keep)}", names)
        task = Task(
            task_id=f"{episode_id}/{step}",
            instruction=f"In {part.path}: {words}",
            language=rule.language,
            slice=f"{rule.language}/episodes",
            rule=rule.name,
            difficulty=rule.difficulty + 1,
            source="generated",
            files=tuple(SourceFile(path, text) for path, text in files.items()),
            context=(SourceFile(part.path, shown),),
            prior_state=state,
            tests=test_spec(rule.language, tests) if tests else None,
            expected=tuple(SourceFile(path, text) for path, text in changed.items()),
            episode=EpisodeStep(episode_id, step, len(parts)),
        )
        keep = fill(rule.keep, names)
        drafts.append(Draft(task, rule, names, fill(rng.choice(rule.think), names), keep))
        files = {**files, **changed}
        state = advance(state, path=part.path, decision=fill(rule.decision, names), keep=keep)
    return drafts
