"""Generated repositories: a rule's scene with drawn names, its own tests, and the expected files after the edit."""

import ast
import random
import re
from collections.abc import Sequence

from data_pipeline.syntax import parse_python
from data_pipeline.tasks.rule import Draft, Rule, before_and_after, fill
from data_pipeline.tasks.state import draw_prior
from data_pipeline.tasks.vocabulary import draw
from srl_jax.excerpt import excerpt, first_change
from srl_jax.records import SourceFile, Task, TestSpec

RUNNERS = {"python": "unittest", "javascript": "node", "java": "java"}
_NODE_TEST = re.compile(r'^test\("([^"]+)"', re.MULTILINE)
_JAVA_TEST = re.compile(r"public void (test\w+)\(")


def sentence(phrase: str) -> str:
    """`phrase` as a sentence: first letter in capitals, one full stop."""
    return phrase[:1].upper() + phrase[1:] + "."


def generate(rule: Rule, index: int, seed: int, max_excerpt: int) -> Draft:
    """The `index`-th generated task of `rule` under `seed`; the same arguments give the same task.

    The prompt shows at most `max_excerpt` characters of the file to edit.
    """
    if not rule.scenes:
        raise ValueError(f"rule {rule.name} has no scene to generate from")
    rng = random.Random(f"{seed}/{rule.name}/{index}")
    names = draw(rng)
    scene = rng.choice(rule.scenes)
    before, expected = [], []
    for path, source in scene.sources.items():
        old, new = before_and_after(source)
        before.append(SourceFile(fill(path, names), fill(old, names)))
        if old != new:
            expected.append(SourceFile(before[-1].path, fill(new, names)))
    shown = excerpt(before[0].text, first_change(before[0].text, expected[0].text), max_excerpt)
    tests = [SourceFile(fill(path, names), fill(text, names)) for path, text in scene.tests.items()]
    instruction = f"{sentence(rng.choice(rule.instructions))} {sentence(rule.keep)}"
    task = Task(
        task_id=f"{rule.name}/generated/{index:05d}",
        instruction=fill(instruction, names),
        language=rule.language,
        slice=f"{rule.language}/generated",
        rule=rule.name,
        difficulty=rule.difficulty,
        source="generated",
        files=(*before, *tests),
        context=(SourceFile(before[0].path, shown),),
        prior_state=draw_prior(rng, before[0].path),
        tests=test_spec(rule.language, tests) if tests else None,
        expected=tuple(expected),
    )
    return Draft(task, rule, names, fill(rng.choice(rule.think), names), fill(rule.keep, names))


def test_spec(language: str, tests: Sequence[SourceFile]) -> TestSpec:
    """What must pass: every test in these files."""
    return TestSpec(
        runner=RUNNERS[language],
        expected_ids=tuple(test_id for test in tests for test_id in _test_ids(language, test)),
        files=tuple(test.path for test in tests),
    )


def _test_ids(language: str, test: SourceFile) -> list[str]:
    """The ids under which the sandbox's runners report the tests of this file."""
    if language == "python":
        module = test.path.removesuffix(".py").replace("/", ".")
        return [
            f"{module}.{cls.name}.{method.name}"
            for cls in parse_python(test.text).body
            if isinstance(cls, ast.ClassDef)
            for method in cls.body
            if isinstance(method, ast.FunctionDef) and method.name.startswith("test_")
        ]
    named = _JAVA_TEST if language == "java" else _NODE_TEST
    return [f"{test.path}::{name}" for name in named.findall(test.text)]
