"""Building a data set: state, validation, quality, real code, writing, and the same bytes for the same seed."""

import dataclasses
import gzip
import json
import os
import random
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from data_pipeline.collect_traces import Collector
from data_pipeline.config import DataSetConfig
from data_pipeline.config import validate as validate_config
from data_pipeline.errors import DataError
from data_pipeline.load import read_manifest, read_split, verify
from data_pipeline.offers import quotas
from data_pipeline.pipeline import prepare
from data_pipeline.quality import agreement, length_score, trace_quality
from data_pipeline.splits import SPLITS
from data_pipeline.tasks.catalogue import rule_named
from data_pipeline.tasks.generated import generate
from data_pipeline.tasks.real import enclosing_function, find_files, read_files, real_draft
from data_pipeline.tasks.state import advance, draw_prior, for_test_code
from data_pipeline.teacher import NoAnswer, OracleTeacher, TeacherMix
from data_pipeline.validate import Drop, validate
from data_pipeline.write import begin
from srl_jax.embedding import load_embedder
from srl_jax.records import SourceFile
from srl_jax.sandbox.runner import Sandbox, SandboxConfig
from srl_jax.trace import Action, StateUpdate, Trace, parse_trace, render_trace


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(SandboxConfig(slots=2)) as opened:
        yield opened


@pytest.fixture(scope="module")
def embedder():
    return load_embedder()


# ------------------------------------------------------------------------------------------------------ state


def test_the_state_moves_on():
    prior = StateUpdate(
        ("small steps",), ("no new imports",), ("app.py is outdated", "docs lag"), ("edit app.py", "run")
    )
    after = advance(prior, path="app.py", decision="use b", keep="keep c.a")
    assert after == StateUpdate(("small steps", "use b"), ("no new imports", "keep c.a"), ("docs lag",), ("run",))


def test_a_drawn_state_makes_the_edit_the_next_thing_to_do():
    states = [draw_prior(random.Random(seed), "app.py") for seed in range(200)]
    assert all(state.next_focus[0] == "edit app.py" and len(state.constraints) == 1 for state in states)
    assert len(set(states)) > 100
    closed = [state for state in states if "app.py is outdated" in state.open_issues]
    assert 40 < len(closed) < 140


def test_a_task_that_edits_tests_does_not_promise_to_leave_them():
    prior = StateUpdate((), ("tests stay as they are", "no new imports"), ("a",), ("b",))
    assert for_test_code(prior) == StateUpdate((), ("small diff", "no new imports"), ("a",), ("b",))


# ------------------------------------------------------------------------------------------------- validation


def step(name="python-rename-module-call", index=0):
    draft = generate(rule_named(name), index, 3, 300)
    return draft, OracleTeacher().write(draft)


def with_action(text, **changes):
    trace = parse_trace(text)
    return render_trace(Trace(trace.think, dataclasses.replace(trace.action, **changes), trace.state))


def reason_of(sandbox, draft, text, max_trace=2000):
    return validate(draft, text, sandbox, max_trace).reason


def test_a_right_step_is_kept_with_a_report_that_never_changes(sandbox):
    draft, text = step()
    first, second = (validate(draft, text, sandbox, 2000) for _ in range(2))
    assert first.reason is None and first == second
    assert first.env_report["success"] and first.env_report["expected_diff"] and first.env_report["duration_s"] == 0.0


def test_every_wrong_step_is_dropped_for_its_own_reason(sandbox):
    draft, text = step()
    task = draft.task
    assert reason_of(sandbox, draft, "no trace") == "malformed:missing_tag"
    assert reason_of(sandbox, draft, text.replace("</think>\n", "</think>\n\n").replace('","', '", "')) is None
    assert reason_of(sandbox, draft, text, max_trace=100) == Drop.TOO_LONG
    assert reason_of(sandbox, draft, with_action(text, pattern="nobody($X)", replacement="$X")) == "action:no_match"
    wide = with_action(text, pattern=f"$M.{draft.names['verb']}_{draft.names['noun']}($K)", replacement="None")
    assert reason_of(sandbox, draft, wide) == Drop.WRONG_DIFF
    done = {file.path: file.text for file in task.expected}
    solved = tuple(SourceFile(file.path, done.get(file.path, file.text)) for file in task.files)
    passed = dataclasses.replace(draft, task=dataclasses.replace(task, files=solved))
    assert reason_of(sandbox, passed, text) == Drop.PASSED_BEFORE
    tests = dataclasses.replace(
        task.tests, expected_ids=(*task.tests.expected_ids, "test_app.RewriteTest.test_missing")
    )
    failing = dataclasses.replace(draft, task=dataclasses.replace(task, tests=tests))
    assert reason_of(sandbox, failing, text) == Drop.FAILED_AFTER
    dying = tuple(
        SourceFile(file.path, "import os\nos._exit(0)\n" if file.path in task.tests.files else file.text)
        for file in task.files
    )
    cut = dataclasses.replace(draft, task=dataclasses.replace(task, files=dying))
    assert reason_of(sandbox, cut, text) == f"{Drop.BROKEN_BEFORE}:cut"


