"""A served student: what it says always parses, and depends on what it was asked alone."""

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest

from data_pipeline.endpoint import EndpointTeacher
from data_pipeline.teacher_config import Limits, load_teacher_config
from srl_jax.bounded_http import ServerLimits, listen
from srl_jax.config import ConfigError
from srl_jax.rollout import decode_completions
from srl_jax.serving import Batcher, make_app
from srl_jax.tokenizer import prompt_pieces
from srl_jax.trace import parse_trace
from tests.fakes import teacher_record
from tests.http_server import running

CONFIG = Path(__file__).parents[1] / "configs" / "teacher.yaml"
TOKEN = "a key of some length"
WIDTH = 192
LIMITS = ServerLimits(max_body_bytes=20_000)


def asking(text="Rename `a` to `b`.", **fields):
    return {"model": "tiny", "messages": [{"role": "user", "content": text}], "temperature": 1.0, "seed": 1} | fields


@pytest.fixture(scope="module")
def batcher(student, lora):
    with Batcher(student, lora, max_prompt_tokens=WIDTH, rows=4) as batcher:
        yield batcher


@pytest.fixture(scope="module")
def url(batcher):
    with running(make_app(batcher, name="tiny", token=TOKEN, limits=LIMITS), limits=LIMITS) as (url, _):
        yield f"{url}/v1"


def post(url, body, token=TOKEN):
    return httpx.post(
        f"{url}/chat/completions", json=body, timeout=120, headers={"Authorization": f"Bearer {token}"}
    )  # fmt: skip


def said(url, body):
    response = post(url, body)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def test_answers_parse_and_hang_on_conversation_settings_and_seed_alone(url):
    asked = [asking(seed=seed) for seed in range(4)] + [asking("Remove `print`.", seed=1)]
    alone = [said(url, body) for body in asked]
    for text in alone:
        parse_trace(text)
    assert len(set(alone)) == len(asked)
    with ThreadPoolExecutor(len(asked)) as pool:
        assert list(pool.map(lambda body: said(url, body), asked)) == alone
    assert said(url, asking(temperature=0.0, seed=1)) == said(url, asking(temperature=0.0, seed=2))
    parse_trace(said(url, asking(temperature=0.5, top_p=0.9)))


def test_without_a_seed_no_two_answers_are_alike(url):
    assert len({said(url, asking(seed=None)) for _ in range(3)}) == 3


def test_an_answer_is_what_the_sampler_draws_for_the_prompt_of_training(url, student, lora):
    import jax
    import numpy as np

    from srl_jax.sampling import sample
    from srl_jax.student import pad_prompts

    record = teacher_record(0)
    ids = student.tokenizer.encode_prompt(record.task, few_shot=0)
    pieces = [piece if isinstance(piece, str) else piece.text for piece in prompt_pieces(record.task, few_shot=0)]
    turns = "".join(pieces).split("<|im_start|>")[1:-1]
    messages = [
        dict(zip(("role", "content"), turn.removesuffix("<|im_end|>\n").split("\n", 1), strict=False)) for turn in turns
    ]
    assert [turn["role"] for turn in messages] == ["system", "user"]
    assert student.tokenizer.encode_conversation((turn["role"], turn["content"]) for turn in messages) == ids
    tokens, lengths = pad_prompts([ids], WIDTH, student.tokenizer.pad_id)
    drawn = sample(
        student.decoder, student.sampling_variables(lora), student.automaton, tokens, lengths,
        jax.random.key(7)[None], group_size=1, settings=student.sampling, pad_id=student.tokenizer.pad_id,
    )  # fmt: skip
    expected = decode_completions(student, np.asarray(drawn.tokens)[0], np.asarray(drawn.mask)[0])[0]
    response = post(url, {"model": "tiny", "messages": messages, "seed": 7}).json()
    assert response["choices"][0]["message"]["content"] == expected
    assert response["usage"]["prompt_tokens"] == len(ids)
    assert response["usage"]["completion_tokens"] == int(np.asarray(drawn.mask).sum())


def test_tags_of_a_user_are_text(student):
    for role, count in (("user", 0), ("system", 1), ("assistant", 1)):
        ids = student.tokenizer.encode_conversation([(role, "<think>")])
        assert ids.count(student.tokenizer.tag_ids[0]) == count


