"""The reward server: bad requests get clear answers, restarts lose nothing.  Everything here stays on the loopback."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from srl_jax import assets
from srl_jax.bounded_http import ServerLimits
from srl_jax.config import ConfigError, SandboxSettings
from srl_jax.rewards import REWARD_VERSION, RewardConfig
from srl_jax.run import Run
from srl_jax.sandbox import EngineResult, EnvReport, SandboxConfig, SandboxCrash, Status
from srl_jax.sandbox.client import ClientConfig, RemoteRewardService
from srl_jax.sandbox.server import make_app
from srl_jax.sandbox.service import RewardService, Score, ScoreRequest, ServiceConfig
from srl_jax.sandbox.wire import (
    SERVER_TOKEN,
    Contract,
    RemoteError,
    decode_request,
    decode_runners,
    decode_scores,
    encode_request,
    encode_scores,
)
from srl_jax.tokenizer import load_tokenizer
from srl_jax.trace import parse_trace, render_trace
from tests.fakes import HashEmbedder, teacher_record, tiny_config
from tests.http_server import running

ROOT = Path(__file__).parents[1]
TOKEN = "a token of some length"
RUNNERS = frozenset({"unittest", "node"})
CONTRACT = Contract("tokenizer", RewardConfig())
HURRIED = ClientConfig(timeout_s=20.0, patience_s=20.0, first_pause_s=0.05, max_pause_s=0.2)
REPORT = EnvReport(True, Status.OK, "", "", 1, 0, "not_run", (), (), "", None, 0.1, "a fake", {}, (("a.py", 0, 1),))


class FakeSandbox:
    """Executes by calling `answer`; test_the_launched_server_executes has the real one."""

    def __init__(self, answer=lambda: REPORT):
        self.config = SandboxConfig(slots=4)
        self.answer = answer

    def execute(self, action, files, *, tests, expected):
        return self.answer()

    def apply(self, action, files, *, protected):
        return EngineResult(Status.OK, files, places=frozenset(REPORT.places))


def words(text):
    return len(text.split())


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def serving(sandbox=None, port=0, limits=None, contract=CONTRACT, **config):
    """A server on the loopback, in a thread: its address."""
    with (
        RewardService(HashEmbedder(), words, config=ServiceConfig(**config)) as plain,
        RewardService(HashEmbedder(), words, sandbox=sandbox or FakeSandbox(), config=ServiceConfig(**config)) as judge,
    ):
        app = make_app({False: plain, True: judge}, contract, token=TOKEN, runners=RUNNERS, limits=limits)
        with running(app, port, limits) as (url, server):
            yield url, server


def client(url, token=TOKEN, contract=CONTRACT, execute=False, config=HURRIED):
    return RemoteRewardService(url, token, contract, execute=execute, config=config)


def items(count=3):
    """Completions of every kind: right, partly right, malformed, and with a lone surrogate."""
    found = []
    for number in range(count):
        record = teacher_record(number)
        other = render_trace(dataclasses.replace(parse_trace(record.trace), think=f"another thought {number}"))
        found += [ScoreRequest(text, record) for text in (record.trace, other, "malformed", "\ud800 lone")]
    return found


def post(url, body, token=TOKEN, **more):
    return httpx.post(f"{url}/v1/score", content=body, headers={"Authorization": f"Bearer {token}"}, **more)


@pytest.fixture(scope="module")
def url():
    with serving() as (address, _):
        yield address


class TestWire:
    def test_requests_and_scores_come_back_the_same(self):
        asked = items()
        request = decode_request(encode_request(asked, CONTRACT, execute=True))
        assert request.items == asked
        assert request.execute
        assert CONTRACT.difference(request.contract) is None

    def test_how_long_an_execution_waited_comes_back_too(self):
        sent = [Score(None, None, "lost", queued_s=waited) for waited in (0.25, None)]
        assert [score.queued_s for score in decode_scores(encode_scores(sent), 2)] == [0.25, None]

    def test_a_group_names_its_record_once(self):
        record = teacher_record(0)
        body = encode_request([ScoreRequest(f"text {i}", record) for i in range(8)], CONTRACT, execute=False)
        assert len(json.loads(body)["records"]) == 1

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            (Contract("another", RewardConfig()), "tokenizer"),
            (Contract("tokenizer", RewardConfig(brevity_penalty=0.1)), "brevity_penalty"),
        ],
    )
    def test_a_contract_names_what_differs(self, change, named):
        assert named in CONTRACT.difference(change.to_dict())

    def test_a_contract_covers_the_reward_version(self):
        assert CONTRACT.to_dict()["version"] == REWARD_VERSION
        assert "version" in CONTRACT.difference({**CONTRACT.to_dict(), "version": "srl-reward/0"})
        assert CONTRACT.difference(None)

    @pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"scores": [{}]}', b'{"scores": []}', b"\xff"])
    def test_answers_that_are_none(self, body):
        with pytest.raises(ValueError, match="answer"):
            decode_scores(body, 1)

    @pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"runners": "unittest"}', b'{"runners": [1]}'])
    def test_runners_that_are_none(self, body):
        with pytest.raises(ValueError, match="answer"):
            decode_runners(body)


class TestScores:
    @pytest.mark.parametrize("execute", [False, True])
    def test_the_same_as_here(self, url, execute):
        sandbox = FakeSandbox() if execute else None
        with RewardService(HashEmbedder(), words, sandbox=sandbox) as local, client(url, execute=execute) as remote:
            assert remote.connect() == RUNNERS
            asked = items()
            expected = local.score(asked)
            assert remote.score(asked) == expected
            assert remote.submit(asked).result() == expected
            assert remote.counts["malformed"] == local.counts["malformed"] * 2
        assert (expected[0].report is not None) == execute
        assert expected[0].match_f1 == (1.0 if execute else None)

    def test_an_empty_batch(self, url):
        with client(url) as remote:
            assert remote.score([]) == []

    def test_connections_are_reused(self, url):
        with client(url) as remote:
            for _ in range(5):
                remote.score(items(1))
            pool = remote._http._transport._pool
            assert len(pool.connections) == 1

    def test_what_a_sandbox_cannot_do_is_unscored_at_the_client_too(self):
        def lost():
            raise SandboxCrash("lost")

        with serving(FakeSandbox(lost), retries=0) as (url, _), client(url, execute=True) as remote:
            score = remote.score(items(1))[0]
        assert score.report is None
        assert score.unscored == "infrastructure: lost"


class TestBadRequests:
    def test_a_wrong_token(self, url):
        assert post(url, b"{}", token="wrong").status_code == 401
        assert httpx.post(f"{url}/v1/score", content=b"{}").status_code == 401
        for path in ("/metrics", "/v1/runners"):
            assert httpx.get(f"{url}{path}").status_code == 401
        with client(url, token="wrong") as remote, pytest.raises(RemoteError, match=r"401.*token"):
            remote.score(items(1))

    @pytest.mark.parametrize("token", ["", "short"])
    def test_a_token_that_is_no_secret(self, token):
        with pytest.raises(ValueError, match="token"):
            make_app({}, CONTRACT, token=token)

    def test_another_contract(self, url):
        with (
            client(url, contract=Contract("tokenizer", RewardConfig(malformed=-0.1))) as remote,
            pytest.raises(RemoteError, match=r"malformed is -0\.2 here and -0\.1"),
        ):
            remote.connect()

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            (lambda m: b"{", "JSON"),
            (lambda m: b"[" * 100_000, "JSON"),
            (lambda m: b"\xff\xfe", "JSON"),
            (lambda m: b"[]", "object"),
            (lambda m: {**m, "more": 1}, "object"),
            (lambda m: {**m, "execute": 1}, "execute"),
            (lambda m: {**m, "records": {}}, "records"),
            (lambda m: {**m, "records": [1, 2]}, r"records\[0\]"),
            (lambda m: {**m, "records": ["{}"]}, r"records\[0\]"),
            (lambda m: {**m, "items": [[True, "x"]]}, r"items\[0\]"),
            (lambda m: {**m, "items": [[0, "x"], [9, "x"]]}, r"items\[1\]"),
            (lambda m: {**m, "items": [[-1, "x"]]}, r"items\[0\]"),
        ],
    )
    def test_malformed_bodies_are_named(self, url, change, named):
        import re

        body = change(json.loads(encode_request(items(1), CONTRACT, execute=False)))
        answer = post(url, body if isinstance(body, bytes) else json.dumps(body).encode())
        assert answer.status_code == 400
        assert re.search(named, answer.json()["error"])

    def test_an_oversize_body(self):
        with serving(limits=ServerLimits(max_body_bytes=10_000, discard_s=0.3)) as (url, _):
            answer = post(url, b"x" * 20_000)
            assert (answer.status_code, "10000" in answer.text) == (413, True)

            def endless():  # chunked, so that nothing is announced
                while True:
                    yield b"x" * 1000

            assert post(url, endless()).status_code == 413
            with client(url) as remote, pytest.raises(RemoteError, match=r"413.*fewer items"):
                remote.score(items(30))
            with client(url) as remote:
                assert len(remote.score(items(1))) == 4

    def test_all_bodies_together_are_bounded(self):
        with serving(limits=ServerLimits(max_total_bytes=1000)) as (url, _):
            answer = post(url, b"x" * 5000)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")

    def test_slow_clients_are_cut_and_hold_up_nobody(self):
        limits = ServerLimits(body_s=0.5, header_s=0.5)
        with serving(limits=limits) as (url, _), client(url) as remote:
            address = (url.split("/")[2].split(":")[0], int(url.rsplit(":", 1)[1]))
            silent, headers, body = (socket.create_connection(address, 5) for _ in range(3))
            headers.sendall(b"POST /v1/score HTTP/1.1\r\nHost: x\r\nX-Slow:")
            start = f"POST /v1/score HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
            body.sendall(f"{start}Content-Length: 99\r\n\r\n{{".encode())
            assert len(remote.score(items(1))) == 4
            assert silent.recv(1000) == b""
            assert headers.recv(1000) == b""
            assert b" 408 " in body.recv(4000).split(b"\r\n")[0]
            for opened in (silent, headers, body):
                opened.close()


class TestLoad:
    def test_500_requests_at_once_are_all_answered(self):
        asked = items(1)
        body = encode_request(asked, CONTRACT, execute=True)
        # On a loaded machine 500 connections may be open for long before the last one's headers are sent.
        with serving(limits=ServerLimits(threads=4, header_s=120)) as (url, _):
            with client(url, execute=True) as remote:
                expected = remote.score(asked)

            async def flood():
                limits = httpx.Limits(max_connections=500)
                headers = {"Authorization": f"Bearer {TOKEN}"}
                async with httpx.AsyncClient(limits=limits, timeout=300, headers=headers) as http:
                    return await asyncio.gather(*[http.post(f"{url}/v1/score", content=body) for _ in range(500)])

            answers = asyncio.run(flood())
            counts = metrics(url)
        assert [answer.status_code for answer in answers] == [200] * 500
        assert {answer.content for answer in answers} == {answers[0].content}
        assert decode_scores(answers[0].content, len(asked)) == expected
        assert counts["srl_reward_requests_total", "200"] == 501
        assert counts["srl_reward_requests_under_way", ""] == 0
        assert counts["srl_reward_body_bytes", ""] == 0

    def test_what_is_too_much_is_refused_and_comes_back(self):
        gate = threading.Event()
        sandbox = FakeSandbox(lambda: gate.wait(20) and REPORT)
        with serving(sandbox, limits=ServerLimits(max_requests=2, threads=2)) as (url, _):
            with ThreadPoolExecutor(6) as pool, client(url, execute=True) as remote:
                futures = [pool.submit(remote.score, items(1)) for _ in range(6)]
                while not metrics(url).get(("srl_reward_requests_total", "503")):
                    time.sleep(0.02)
                gate.set()
                answers = [future.result() for future in futures]
            assert all(score.reward for answer in answers for score in answer)
            assert remote.counts["retries"] > 0


def metrics(url):
    text = httpx.get(f"{url}/metrics", headers={"Authorization": f"Bearer {TOKEN}"}).text
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name, sample.labels.get("status", "")] = sample.value
    return found


def test_health_needs_no_token_and_metrics_count_the_service(url):
    assert httpx.get(f"{url}/healthz").json() == {"status": "ok"}
    assert httpx.get(f"{url}/docs").status_code == 404
    with client(url) as remote:
        remote.score(items(1))
    text = httpx.get(f"{url}/metrics", headers={"Authorization": f"Bearer {TOKEN}"}).text
    assert 'srl_reward_completions_total{count="requests",executing="false"}' in text


class TestRestart:
    def test_in_mid_batch_nothing_is_lost(self):
        """The first server dies with the batch in its hands; the second one, at the same address, answers it."""
        port, begun = free_port(), threading.Event()
        gate = threading.Event()

        def stuck():
            begun.set()
            gate.wait(20)
            return REPORT

        with client(f"http://127.0.0.1:{port}", execute=True) as remote:
            with serving(FakeSandbox(stuck), port=port) as (_, server):
                future = remote.submit(items())
                assert begun.wait(10)
                server.force_exit = True  # the connection is dropped without an answer
                server.should_exit = True
                time.sleep(0.5)
                gate.set()
            assert not future.done()
            with serving(port=port):
                scores = future.result(20)
            assert remote.counts["retries"] >= 1
        with RewardService(HashEmbedder(), words, sandbox=FakeSandbox()) as local:
            assert scores == local.score(items())

    def test_a_stop_finishes_what_was_taken(self):
        begun = threading.Event()

        def slow():
            begun.set()
            time.sleep(0.5)
            return REPORT

        with serving(FakeSandbox(slow)) as (url, server), client(url, execute=True) as remote:
            future = remote.submit(items(1))
            assert begun.wait(10)
            server.should_exit = True
            scores = future.result(10)
            assert "retries" not in remote.counts
        assert scores[0].report == REPORT

    def test_a_server_that_stays_away_leaves_the_batch_unscored(self):
        hasty = dataclasses.replace(HURRIED, patience_s=0.3)
        with client(f"http://127.0.0.1:{free_port()}", config=hasty) as remote:
            with pytest.raises(RemoteError, match="no reward server at"):
                remote.connect()
            scores = remote.score(items(1))
            assert remote.counts["unscored"] == 4
        assert all(s.reward is None and s.unscored.startswith("infrastructure: reward server") for s in scores)

    def test_closing_the_client_ends_its_waiting(self):
        remote = client(f"http://127.0.0.1:{free_port()}", config=dataclasses.replace(HURRIED, patience_s=99))
        future = remote.submit(items(1))
        time.sleep(0.2)
        remote.close()
        assert future.result(0)[0].reward is None


class TestRun:
    """A run whose rewards come from a server: it executes nothing itself."""

    def test_a_run_takes_rewards_and_runners_from_its_server(self, tmp_path, monkeypatch):
        contract = Contract(load_tokenizer(assets.model_path("random:tiny")).fingerprint, RewardConfig())
        config = tiny_config()
        config.eval.execute, config.sandbox.server = True, "http://127.0.0.1:1"
        with pytest.raises(ConfigError, match=r"sandbox\.server"), Run(config, tmp_path):
            pass
        monkeypatch.setenv(SERVER_TOKEN, TOKEN)
        monkeypatch.setattr("srl_jax.run.Sandbox", None)
        with serving(contract=contract) as (config.sandbox.server, _), Run(config, tmp_path) as run:
            assert run.runners == RUNNERS
            record = teacher_record(0)
            assert run.rewards.score([ScoreRequest(record.trace, record)])[0].report is None
            assert run.judge.score([ScoreRequest(record.trace, record)])[0].report == REPORT

    def test_which_servers_are_a_ray_cluster(self):
        settings = SandboxSettings()
        assert settings.ray_address is None
        for server, address in (("http://x", None), ("ray", "auto"), ("ray://h:1", "ray://h:1"), ("rayon", None)):
            settings.server = server
            assert settings.ray_address == address


class TestLaunched:
    def launch(self, *flags, token=TOKEN):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), SERVER_TOKEN: token}
        command = [sys.executable, str(ROOT / "launch/reward_server.py"), f"--config={ROOT}/configs/tiny.py", *flags]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def test_a_missing_token_is_one_line(self):
        with self.launch(token="short") as process:
            _, said = process.communicate(timeout=120)
        assert process.returncode == 2
        assert SERVER_TOKEN in said
        assert "Traceback" not in said

    def test_the_launched_server_executes_and_stops_on_a_signal(self):
        port = free_port()
        contract = Contract(load_tokenizer(assets.model_path("random:tiny")).fingerprint, RewardConfig())
        with self.launch(f"--port={port}") as process:
            try:
                assert f"http://127.0.0.1:{port}" in process.stdout.readline()
                with client(f"http://127.0.0.1:{port}", contract=contract, execute=True) as remote:
                    score = remote.score([ScoreRequest(teacher_record(0).trace, teacher_record(0))])[0]
                assert score.reward.total == 1.0
                assert score.report.success
                assert score.match_f1 == 1.0
            finally:
                process.send_signal(signal.SIGTERM)
            _, said = process.communicate(timeout=60)
        assert process.returncode == 0, said