# ---------------------------------------------------------------------------------------------------- quality


def test_quality_by_hand():
    action = Action("python", "db.load_user($$$ARGS)", "db.fetch_user($$$ARGS)", ("a.py",))
    # named: db load user fetch; the first rationale has two of four, the second one, the third none
    assert agreement("We load the user.", action) == 1.0
    assert agreement("Touch db only.", action) == 0.5
    assert agreement("Nothing to see here at all.", action) == 0.0
    assert agreement("anything", Action("python", "$A == 0", "$A", ("a.py",))) == 1.0
    assert [length_score("w " * n) for n in (1, 5, 60)] == [0.2, 1.0, 1.0]
    assert length_score("w " * 286) == pytest.approx(0.5) and length_score("w " * 600) == 0.0
    trace = Trace("Touch db only, and then stop.", action, StateUpdate.empty())
    assert trace_quality(trace, {"success": True}) == pytest.approx(0.2 + 0.4 + 0.15 + 0.125)
    assert trace_quality(trace, {"success": False}) < 0.6


# -------------------------------------------------------------------------------------------------- real code


MODULE = """import os


class Store:
    @property
    def size(self):
        def inner(rows):
            if len(rows) == 0:
                return 1
            return 2
        return inner([])
"""


def test_a_real_task_is_the_innermost_function_standing_alone(sandbox):
    assert enclosing_function(MODULE, 8).startswith("def inner(rows):\n    if len(rows) == 0:")
    assert enclosing_function(MODULE, 6).startswith("@property\ndef size(self):")
    assert enclosing_function(MODULE, 1) is None and enclosing_function("def f(:", 1) is None
    draft = real_draft(rule_named("python-len-zero"), "pkg/store.py", MODULE, 0, 7, sandbox.apply, 200)
    assert draft.task.files[0].text == "def inner(rows):\n    if len(rows) == 0:\n        return 1\n    return 2\n"
    assert draft.task.expected[0].text == "def inner(rows):\n    if not rows:\n        return 1\n    return 2\n"
    assert validate(draft, OracleTeacher().write(draft), sandbox, 2000).reason is None


def test_real_code_that_makes_no_task_says_why(sandbox):
    def attempt(rule, text, limit=200):
        return real_draft(rule_named(rule), "a.py", text, 0, 7, sandbox.apply, limit)

    assert attempt("python-len-zero", "x = 1\n") == "no_hint"
    assert attempt("python-len-zero", '"""len(x) == 0"""\n') == "action:no_match"
    assert attempt("python-len-zero", "a = len(x) == 0\n" * 7) == "too_many_matches"
    assert attempt("python-len-zero", f"a = len(x) == 0 or {'y' * 200}\n") == "long_line"
    assert attempt("python-delete-print", "def f(x):\n    if x:\n        print(x)\n") == "action:unparsable_after"
    assert attempt("python-environ-get", "a = os.environ['x']\ndel os.environ['x']\n") == "action:unparsable_after"
    assert attempt("python-environ-get", "a = b = os.environ['x'] = 1\n") == "action:unparsable_after"


def test_odd_files_are_passed_over(tmp_path):
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "good.py").write_text("x = 1\n")
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9\n")
    (tmp_path / "dos.py").write_bytes(b"x = 1\r\n")
    (tmp_path / "big.py").write_text("x = 1\n" * 10_000)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "secret.py").write_text("x = 1\n")
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "foreign.py").write_text("x = 1\n")
    (tmp_path / "link.py").symlink_to(tmp_path / "pkg" / "good.py")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "dangling.py").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder.py").mkdir()
    (tmp_path / "other.js").write_text("var x = 1;\n")
    (tmp_path / "huge.py").write_bytes(b"x")
    os.truncate(tmp_path / "huge.py", 50 << 20)  # sparse, and never read
    (tmp_path / "empty").mkdir()
    files = find_files([tmp_path], "python")
    found = [(file.repository, file.path, text) for file, text in read_files(files, random.Random(0), 10)]
    assert found == [("pkg", "pkg/good.py", "x = 1\n")]
    assert list(read_files(files, random.Random(0), 0)) == [] == find_files([], "python")
    assert find_files([tmp_path / "empty"], "python") == []  # an empty repository


