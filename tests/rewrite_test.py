"""The rewrite tool: prompts like training's, proposals executed and ranked, writing only when asked."""

import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import jax
import pytest
from rich.console import Console

from srl_jax import rewrite, rewrite_view
from srl_jax.config import ConfigError, NotARun, TrainConfig, read_config
from srl_jax.evaluation import write_json
from srl_jax.exported import load_exported
from srl_jax.model.export import export_adapter, export_merged
from srl_jax.model.hf import BadWeights
from srl_jax.proposals import Request, TestBench, judge
from srl_jax.relevance import Place
from srl_jax.rewrite import draw_traces, prompt_tasks
from srl_jax.rewrite_step import Writing, take_step
from srl_jax.run import Run
from srl_jax.sandbox import Sandbox, Status
from srl_jax.trace import Action, StateUpdate, Trace, render_action
from srl_jax.worktree import DirectoryError
from tests.fakes import perturbed, teacher_record, tiny_config, tiny_student

ROOT = Path(__file__).parents[1]
FILES = {
    "app/__init__.py": "",
    "app/shop.py": "def total(xs):\n    return add_all(xs)\n\n\ndef add_all(xs):\n    return sum(xs)\n",
    "tests/__init__.py": "",
    "tests/test_shop.py": (
        "import unittest\nfrom app.shop import total\n\n\n"
        "class ShopTest(unittest.TestCase):\n"
        "    def test_total(self):\n        self.assertEqual(total([1, 2]), 3)\n\n"
        "    def test_never(self):\n        self.fail()\n"
    ),
}
REQUEST = Request("Call `sum` instead of `add_all`.", FILES)
STATE = StateUpdate(("call sum",), (), (), ("run the tests",))
SHOWN = Place("app/shop.py", 2, "python", 1.0)
RIGHT = Action("python", "return add_all($X)", "return sum($X)", ("app/*.py",))


def trace(**changes):
    return Trace("sum is built in", dataclasses.replace(RIGHT, **changes), STATE)


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox() as opened:
        yield opened


@pytest.fixture(scope="module")
def student():
    return tiny_student()


def prompt_text(student, request, config=None):
    prompts = prompt_tasks(student, config or tiny_config(), request)
    return [(place.path, student.tokenizer.decode(ids)) for place, ids in prompts]


class TestPrompt:
    def test_it_is_the_prompt_of_training(self, student):
        record = teacher_record(0)
        files = {file.path: file.text for file in record.task.files}
        prior = StateUpdate((), ("small diff",), (), ("edit src/m0.py", "run the tests"))
        task = dataclasses.replace(record.task, prior_state=prior)
        trained = student.tokenizer.encode_prompt(task, few_shot=0)
        request = Request(record.task.instruction, files, prior)
        assert [ids for _, ids in prompt_tasks(student, tiny_config(), request)] == [trained]

    def test_the_excerpt_stands_around_the_word(self, student):
        long = "".join(f"value_{n} = {n}\n" for n in range(200))
        [(path, text)] = prompt_text(student, Request("Delete `value_150`.", {"a.py": long}))
        assert path == "a.py" and "value_150 = 150" in text and "value_0 =" not in text
        assert '"next_focus":["edit a.py","run the tests"]' in text

    def test_the_state_goes_on_with_this_file(self, student):
        state = StateUpdate(("d",), ("c",), (), ("edit a.py", "check the docs"))
        [(_, text)] = prompt_text(student, Request("Delete `x`.", {"a.py": "x = 1\n"}, state))
        assert '"decisions":["d"],"constraints":["c"],"next_focus":["edit a.py","check the docs"]' in text

    def test_nothing_to_do_is_said(self, student):
        with pytest.raises(DirectoryError, match="no file holds a word"):
            prompt_tasks(student, tiny_config(), Request("Delete `zebra`.", FILES))
        with pytest.raises(DirectoryError, match="shorten the instruction"):
            prompt_tasks(student, tiny_config(), Request("add_all " * 300, FILES))

    @pytest.mark.parametrize(
        ("files", "languages", "message"),
        [
            ({}, (), "none of the directory's 0 files is python or"),
            (FILES, ("java",), "none of the directory's 4 files is java; files that git ignores"),
        ],
    )
    def test_a_directory_without_code_is_said_to_be_one(self, student, files, languages, message):
        with pytest.raises(DirectoryError, match=message):
            prompt_tasks(student, tiny_config(), Request("Call `add_all`.", files, languages=languages))

    def test_a_line_that_no_excerpt_holds_is_passed_over(self, student):
        files = {"a.py": "x = '" + "y" * 500 + "'\n", "b.py": "x = 1\n"}
        assert [path for path, _ in prompt_text(student, Request("`x`", files, places=2))] == ["b.py"]


