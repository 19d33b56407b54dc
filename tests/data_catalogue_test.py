"""The rule catalogue: every rule does what its scenes say, and an over-broad edit does not pass."""

import random
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.splits import SPLITS, split_rules
from data_pipeline.tasks.catalogue import CATALOGUE, rule_named
from data_pipeline.tasks.generated import RUNNERS, generate
from data_pipeline.tasks.rule import PLACEHOLDER, before_and_after, fill
from data_pipeline.tasks.vocabulary import draw
from data_pipeline.teacher import OracleTeacher
from srl_jax.excerpt import excerpt, first_change
from srl_jax.sandbox.engine import Status
from srl_jax.sandbox.runner import Sandbox, SandboxConfig
from srl_jax.trace import Action, parse_trace

_FUNCTION = re.compile(r"^export function \w+\(([^)]*)\)[^{]*\{\n(.*?)^\}", re.MULTILINE | re.DOTALL)
_LOCAL = re.compile(r"^  (?:const|let) (\w+)", re.MULTILINE)

SCENES = [(rule, number) for rule in CATALOGUE for number in range(len(rule.scenes))]


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(SandboxConfig(slots=2)) as opened:
        yield opened


def test_there_are_enough_rules_with_enough_words():
    languages = Counter(rule.language for rule in CATALOGUE)
    assert len(CATALOGUE) >= 100 and languages["java"] >= 12 and languages["typescript"] >= 8
    assert languages["python"] >= 40 and languages["javascript"] >= 30
    assert len({rule.name for rule in CATALOGUE}) == len(CATALOGUE)
    for rule in CATALOGUE:
        assert len(set(rule.instructions)) >= 4, rule.name
        assert len(rule.think) >= 2 and rule.scenes, rule.name
        assert all(5 <= len(think.split()) <= 30 for think in rule.think), rule.name
        assert rule.keep.startswith("keep "), rule.name
    assert rule_named("python-len-zero").pattern == "len($X) == 0"


def test_rules_for_real_code_need_no_drawn_names():
    for rule in CATALOGUE:
        if rule.real:
            words = (rule.pattern, rule.replacement, rule.decision, *rule.instructions, *rule.think)
            assert not PLACEHOLDER.search(" ".join(words)), rule.name


def test_a_scene_is_read_as_before_and_after():
    assert before_and_after("\n def f():\n-    old()\n+    new()\n     «»\n\n") == (
        "def f():\n    old()\n    «»\n",
        "def f():\n    new()\n    «»\n",
    )
    with pytest.raises(ValueError, match="must start with"):
        before_and_after("def f():")
    assert fill("«a»«» $A {«b»}", {"a": "x", "b": "y"}) == "x $A {y}"
    with pytest.raises(KeyError):
        fill("«nobody»", {})


def test_an_excerpt_is_whole_lines_around_the_change():
    text = "one\ntwo\nthree\nfour\nfive\n"
    assert first_change(text, "one\ntwo\nTHREE\nfour\nfive\n") == 3
    assert first_change("a\n", "a\nb\n") == 2
    assert excerpt(text, 3, 100) == text
    assert excerpt(text, 3, 15) == "two\nthree\nfour\n"
    assert excerpt(text, 3, 6) == "three\n"
    assert excerpt(text, 3, 5) == ""


@given(st.integers(0, 2**31))
def test_drawn_names_are_distinct_where_they_meet(seed):
    names = draw(random.Random(seed))
    for group in (("noun", "noun2"), ("verb", "verb2", "verb3"), ("n", "n2", "n3"), ("field", "field2"), ("kw", "kw2")):
        assert len({names[key] for key in group}) == len(group)
    assert len({names[key] for key in ("mod", "lib", "other")}) == 3  # they are files in one folder
    assert all(fill(rule.pattern, names) for rule in CATALOGUE)


def test_typescript_declares_no_name_twice():
    """Elsewhere a scene's tests see a drawn name meet one of the scene's own; TypeScript's are not run."""
    for rule in (rule for rule in CATALOGUE if rule.language == "typescript"):
        for index in range(60):
            for file in generate(rule, index, 0, 600).task.files:
                for parameters, body in _FUNCTION.findall(file.text):
                    names = [part.split(":")[0].strip(" ?") for part in parameters.split(",") if part.strip()]
                    names += _LOCAL.findall(body)
                    assert len(names) == len(set(names)), file.text