def test_a_long_path_is_passed_over_or_shown_by_its_end(tmp_path):
    for path in ("lang/src/main/java/org/apache/lang/Strings.java", "@scope/name/A.java", f"lang/{'L' * 40}.java"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("class A {}\n")
    assert [file.path for file in find_files([tmp_path], "java")] == ["@scope/name/A.java"]
    found = [(file.repository, file.path) for file in find_files([tmp_path], "java", shorten=True)]
    assert found == [("@scope/name", "@scope/name/A.java"), ("lang", "org/apache/lang/Strings.java")]


# ------------------------------------------------------------------------------------------------ whole builds


def small(tmp_path, **changes):
    roots = tmp_path / "code"
    roots.mkdir(exist_ok=True)
    for index in range(8):
        (roots / f"mod{index}.py").write_text(
            f"def f{index}(rows):\n    if len(rows) == 0:\n        return {index}\n    return rows == None\n"
            f"\n\ndef g{index}(rows):\n    print(rows)\n    return rows != None\n"
        )
    values = {"tag": "t", "train": 8, "dev": 4, "test": 4, "languages": ("python",), "python_roots": (str(roots),)}
    return DataSetConfig(**{**values, **changes})


def tree(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }


def test_the_same_seed_gives_the_same_bytes_whatever_the_workers(tmp_path, embedder):
    first = prepare(small(tmp_path, workers=2), tmp_path / "a", embedder=embedder)
    prepare(small(tmp_path, workers=1), tmp_path / "b", embedder=embedder)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    assert prepare(small(tmp_path, seed=1), tmp_path / "c", embedder=embedder)["splits"] != first["splits"]
    verify(tmp_path / "a")
    assert first == read_manifest(tmp_path / "a") and not list(tmp_path.glob("*.partial"))
    rules = [set(first["splits"][split]["rules"]) for split in SPLITS]
    assert not rules[0] & rules[1] and not rules[0] & rules[2] and not rules[1] & rules[2]
    for split, own in zip(SPLITS, rules, strict=True):
        records = read_split(tmp_path / "a", split)
        counted = sum(entry["records"] for entry in first["splits"][split]["slices"].values())
        assert len(records) == counted > 0
        for record in records:
            assert record.task.rule in own and record.versions.dataset == "t" and record.trace_quality >= 0.6
            assert record.env_report["success"]
    lines = gzip.decompress((tmp_path / "a" / "raw" / "train.jsonl.gz").read_bytes()).decode().splitlines()
    raw = [json.loads(line) for line in lines]
    assert {record.trace for record in read_split(tmp_path / "a", "train")} <= {line["text"] for line in raw}


class Rubbish(OracleTeacher):
    """A teacher that answers the tasks of some rules with nothing of use."""

    name = version = "rubbish/1"

    def write(self, draft):
        return super().write(draft) if len(draft.task.rule) % 2 else "As a language model,"


class Silent(OracleTeacher):
    """A teacher that answers about every other task only."""

    name = version = "silent/1"

    def answer(self, draft):
        if zlib.crc32(draft.task.rule.encode()) % 2:
            raise NoAnswer(self.name, "http_500", attempts=3, prompt_tokens=9, wasted_tokens=1, cost_usd=0.5)
        return super().answer(draft)


def of(teacher):
    return Collector(TeacherMix([teacher], [1.0]))


def test_a_bad_teacher_is_counted_and_its_output_kept(tmp_path, embedder):
    config = small(tmp_path, real_share=0.0, train=4, dev=0, test=0)
    manifest = prepare(config, tmp_path / "a", collector=of(Rubbish()), embedder=embedder)
    dropped = manifest["rejections"]["python/generated"]["malformed:missing_tag"]
    kept = manifest["splits"]["train"]["slices"]["python/generated"]["records"]
    assert kept == 4 and manifest["raw"][0]["records"] == kept + dropped and manifest["teacher"] == "rubbish/1"


def test_a_teacher_of_whom_nothing_is_kept_makes_no_data_set(tmp_path, embedder):
    class Hopeless(OracleTeacher):
        name = version = "hopeless/1"

        def write(self, draft):
            return "As a language model,"

    config = small(tmp_path, real_share=0.0, train=2, dev=0, test=0)
    prepare(config, tmp_path / "a", embedder=embedder)
    before = tree(tmp_path / "a")
    for target in ("a", "new"):
        with pytest.raises(DataError, match=r"nothing was kept of what hopeless/1 wrote \(\d+ malformed:missing_tag\)"):
            prepare(config, tmp_path / target, collector=of(Hopeless()), embedder=embedder)
        assert (tmp_path / f"{target}.partial" / "raw" / "train.jsonl.gz").exists()
    assert tree(tmp_path / "a") == before and not (tmp_path / "new").exists()


def test_a_task_without_an_answer_is_counted_with_what_it_cost(tmp_path, embedder, caplog):
    config = small(tmp_path, real_share=0.0, train=4, dev=0, test=0)
    prepare(config, tmp_path / "a", embedder=embedder)
    manifest = prepare(config, tmp_path / "a", collector=of(Silent()), embedder=embedder)
    failed = manifest["rejections"]["python/generated"]["no_answer:http_500"]
    assert failed > 0 and manifest["spending"]["silent/1"]["failures"] == failed
    assert manifest["spending"]["silent/1"]["cost_usd"] == 0.5 * failed
    assert manifest["teachers"]["silent/1"] == {"kind": "oracle"}
    lines = gzip.decompress((tmp_path / "a" / "raw" / "train.jsonl.gz").read_bytes()).decode().splitlines()
    raw = [json.loads(line) for line in lines]
    assert [line["text"] for line in raw if line["rejected"] == "no_answer:http_500"] == [""] * failed
    judged = {row["teacher"]: row["judged"] for row in manifest["tally"]}
    assert judged == {"silent/1": len(raw)}


class Interrupted(Exception):
    pass


class Interrupting(OracleTeacher):
    name = version = "interrupting/1"

    def write(self, draft):
        raise Interrupted


def test_an_interrupted_build_leaves_the_old_data_set_and_starts_again(tmp_path, embedder):
    config = small(tmp_path, real_share=0.0, train=2, dev=0, test=0)
    prepare(config, tmp_path / "a", embedder=embedder)
    before = tree(tmp_path / "a")
    for target in ("a", "new"):
        with pytest.raises(Interrupted):
            prepare(config, tmp_path / target, collector=of(Interrupting()), embedder=embedder)
    assert tree(tmp_path / "a") == before
    with pytest.raises(DataError, match="not a data set"):
        read_manifest(tmp_path / "new")
    assert not (tmp_path / "new").exists() and (tmp_path / "new.partial").exists()
    prepare(config, tmp_path / "new", embedder=embedder)
    assert tree(tmp_path / "new") == before and not (tmp_path / "new.partial").exists()


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(DataError, match="holds no data set"):
        begin(tmp_path)
    with pytest.raises(DataError, match="is a file"):
        begin(tmp_path / "precious.txt")
    assert (tmp_path / "precious.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": -1}, "train is -1; must be a whole number"),
        ({"train": 0, "dev": 0, "test": 0}, "at least one split"),
        ({"workers": 0}, "workers is 0"),
        ({"real_share": 1.5}, r"real_share is 1\.5; must lie between 0 and 1"),
        ({"languages": ("cobol",)}, "python, javascript"),
        ({"python_roots": ("/no/such/folder",)}, "'/no/such/folder' is not a directory"),
        ({"max_excerpt": 3}, "max_excerpt is 3"),
        ({"tag": " "}, "must name the data set"),
    ],
)
def test_a_wrong_field_is_named_with_its_remedy(change, message):
    with pytest.raises(DataError, match=message):
        validate_config(DataSetConfig(**change))