class TestDrawing:
    def test_the_first_is_greedy_and_all_are_distinct(self, student):
        prompts = [student.tokenizer.encode_prompt(teacher_record(n).task, few_shot=0) for n in (0, 1)]
        drawn = draw_traces(student, None, prompts, tiny_config(), 4, seed=0)
        alone = draw_traces(student, None, prompts, tiny_config(), 1, seed=7)
        for some, greedy in zip(drawn, alone, strict=True):
            assert len(greedy) == 1 and some[0][0] == greedy[0][0]
            assert some[0][1] == pytest.approx(greedy[0][1], abs=1e-4)
            names = [render_action(trace.action) for trace, _ in some]
            assert len(set(names)) == len(names) > 1
            assert all(logprob < 0 for _, logprob in some)

    def test_seeds_differ_and_repeat(self, student):
        prompt = [student.tokenizer.encode_prompt(teacher_record(0).task, few_shot=0)]
        one, same, other = (draw_traces(student, None, prompt, tiny_config(), 3, seed) for seed in (1, 1, 2))
        assert one == same != other


class TestJudging:
    def test_execution_first_then_the_policys_own_logprob(self, sandbox):
        nothing = trace(pattern="gone($X)", replacement="")
        other = trace(replacement="return sum(list($X))")
        drawn = [(SHOWN, nothing, -0.1), (SHOWN, trace(), -0.9), (SHOWN, other, -0.5)]
        ranked = judge(drawn, REQUEST, sandbox, None)
        assert [proposal.trace for proposal in ranked] == [other, trace(), nothing]
        assert [proposal.usable for proposal in ranked] == [True, True, False]
        assert ranked[2].result.status is Status.NO_MATCH
        assert ranked[1].result.matches == {"app/shop.py": 1}

    def test_an_edit_of_something_else_is_not_usable_though_every_test_passes(self, sandbox):
        bench = TestBench(sandbox, FILES, "unittest")
        astray = trace(pattern="def total(xs):\n    $$$BODY", replacement="def total(xs):\n    # sums\n    $$$BODY")
        first, second = judge([(SHOWN, astray, -0.1), (SHOWN, trace(), -0.9)], REQUEST, sandbox, bench)
        assert first.trace == trace() and first.usable
        assert second.result.status is Status.OK and not second.broken_tests and not second.usable
        console = Console(file=io.StringIO(), width=200)
        rewrite_view.show(console, [second])
        told = console.file.getvalue()
        assert "ok, off topic" in told and "edits none of the names that the instruction marks" in told

    def test_tests_that_passed_before_decide(self, sandbox):
        bench = TestBench(sandbox, FILES, "unittest")
        assert bench.before.passed == ("tests.test_shop.ShopTest.test_total",)
        wrong = trace(replacement="return max($X)")
        ranked = judge([(SHOWN, wrong, -0.1), (SHOWN, trace(), -0.9)], REQUEST, sandbox, bench)
        assert [proposal.trace for proposal in ranked] == [trace(), wrong]
        assert ranked[1].broken_tests == ("tests.test_shop.ShopTest.test_total",) and not ranked[1].usable
        assert ranked[0].usable  # the test that always failed is not held against it

    def test_with_tests_the_tests_themselves_are_protected(self, sandbox):
        bench = TestBench(sandbox, FILES, "unittest")
        cheat = trace(pattern="self.fail()", replacement="pass", files=("**/*.py",))
        assert judge([(SHOWN, cheat, -0.1)], REQUEST, sandbox, bench)[0].result.status is Status.PATH_DENIED
        assert judge([(SHOWN, cheat, -0.1)], Request("", FILES), sandbox, None)[0].usable

    @pytest.mark.parametrize(
        ("files", "message"),
        [
            ({"a.py": ""}, "no unittest test file"),
            ({"test_a.py": "import gone\n"}, "no unittest test passes before"),
            ({f"f{n}.py": "" for n in range(600)}, "at most 512"),
            ({f"f{n}.txt": "x" * (1 << 20) for n in range(66)}, "66 MiB of files, .* at most 64"),
        ],
    )
    def test_tests_that_can_tell_nothing_are_refused(self, sandbox, files, message):
        with pytest.raises(DirectoryError, match=message):
            TestBench(sandbox, files, "unittest")

    def test_tests_that_need_longer_are_refused_before_any_edit(self):
        methods = "    def test_a(self):\n        pass\n\n    def test_b(self):\n        time.sleep(60)\n"
        slow = {"test_a.py": f"import time\nimport unittest\n\n\nclass T(unittest.TestCase):\n{methods}"}
        told = r"do not come to their end even before the edit \(.*after 1 that pass\); raise --test_seconds"
        with Sandbox(Request("", slow, test_seconds=4.0).sandbox()) as quick, pytest.raises(DirectoryError, match=told):
            TestBench(quick, slow, "unittest")

    def test_an_action_that_reaches_too_many_files_is_not_run(self, sandbox):
        many = {f"app/f{n}.py": "x = 1\n" for n in range(600)}
        assert judge([(SHOWN, trace(), -0.1)], Request("", many), sandbox, None)[0].result.status is Status.TOO_MANY
        narrow = trace(files=("app/f1.py",))
        assert judge([(SHOWN, narrow, -0.1)], Request("", many), sandbox, None)[0].result.status is Status.NO_MATCH