@pytest.mark.parametrize("rule", CATALOGUE, ids=lambda rule: rule.name)
def test_the_oracle_writes_canonical_traces(rule):
    drafts = [generate(rule, index, 5, 300) for index in range(6)]
    assert drafts[0] == generate(rule, 0, 5, 300) != generate(rule, 0, 6, 300)
    assert len({(draft.task.instruction, draft.task.context) for draft in drafts}) >= 5, "too little variety"
    for draft in drafts:
        text = OracleTeacher().write(draft)
        trace = parse_trace(text)
        task = draft.task
        assert trace.action.language == rule.language and trace.action.files == (task.context[0].path,)
        assert trace.state.constraints[-1].lower() in task.instruction.lower()
        assert len(task.context[0].text) <= 300 and task.context[0].text.strip("\n") in task.files[0].text
        if rule.language == "typescript":
            assert task.tests is None
        else:
            assert task.tests.expected_ids and set(task.tests.files) <= {file.path for file in task.files}
        assert not PLACEHOLDER.search(repr(task) + text)


def _draft_of_scene(rule, number, seed):
    """The first task that `generate` makes from the given scene."""
    source = next(iter(rule.scenes[number].sources.values()))
    for index in range(100):
        draft = generate(rule, index, seed, 400)
        if fill(before_and_after(source)[0], draft.names) == draft.task.files[0].text:
            return draft
    raise AssertionError(f"scene {number} of {rule.name} is never drawn")


def _problems(sandbox, rule, number, seed):
    """What is wrong with one scene when it is really executed."""
    draft, problems = _draft_of_scene(rule, number, seed), []
    task = draft.task
    files = {file.path: file.text for file in task.files}
    expected = {file.path: file.text for file in task.expected}
    if task.tests is not None:
        before = sandbox.run_tests(files, task.tests)
        if before.ended != "finished" or before.satisfies(task.tests.expected_ids):
            problems.append(f"before: {before}")
    action = parse_trace(OracleTeacher().write(draft)).action
    report = sandbox.execute(action, files, tests=task.tests, expected=expected)
    if not report.success or set(report.tests_passed) != set(task.tests.expected_ids if task.tests else ()):
        problems.append(f"after: {report}")
    if rule.scenes[number].overbroad:
        pattern, replacement = (fill(text, draft.names) for text in rule.scenes[number].overbroad)
        sources = tuple(path for path in files if task.tests is None or path not in task.tests.files)
        wide = sandbox.execute(
            Action(rule.language, pattern, replacement, sources),
            files,
            tests=task.tests,
            expected=None if task.tests else expected,  # where there are tests, they alone must notice
        )
        if wide.success or wide.status not in (Status.OK, Status.UNPARSABLE_AFTER):
            problems.append(f"over-broad: {wide}")
    return problems


def test_every_scene_fails_before_passes_after_and_punishes_an_over_broad_edit(sandbox):
    served = [scene for scene in SCENES if RUNNERS.get(scene[0].language, "unittest") in sandbox.runners]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda scene: _problems(sandbox, *scene, seed=1), served))
    wrong = {
        f"{rule.name}/{number}": problems for (rule, number), problems in zip(served, found, strict=True) if problems
    }
    assert not wrong
    if len(served) < len(SCENES):
        pytest.skip(f"no Node or JDK here: {len(SCENES) - len(served)} JavaScript or Java scenes were left out")


@given(st.integers(0, 10_000))
def test_splits_hold_out_whole_rules_of_kinds_that_are_trained(seed):
    splits = split_rules(CATALOGUE, seed)
    assert tuple(splits) == SPLITS and splits == split_rules(CATALOGUE, seed)
    names = [rule.name for split in SPLITS for rule in splits[split]]
    assert sorted(names) == sorted(rule.name for rule in CATALOGUE)  # each rule once: disjoint and complete
    trained = {(rule.language, rule.kind) for rule in splits["train"]}
    assert {(rule.language, rule.kind) for split in ("dev", "test") for rule in splits[split]} <= trained
    assert len(splits["test"]) >= 12 and len(splits["dev"]) >= 8