def test_the_launch_file_ends_mistakes_in_one_line(tmp_path):
    root = Path(__file__).parents[1]

    def launch(*arguments):
        command = [sys.executable, "launch/prepare_data.py", "--config=configs/data_demo.py", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(root)}
        return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=120)

    (tmp_path / "note.txt").write_text("mine")
    wrong = launch("--config.train=-1", f"--out={tmp_path}/x")
    assert wrong.returncode == 2 and wrong.stderr.splitlines()[-1].startswith("error: train is -1; must be")
    foreign = launch(f"--out={tmp_path}")
    assert foreign.returncode == 2 and "holds no data set" in foreign.stderr.splitlines()[-1]
    assert launch("--config.trian=3", f"--out={tmp_path}/x").returncode != 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["note.txt"]


def test_quotas_add_up():
    wanted = quotas(DataSetConfig(train=11, dev=1, test=0, real_share=0.25))
    assert sum(count for (split, _), count in wanted.items() if split == "train") == 11
    assert wanted["train", "python/generated"] == 4 and wanted["train", "python/real"] == 2  # 6 of 11, round(1.5) real
    assert wanted["train", "javascript/generated"] == 4 and wanted["train", "javascript/real"] == 1
    assert wanted["dev", "python/generated"] == 1 and wanted["test", "python/generated"] == 0