def test_no_proposals_are_told_in_words():
    output = io.StringIO()
    rewrite_view.show(Console(file=output, width=200), [])
    assert output.getvalue() == "No answer was a trace, so there is nothing to execute.\n"


def step(root, monkeypatch, answer=None, **writing):
    """Exit code of a step with the right proposal, asked on a terminal that gives `answer`, None: that was closed."""

    def propose(request):
        with Sandbox() as sandbox:
            return judge([(SHOWN, trace(), -0.5)], request, sandbox, None)

    def asked(prompt):
        if answer is None:
            raise EOFError
        return answer

    monkeypatch.setattr("builtins.input", asked)
    monkeypatch.setattr(sys, "stdin", mock.Mock(isatty=lambda: True))
    return take_step(root, Request("Call `sum`.", {}), propose, Writing(**writing))


def test_what_is_asked_before_writing(tree, monkeypatch, capsys):
    before = (tree / "app/shop.py").read_text()
    assert step(tree, monkeypatch) == 0 and "written: nothing (--apply writes the first)" in capsys.readouterr().out
    for answer in (None, "", "n"):
        assert step(tree, monkeypatch, answer, apply=True) == 1
        assert capsys.readouterr().out.endswith("written: nothing\n")
    assert (tree / "app/shop.py").read_text() == before
    assert step(tree, monkeypatch, "Y", apply=True) == 0 and (tree / "app/shop.py").read_text() != before


def test_a_directory_that_is_none_is_said_so_whatever_is_to_be_done(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "gone", tmp_path / "file"):
        with pytest.raises(DirectoryError, match="not a directory"):
            step(path, monkeypatch, apply=True)


