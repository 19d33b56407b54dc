"""A teacher asked about somebody's code: over the wire, executed and ranked like a student's answers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from data_pipeline.errors import DataError
from data_pipeline.propose import propose
from srl_jax.proposals import Request
from srl_jax.sandbox import Status
from srl_jax.trace import Action, StateUpdate, Trace, render_trace
from srl_jax.worktree import DirectoryError
from tests.hostile_server import serve
from tests.tiny_tokenizer import tiny_tokenizer

ROOT = Path(__file__).parents[1]
FILES = {"app.py": "def total(xs):\n    return add_all(xs)\n"}


def trace(pattern: str, replacement: str) -> str:
    state = StateUpdate(("call sum",), (), (), ("run the tests",))
    return render_trace(Trace("sum is built in", Action("python", pattern, replacement, ("app.py",)), state))


RIGHT, WRONG = trace("add_all($X)", "sum($X)"), trace("gone($X)", "sum($X)")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer(atomic_tags=False).save(folder)
    return folder


@pytest.fixture
def teacher_file(tmp_path, tokenizer):
    def write(url, **changes):
        value = yaml.safe_load((ROOT / "configs" / "teacher.yaml").read_text())
        limits = {"concurrency": 1, "attempts": 1, "backoff_s": 0.01, "timeout_s": 5.0}
        value["teachers"][0] |= {"base_url": url, "tokenizer": str(tokenizer), "limits": limits, **changes}
        path = tmp_path / "teacher.yaml"
        path.write_text(yaml.safe_dump(value))
        return path

    return write


def test_answers_are_executed_and_the_usable_one_stands_first(teacher_file):
    said = iter([WRONG, "<think>I will not</think>", RIGHT, RIGHT])
    with serve(lambda exchange: exchange.stream(next(said))) as (url, requests):
        request = Request("Call `sum` instead of `add_all`.", FILES, candidates=4, seed=7)
        proposals = propose(teacher_file(url), request)
    assert [proposal.result.status for proposal in proposals] == [Status.OK, Status.NO_MATCH]
    assert proposals[0].usable and proposals[0].logprob is None and proposals[0].to_dict()["logprob"] is None
    assert proposals[0].result.files_after == {"app.py": "def total(xs):\n    return sum(xs)\n"}
    assert [asked["body"]["seed"] for asked in requests] == [7, 8, 9, 10], "another seed, another answer"
    assert "return add_all(xs)" in requests[0]["body"]["messages"][-1]["content"]


def test_silence_is_an_error_and_one_answer_is_enough(teacher_file):
    with serve(lambda exchange: exchange.status(500)) as (url, requests):
        with pytest.raises(DataError, match=rf"no answer from {url} \(http_500\); see that its server runs, or mend"):
            propose(teacher_file(url), Request("Call `add_all`.", FILES, candidates=8))
        assert len(requests) == 2, "who waits is told soon"
    with pytest.raises(DataError, match=r"no answer from http://127.0.0.1:9/v1 \(connection\)"):
        propose(teacher_file("http://127.0.0.1:9/v1"), Request("Call `add_all`.", FILES))
    turn = iter([lambda exchange: exchange.status(500), lambda exchange: exchange.stream(RIGHT)])
    with serve(lambda exchange: next(turn)(exchange)) as (url, _):
        assert len(propose(teacher_file(url), Request("Call `add_all`.", FILES, candidates=2))) == 1


def test_what_gives_nothing_to_do_asks_nobody(teacher_file):
    with serve(lambda exchange: exchange.stream(RIGHT)) as (url, requests):
        with pytest.raises(DirectoryError, match="no file holds a word"):
            propose(teacher_file(url), Request("Delete `zebra`.", FILES))
        with pytest.raises(DataError, match="names no endpoint"):
            propose(teacher_file(url, kind="oracle"), Request("Call `add_all`.", FILES))
    assert requests == []


def test_the_command_asks_the_endpoint_and_needs_no_model(teacher_file, tmp_path):
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "app.py").write_text(FILES["app.py"])
    with serve(lambda exchange: exchange.stream(RIGHT)) as (url, _):
        command = [sys.executable, "-X", "importtime", str(ROOT / "launch" / "rewrite.py")]
        command += [f"--teacher={teacher_file(url)}", f"--directory={tmp_path / 'code'}"]
        command += ["--instruction=Call `sum` instead of `add_all`.", "--candidates=1", "--json"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    answer = json.loads(done.stdout)
    assert answer["applied"] is None and answer["proposals"][0]["usable"]
    assert "+    return sum(xs)" in answer["proposals"][0]["diff"]
    assert not [line for line in done.stderr.splitlines() if line.endswith("| jax")], "no accelerator stack"
    assert (tmp_path / "code" / "app.py").read_text() == FILES["app.py"]