def test_openais_client_and_a_teacher_are_answered(url, monkeypatch):
    client = openai.OpenAI(base_url=url, api_key=TOKEN, max_retries=0)
    assert [model.id for model in client.models.list()] == ["tiny"]
    body = asking(seed=3)
    whole = client.chat.completions.create(**body)
    assert whole.choices[0].finish_reason == "stop"
    chunks = list(client.chat.completions.create(**body, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == "stop"

    monkeypatch.setenv("STUDENTS_KEY", TOKEN)
    config = load_teacher_config(CONFIG)
    config = dataclasses.replace(config, system="One rule.", anchors=())
    decoding = dataclasses.replace(config.teachers[0].decoding, max_think_tokens=512)
    spec = dataclasses.replace(
        config.teachers[0], base_url=url, model="tiny", api_key_env="STUDENTS_KEY", decoding=decoding,
        limits=Limits(concurrency=2, timeout_s=60.0),
    )  # fmt: skip
    from data_pipeline.tasks.catalogue import rule_named
    from data_pipeline.tasks.generated import generate

    answer = EndpointTeacher(config, spec).answer(generate(rule_named("python-rename-method"), 0, 0, 120))
    assert answer.cut == "" and answer.served_model == "tiny"
    parse_trace(answer.text)


@pytest.mark.parametrize(
    ("body", "status", "named"),
    [
        (asking(model="gpt"), 404, "tiny"),
        (asking("word " * 500), 400, str(WIDTH)),
        (asking(temperature=3.0), 400, "temperature"),
        (asking(max_tokens=5), 400, "max_tokens"),
        (asking(n=2), 400, "n:"),
        (asking(seed=-1), 400, "seed"),
        (asking(messages=[]), 400, "messages"),
        (asking(messages=[{"role": "tool", "content": "x"}]), 400, "messages.0.role"),
        ([], 400, "the body"),
        (asking("x" * 30_000), 413, "20000"),
    ],
)
def test_a_request_that_cannot_be_answered_is_told_why(url, body, status, named):
    response = post(url, body)
    assert response.status_code == status
    assert named in response.json()["error"]["message"]


def test_nulls_are_what_is_not_said(url):
    nulls = dict.fromkeys(("temperature", "top_p", "max_tokens", "n", "stream"))
    assert said(url, asking(**nulls)) == said(url, {k: v for k, v in asking().items() if k not in nulls})


def test_a_top_p_next_to_nothing_keeps_the_likeliest(url):
    assert said(url, asking(top_p=1e-60, seed=1)) == said(url, asking(top_p=0.01, seed=2))


def test_who_does_not_know_the_key_gets_nothing(url):
    assert post(url, asking(), token="another key of the same length").status_code == 401
    assert httpx.get(f"{url}/models").status_code == 401


def test_a_batch_that_fails_is_its_own_requests_affair(student, lora, monkeypatch):
    from srl_jax import serving

    with Batcher(student, lora, max_prompt_tokens=WIDTH) as batcher:
        asked = serving.Asked(**asking())
        with monkeypatch.context() as broken:
            broken.setattr(serving, "sample", lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                batcher.submit(asked).result(60)
        parse_trace(batcher.submit(asked).result(120).text)


def test_what_waits_at_the_end_is_cancelled(student, lora, monkeypatch):
    from srl_jax import serving

    begun, go_on = threading.Event(), threading.Event()
    real = serving.sample
    monkeypatch.setattr(serving, "sample", lambda *args, **kw: (begun.set(), go_on.wait(60), real(*args, **kw))[-1])
    with Batcher(student, lora, max_prompt_tokens=WIDTH, rows=1) as batcher:
        first = batcher.submit(serving.Asked(**asking()))
        assert begun.wait(60)
        others = [batcher.submit(serving.Asked(**asking(seed=seed))) for seed in range(3)]
        threading.Timer(0.5, go_on.set).start()
    parse_trace(first.result(0).text)
    assert all(other.cancelled() for other in others)


def test_a_failed_batch_is_an_error_object(student, lora, monkeypatch):
    from srl_jax import serving

    monkeypatch.setattr(serving, "sample", lambda *_, **__: 1 / 0)
    with (
        Batcher(student, lora, max_prompt_tokens=WIDTH) as batcher,
        running(make_app(batcher, name="tiny")) as (url, _),
    ):
        response = post(f"{url}/v1", asking())
    assert response.status_code == 500 and response.json()["error"]["type"] == "server_error"


def test_an_address_in_use_is_one_error():
    with listen("127.0.0.1", 0) as taken, pytest.raises(ConfigError, match="is not to be had"):
        listen("127.0.0.1", taken.getsockname()[1])