def test_text_of_a_model_cannot_steer_the_terminal(sandbox):
    hostile = trace(replacement="return '\x1b[2J[red]$X'")
    hostile = dataclasses.replace(hostile, think="\x1b]0;owned\x07[bold]")
    proposals = judge([(SHOWN, hostile, -0.5)], REQUEST, sandbox, None)
    output = io.StringIO()
    rewrite_view.show(Console(file=output, force_terminal=True, width=200), proposals)
    assert "\x1b[2J" not in output.getvalue() and "\x1b]0" not in output.getvalue() and "\x07" not in output.getvalue()
    assert "[red]" in output.getvalue() and "\\x1b]0;owned" in output.getvalue()
    value = json.loads(rewrite_view.as_json(proposals, ["a.py"]))
    assert value["applied"] == ["a.py"] and value["proposals"][0]["matches"] == {"app/shop.py": 1}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run with a checkpoint of the tiny model."""
    path = tmp_path_factory.mktemp("run")
    config = tiny_config()
    write_json(path / "config.json", config.to_dict())
    config.mesh.data = 1
    with Run(config, path) as run:
        run.save(1, {})
        run.wait()
    return path


def test_a_checkpoints_proposals_are_executed(workdir):
    assert jax.device_count() > 1  # as on a training machine; one device is enough here
    request = Request("Rename `total` to `sum_up`.", FILES, places=2, candidates=3, runner="unittest")
    config = tiny_config()
    config.sandbox.server = "http://127.0.0.1:9"  # which scored its training, and is gone
    proposals = rewrite.propose(config, workdir, request)
    assert 2 <= len(proposals) <= 6
    assert {proposal.shown.path for proposal in proposals} == {"app/shop.py", "tests/test_shop.py"}
    assert not any(proposal.usable for proposal in proposals)  # its weights are random


def test_that_there_is_nothing_to_do_is_said_before_a_model_is_loaded(tmp_path):
    for config in (tiny_config(), None):
        with pytest.raises(DirectoryError, match="no file holds a word"):
            rewrite.propose(config, tmp_path / "nothing", Request("Delete `zebra`.", FILES))


# What the command does once there are proposals, with the model's part replaced by two written ones.
_DRIVER = """
import sys
sys.path[:0] = [{root!r}]
import launch.rewrite
from srl_jax import rewrite
from srl_jax.sandbox import Sandbox
from tests.rewrite_test import SHOWN, trace

def propose(config, path, request):
    traces = [(SHOWN, trace(), -0.5), (SHOWN, trace(pattern="gone"), -0.1)]
    with Sandbox() as sandbox:
        return rewrite.judge(traces, request, sandbox, None)

rewrite.propose = propose
launch.rewrite.cli.run(launch.rewrite.main, launch.rewrite.worktree.DirectoryError, launch.rewrite.NotARun)
"""


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "project"
    for path, text in FILES.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    for command in (["init", "-q"], ["add", "-A"], ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "1"]):
        subprocess.run(["git", "-C", root, *command], check=True)
    return root


def command(workdir, tree, *options):
    call = [sys.executable, "-c", _DRIVER.format(root=str(ROOT)), f"--workdir={workdir}", f"--directory={tree}"]
    call += ["--instruction=Call `sum` instead of `add_all`.", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(call, capture_output=True, text=True, timeout=300, env=environment, stdin=subprocess.DEVNULL)


def test_without_apply_nothing_is_written(workdir, tree):
    done = command(workdir, tree)
    assert done.returncode == 0, done.stderr
    assert "return sum(xs)" in done.stdout and "written: nothing" in done.stdout
    status = subprocess.run(["git", "-C", tree, "status", "--porcelain"], capture_output=True, text=True, check=True)
    assert status.stdout == ""


def test_a_step_is_applied_and_its_state_kept_for_the_next(workdir, tree):
    done = command(workdir, tree, "--apply", "--yes", "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["applied"] == ["app/shop.py"] and len(answer["proposals"]) == 2
    assert (tree / "app/shop.py").read_text() == FILES["app/shop.py"].replace("return add_all(xs)", "return sum(xs)")
    assert json.loads((tree / ".srl_jax/state.json").read_text())["decisions"] == ["call sum"]
    again = command(workdir, tree, "--apply", "--yes")
    assert again.returncode == 2 and "uncommitted changes (app/shop.py)" in again.stderr
    forced = command(workdir, tree, "--apply", "--yes", "--force", "--json")
    assert forced.returncode == 1 and json.loads(forced.stdout)["applied"] is None  # nothing is left to rewrite


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--apply"], "add --yes"),
        (["--model=x"], "workdir"),
        (["--directory=/nonexistent"], "not a directory"),
        (["--tests=rspec"], "rspec"),
    ],
)
def test_mistakes_are_one_line(workdir, tree, options, message):
    done = command(workdir, tree, *options)
    assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    config = tiny_config()
    with Run(config, folder / "run") as run:
        lora = perturbed(run.state.lora)
        model = (run.student.decoder, run.student.params, lora, run.student.tokenizer)
        export_merged(folder / "merged", *model, settings=config.to_dict())
        export_adapter(folder / "adapter", *model, base=config.model.source, settings=config.to_dict())
        yield folder, run.student, lora


class TestExported:
    """What `launch/export.py` writes proposes what the run itself does."""

    @pytest.mark.parametrize("form", ["merged", "adapter"])
    def test_it_draws_what_the_run_draws(self, exported, form):
        folder, student, lora = exported
        config, loaded, adapters = load_exported(folder / form)
        assert (adapters is None) == (form == "merged")
        assert config.sampling == tiny_config().sampling and config.data.few_shot == 0
        assert loaded.tokenizer.tag_ids == student.tokenizer.tag_ids
        request = Request("Call `add_all` no more.", FILES)
        prompts = [ids for _, ids in prompt_tasks(student, config, request)]
        assert [ids for _, ids in prompt_tasks(loaded, config, request)] == prompts
        theirs = draw_traces(loaded, adapters, prompts, config, 3, seed=1)
        ours = draw_traces(student, lora, prompts, config, 3, seed=1)
        assert [[trace for trace, _ in some] for some in theirs] == [[trace for trace, _ in some] for some in ours]
        assert [p for some in theirs for _, p in some] == pytest.approx([p for some in ours for _, p in some], abs=1e-4)

    def test_proposals_come_of_it_and_the_lack_of_settings_is_no_hindrance(self, exported, tmp_path):
        folder, _, _ = exported
        shutil.copytree(folder / "merged", tmp_path / "bare")
        settings = json.loads((tmp_path / "bare" / "srl_jax.json").read_text())
        assert settings["model"]["source"] == "random:tiny"
        request = Request("Call `add_all` no more.", FILES, candidates=2)
        assert 1 <= len(rewrite.propose(None, tmp_path / "bare", request)) <= 2
        (tmp_path / "bare" / "srl_jax.json").unlink()
        config, _, _ = load_exported(tmp_path / "bare")
        assert config.sampling == TrainConfig().sampling

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"use_dora": True}, BadWeights, "use_dora is not that of a plain LoRA"),
            ({"r": None}, BadWeights, "r is not that of a plain LoRA"),
            ({"r": 8}, BadWeights, "has shape"),
            ({"base_model_name_or_path": "somebody/model"}, ConfigError, "is not here"),
        ],
    )
    def test_an_adapter_that_is_not_ours_is_refused(self, exported, tmp_path, change, error, message):
        folder, _, _ = exported
        shutil.copytree(folder / "adapter", tmp_path / "a")
        file = tmp_path / "a" / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
        with pytest.raises(error, match=message):
            load_exported(tmp_path / "a")

    def test_a_directory_that_is_no_model_is_refused(self, tmp_path):
        with pytest.raises(ConfigError, match=r"holds neither config\.json nor adapter_config\.json"):
            load_exported(tmp_path)

    def test_a_run_and_an_export_are_not_taken_for_each_other(self, exported, workdir):
        folder, _, _ = exported
        with pytest.raises(ConfigError, match="is a run: give it as --workdir"):
            load_exported(workdir)
        with pytest.raises(NotARun, match=r"merged/config\.json is not that of a run"):
            read_config(folder / "merged")


def test_a_workdir_that_is_no_run(tmp_path, tree):
    done = command(tmp_path, tree)
    assert done.returncode == 2 and "not a run" in done.stderr
