"""Collecting traces from an endpoint: cut in the stream, retried, paced, resumed, paid for. The server is hostile."""

import dataclasses
import gzip
import json
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_pipeline.collect_traces import Collector, open_collector, spending
from data_pipeline.endpoint import EndpointTeacher
from data_pipeline.errors import DataError
from data_pipeline.paraphrase import ParaphrasingTeacher
from data_pipeline.raw_store import RawStore
from data_pipeline.stream_guard import THINK_TOO_LONG, StreamGuard
from data_pipeline.tasks.catalogue import rule_named
from data_pipeline.tasks.generated import generate
from data_pipeline.teacher import Answer, NoAnswer, OracleTeacher, TeacherMix
from data_pipeline.teacher_config import Limits, Price, load_teacher_config
from data_pipeline.write import write_raw
from srl_jax.trace import TAGS, Rejection, parse_trace
from tests.hostile_server import event, serve
from tests.tiny_tokenizer import tiny_tokenizer

CONFIG = Path(__file__).parents[1] / "configs" / "teacher.yaml"
TRACE = (
    '<think>keep it short</think>\n<action>{"language":"python","pattern":"f($X)","replacement":"g($X)","files":'
    '["a.py"]}</action>\n<state_update>{"decisions":[],"constraints":[],"open_issues":[],"next_focus":[]}</state_update>'
)


def drafts(count):
    return [generate(rule_named("python-rename-method"), index, 0, 300) for index in range(count)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer(atomic_tags=False).save(folder)
    return folder


@pytest.fixture
def teacher(tokenizer):
    def build(url, limits=None, **changes):
        config = load_teacher_config(CONFIG)
        quick = {"concurrency": 4, "attempts": 3, "backoff_s": 0.01, "timeout_s": 5.0, "stop_after_failures": 50}
        spec = dataclasses.replace(
            config.teachers[0], base_url=url, tokenizer=str(tokenizer), limits=Limits(**{**quick, **(limits or {})}),
            **changes,
        )  # fmt: skip
        return EndpointTeacher(config, spec)

    return build


def collect(teacher, asked, store=None, **options):
    with Collector(TeacherMix([teacher], [1.0]), store, **options) as collector:
        return list(collector.collect(asked))


# ------------------------------------------------------------------------------------------------- the guard


def guarded(pieces, cap=10**6):
    guard = StreamGuard(len, cap)
    for piece in pieces:
        if not guard.feed(piece):
            break
    return guard


@settings(max_examples=40)
@given(st.data())
def test_a_trace_is_cut_at_its_end_however_it_is_sliced(data):
    text = data.draw(st.sampled_from(["", " \n"])) + TRACE
    stream = text + data.draw(st.sampled_from(["", "\n\nI hope this helps!", "<think>again", TRACE]))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=30)))
    pieces = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    guard = guarded(pieces)
    assert guard.done and not guard.cut and guard.text == text and parse_trace(guard.text)


def test_halves_of_a_character_are_put_together_and_a_lone_one_is_counted(teacher, tmp_path):
    emoji = TRACE.replace("<think>", "<think>\U0001f600 ", 1)
    place = emoji.index("\U0001f600")
    pieces = [emoji[:place], "\ud83d", "\ude00", emoji[place + 1 :]]
    assert guarded(pieces).text == emoji

    def endpoint(exchange):
        exchange.begin()
        for piece in [TRACE[:7], "\ud83d", " ", TRACE[7:]]:
            exchange.send(event(piece))
        exchange.send(event("", "stop") + b"data: [DONE]\n\n")

    with serve(endpoint) as (url, _), RawStore(tmp_path / "raw") as store:
        [answer] = collect(teacher(url), drafts(1), store)
        [kept] = store.answers()
    assert answer.text == kept["text"] == TRACE[:7] + "\ud83d " + TRACE[7:] and answer.completion_tokens > 0
    write_raw(tmp_path / "raw.jsonl.gz", [kept])
    assert json.loads(gzip.decompress((tmp_path / "raw.jsonl.gz").read_bytes()))["text"] == answer.text


@pytest.mark.parametrize(
    ("text", "reason", "kept"),
    [
        ("Sure! <think>", Rejection.STRAY_TEXT, "S"),
        ("<think>a</think> so <action>", Rejection.STRAY_TEXT, "<think>a</think> s"),
        ("<action>{}", Rejection.MISORDERED_TAG, "<a"),
        ("<think>a<action>{}", Rejection.MISORDERED_TAG, "<think>a<action>"),
        ("<think>a</think><think>b", Rejection.REPEATED_TAG, "<think>a</think><t"),
        ("<think>a<think>b", Rejection.REPEATED_TAG, "<think>a<think>"),
    ],
)
def test_what_is_out_of_order_is_given_up_at_once(text, reason, kept):
    guard = guarded(text)
    assert guard.cut == reason and not guard.done and guard.text == kept


def test_a_long_rationale_is_given_up_before_it_ends():
    endless = guarded(["<think>", *["why " * 10] * 1000], cap=512)
    assert endless.cut == THINK_TOO_LONG and len(endless.text) < 512 + 250
    assert guarded([f"<think>{'x' * 513}</think>"], cap=512).cut == THINK_TOO_LONG
    assert not guarded([f"<think>{'x' * 512}</think>"], cap=512).cut


@given(st.lists(st.one_of(st.sampled_from(TAGS), st.sampled_from([" ", "\n", "a", "<", "</", '{"a":1}'])), max_size=14))
@example(["<think>", "</think>", "</"])
def test_the_guard_agrees_with_the_parser_on_order(parts):
    text = "".join(parts)
    guard = guarded(text)
    assert not (guard.done and guard.cut)
    try:
        parse_trace(text)
    except ValueError as error:
        if error.rejection in (Rejection.MISSING_TAG, Rejection.REPEATED_TAG, Rejection.MISORDERED_TAG):
            assert not guard.done
        if error.rejection is Rejection.TRUNCATED:
            # The parser waits for a tag's last character, the guard goes by its first ones.
            rest = guard.text[max((guard.text.rfind(tag) + len(tag) for tag in TAGS if tag in guard.text), default=0) :]
            begun = bool(rest.strip()) and any(tag.startswith(rest.lstrip()) for tag in TAGS)
            assert not guard.done and (begun or guard.cut in ("", Rejection.STRAY_TEXT))


# --------------------------------------------------------------------------------------------- good behaviour


def test_what_is_sent_is_what_the_file_pins(teacher, monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", "sesame")
    with serve(lambda exchange: exchange.stream(TRACE)) as (url, requests):
        answers = collect(teacher(url, api_key_env="TEACHER_KEY", model="m"), drafts(2))
    assert [answer.text for answer in answers] == [TRACE, TRACE]
    body = requests[0]["body"]
    assert requests[0]["key"] == "Bearer sesame"
    assert (body["model"], body["temperature"], body["top_p"], body["max_tokens"]) == ("m", 0.3, 0.9, 1024)
    assert body["stream"] is True and body["seed"] == 0
    roles = [message["role"] for message in body["messages"]]
    assert roles == ["system", "user", "assistant", "user", "assistant", "user"]
    assert parse_trace(body["messages"][2]["content"]) and "ast-grep" in body["messages"][0]["content"]
    asked = {request["body"]["messages"][-1]["content"].split("\n")[0] for request in requests}
    assert asked == {f"Task (python): {draft.task.instruction}" for draft in drafts(2)}
    answer = answers[0]
    assert answer.served_model == "served-7" and answer.attempts == 1 and not answer.cut
    assert answer.completion_tokens > 20 and answer.prompt_tokens > answer.completion_tokens


def test_the_server_is_hung_up_on_once_the_trace_is_complete(teacher):
    def chatty(exchange):
        exchange.begin()
        exchange.send(event(TRACE + " and now"))
        for _ in range(400):
            exchange.send(event("blah " * 500))
            time.sleep(0.005)

    with serve(chatty) as (url, requests):
        [answer] = collect(teacher(url), drafts(1))
        assert answer.text == TRACE and not answer.cut
        for _ in range(100):
            if "hung_up" in requests[0]:
                break
            time.sleep(0.02)
        assert requests[0]["hung_up"]


def test_answers_come_in_order_from_several_requests_at_once(teacher):
    running, most, lock = 0, 0, threading.Lock()

    def slow(exchange):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.02 if exchange.number % 2 else 0.15)
        with lock:
            running -= 1
        exchange.stream(f"<think>{exchange.asked}", finish="length")

    with serve(slow) as (url, _):
        answers = collect(teacher(url, limits={"concurrency": 3}), drafts(9))
    assert most == 3
    for draft, answer in zip(drafts(9), answers, strict=True):
        assert draft.task.instruction in answer.text and answer.cut == "length"


def test_cost_is_counted_also_for_what_failed(teacher, tmp_path):
    def half(exchange):
        if exchange.number == 0:
            exchange.stream("<think>" + "word " * 50, finish=None, done=False)
        else:
            exchange.stream(TRACE)

    with serve(half) as (url, _):
        priced = teacher(url, price=Price(prompt=1.0, completion=10.0))
        [answer] = collect(priced, drafts(1), RawStore(tmp_path / "raw"))
    assert answer.attempts == 2 and answer.wasted_tokens >= 50 and answer.text == TRACE
    wanted = (answer.prompt_tokens * 1.0 + (answer.completion_tokens + answer.wasted_tokens) * 10.0) / 1e6
    assert answer.cost_usd == pytest.approx(wanted) and answer.prompt_tokens % 2 == 0
    with RawStore(tmp_path / "raw") as store:
        assert spending(store)[priced.name]["cost_usd"] == pytest.approx(wanted)


def test_the_budget_stops_the_run_and_keeps_what_it_bought(teacher, tmp_path):
    with serve(lambda exchange: exchange.stream(TRACE)) as (url, requests):
        dear = teacher(url, limits={"concurrency": 1}, price=Price(prompt=1000.0))
        with pytest.raises(DataError, match=r"max_cost_usd 0\.5 is spent; what was answered is kept"):
            collect(dear, drafts(20), RawStore(tmp_path), max_cost_usd=0.5)
        assert 0 < len(requests) < 20
    with RawStore(tmp_path) as store:
        assert len(store) == len(requests)


# ------------------------------------------------------------------------------------------------- misbehaviour


def rubbish_body(exchange):
    exchange.status(200, text="<html>Bad gateway, but politely</html>")


def rubbish_stream(exchange):
    exchange.begin()
    exchange.send(b"data: {nonsense\n\ndata: [DONE]\n\n")


def rubbish_shape(exchange):
    exchange.begin()
    exchange.send(b'data: {"choices": [{"index": 0, "delta": {"content": "<think>"}}]}\n\ndata: [1, 2]\n\n')


def no_utf8(exchange):
    exchange.begin()
    exchange.send(b'data: {"choices": "\xff\xfe"}\n\n')


def half_stream(exchange):
    exchange.stream("<think>well", finish=None, done=False)


def half_stream_done(exchange):
    exchange.stream("<think>well", finish=None)


def hangs_up(exchange):
    exchange.handler.connection.close()


def server_error(exchange):
    exchange.status(503)


def error_in_stream(exchange):
    exchange.begin()
    exchange.send(b'data: {"error": {"message": "out of memory", "code": 500}}\n\n')


BAD = [rubbish_body, rubbish_stream, rubbish_shape, no_utf8, half_stream, half_stream_done, hangs_up, server_error,
       error_in_stream]  # fmt: skip


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.__name__)
def test_a_mishap_is_asked_again_and_a_lasting_one_fails_its_task_only(teacher, tmp_path, bad):
    def once(exchange):
        bad(exchange) if exchange.number < 2 else exchange.stream(TRACE)

    with serve(once) as (url, requests):
        [answer] = collect(teacher(url), drafts(1))
    assert answer.text == TRACE and answer.attempts == len(requests) == 3

    sick = drafts(3)[1].task.instruction

    def always(exchange):
        bad(exchange) if sick in exchange.asked else exchange.stream(TRACE)

    with serve(always) as (url, requests):
        answers = collect(teacher(url), drafts(3), RawStore(tmp_path))
        assert [type(answer) for answer in answers] == [Answer, NoAnswer, Answer]
        assert answers[1].attempts == 3 and answers[1].reason and len(requests) == 5
        collect(teacher(url), drafts(3), RawStore(tmp_path))
        assert len(requests) == 8  # only the failed one is asked again, three times
    with RawStore(tmp_path) as store:
        assert len(store) == 2 and len(store.failures()) == 2


def test_silence_is_a_timeout(teacher):
    def stalls(exchange):
        exchange.begin()
        exchange.send(event("<think>wait"))
        time.sleep(1.0)

    with serve(stalls) as (url, _):
        started = time.monotonic()
        [failure] = collect(teacher(url, limits={"timeout_s": 0.1, "attempts": 2}), drafts(1))
        assert failure.reason == "timeout" and time.monotonic() - started < 0.9


def test_dripping_for_ever_is_a_timeout_too(teacher):
    def drips(exchange):
        exchange.begin()
        for _ in range(100):
            exchange.send(event("<think>" if not _ else "a"))
            time.sleep(0.02)

    with serve(drips) as (url, _):
        [failure] = collect(teacher(url, limits={"timeout_s": 0.1, "attempts": 1}), drafts(1))
        assert failure.reason == "timeout"


@pytest.mark.parametrize("header", ["Retry-After", "Retry-After-Ms"])
def test_too_many_requests_holds_everyone_back_as_long_as_asked(teacher, header):
    value = "0.5" if header == "Retry-After" else "500"

    def limited(exchange):
        exchange.status(429, {header: value}) if exchange.number == 0 else exchange.stream(TRACE)

    with serve(limited) as (url, requests):
        answers = collect(teacher(url, limits={"concurrency": 1}), drafts(3))
    assert [answer.attempts for answer in answers] == [2, 1, 1]
    assert requests[1]["time"] - requests[0]["time"] >= 0.45


def test_our_own_pace_is_kept(teacher):
    with serve(lambda exchange: exchange.stream(TRACE)) as (url, requests):
        started = time.monotonic()  # before the first may be sent: a busy machine takes its time until that arrives
        collect(teacher(url, limits={"requests_per_minute": 600.0}), drafts(5))
    assert max(request["time"] for request in requests) - started >= 0.38  # four gaps of 0.1 s


def test_a_refused_key_or_model_stops_everything(teacher):
    for code in (401, 403, 404):
        with serve(lambda exchange, code=code: exchange.status(code)) as (url, requests):
            with pytest.raises(DataError, match=f"answers {code} .*; check base_url, model and the key"):
                collect(teacher(url, limits={"concurrency": 1}), drafts(5))
            assert len(requests) <= 2


def test_a_refused_task_is_not_asked_again(teacher):
    with serve(lambda exchange: exchange.status(400)) as (url, requests):
        answers = collect(teacher(url), drafts(2))
    assert [answer.reason for answer in answers] == ["http_400", "http_400"] and len(requests) == 2


def test_an_endpoint_that_is_down_is_given_up(teacher):
    with serve(lambda exchange: exchange.status(500)) as (url, _):
        down = teacher(url, limits={"attempts": 1, "stop_after_failures": 4, "concurrency": 1})
        with pytest.raises(DataError, match="4 tasks in a row got no answer, the last for http_500; see to"):
            collect(down, drafts(20))
    gone = teacher(url, limits={"attempts": 1, "stop_after_failures": 2, "concurrency": 1})
    with pytest.raises(DataError, match="2 tasks in a row got no answer, the last for connection"):
        collect(gone, drafts(20))


# --------------------------------------------------------------------------------------------------- the store


def line(number):
    return {"teacher": "t", "task_id": f"task-{number}", "text": f"{number} \ud800 é"}


def test_a_store_keeps_every_answer_and_compresses_what_is_full(tmp_path):
    with RawStore(tmp_path, segment_lines=4) as store:
        for number in range(10):
            store.add(f"k{number}", line(number))
        assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".lock")[-1] == "00002.jsonl"
    assert sorted(path.name for path in tmp_path.glob("0*")) == [f"0000{i}.jsonl.gz" for i in range(3)]
    with RawStore(tmp_path, segment_lines=4) as store:
        assert [entry["task_id"] for entry in store.answers()] == [f"task-{number}" for number in range(10)]
        assert store.get("k7")["text"] == "7 \ud800 é" and store.get("k10") is None
        with pytest.raises(ValueError, match="already has its answer"):
            store.add("k3", line(3))
        store.add("k10", line(10))
    with RawStore(tmp_path) as store:
        assert len(store) == 11


@pytest.mark.parametrize("cut", [1, 7, 60, 100000])
def test_a_kill_in_the_middle_of_a_line_loses_that_line_only(tmp_path, cut, caplog):
    killed = RawStore(tmp_path)
    for number in range(3):
        killed.add(f"k{number}", line(number))
    path = tmp_path / "00000.jsonl"
    data = path.read_bytes()
    last = data.rstrip(b"\n").rfind(b"\n") + 1
    killed._file.close()  # what the kernel does for a dead process
    killed._lock.close()
    path.write_bytes(data[: max(last, len(data) - cut)])
    with RawStore(tmp_path) as store:
        assert [entry["key"] for entry in store.answers()] == ["k0", "k1"]
        store.add("k2", line(2))
    with RawStore(tmp_path) as store:
        assert len(store) == 3


def test_a_kill_while_compressing_doubles_nothing(tmp_path):
    with RawStore(tmp_path) as store:
        for number in range(3):
            store.add(f"k{number}", line(number))
    sealed = tmp_path / "00000.jsonl.gz"
    plain = gzip.decompress(sealed.read_bytes())
    (tmp_path / "00000.jsonl").write_bytes(plain)  # killed before its removal
    with RawStore(tmp_path) as store:
        assert len(store) == 3
    sealed.unlink()
    (tmp_path / "00000.jsonl").write_bytes(plain)
    (tmp_path / "00000.tmp").write_bytes(b"\x1f\x8b half")  # killed while writing it
    with RawStore(tmp_path) as store:
        assert len(store) == 3 and not list(tmp_path.glob("*.tmp"))


def test_a_folder_of_other_files_stays_as_it_is(tmp_path):
    names = ("tasks.jsonl", "tasks.jsonl.gz", "notes.tmp", "1.jsonl", "00000.jsonl.bak")
    for name in names:
        (tmp_path / name).write_text("mine, without an end")
    with RawStore(tmp_path) as store:
        assert len(store) == 0
        store.add("k", line(0))
    assert {(tmp_path / name).read_text() for name in names} == {"mine, without an end"}
    (tmp_path / "00007.jsonl").write_text("mine too\nwithout an end")  # named as ours are, and not of ours
    with pytest.raises(DataError, match=r"00007.jsonl, line 1 is not a line"):
        RawStore(tmp_path)
    assert (tmp_path / "00007.jsonl").read_text() == "mine too\nwithout an end"


def test_damage_is_named_and_duplicates_are_not_counted_twice(tmp_path, caplog):
    with RawStore(tmp_path) as store:
        store.add("k0", line(0))
    sealed = tmp_path / "00000.jsonl.gz"
    whole = sealed.read_bytes()
    twice = gzip.decompress(whole) * 2
    (tmp_path / "00001.jsonl").write_bytes(twice)
    with RawStore(tmp_path) as store:
        assert len(store) == 1 and "has its answer already" in caplog.text
    for damaged in (whole[:-5], whole[:20] + b"\0\0\0" + whole[23:], b"rubbish"):
        sealed.write_bytes(damaged)
        with pytest.raises(DataError, match=rf"{sealed} is damaged"):
            RawStore(tmp_path)
    sealed.write_bytes(gzip.compress(b'{"format": "srl-raw/9", "kind": "answer", "key": "k"}\n'))
    with pytest.raises(DataError, match=r"line 1 is not a line of srl-raw/1"):
        RawStore(tmp_path)


def test_a_store_belongs_to_one_process(tmp_path):
    with RawStore(tmp_path), pytest.raises(DataError, match="is in use by another run"):
        RawStore(tmp_path)


class Killed(BaseException):
    pass


def test_killed_at_any_answer_and_run_again_nothing_is_asked_twice(teacher, tmp_path):
    with serve(lambda exchange: exchange.stream(TRACE)) as (url, requests):
        for stop in (3, 7):
            store = RawStore(tmp_path)
            with pytest.raises(Killed), Collector(TeacherMix([teacher(url)], [1.0]), store) as collector:
                for count, _ in enumerate(collector.collect(drafts(10)), start=1):
                    if count == stop:
                        raise Killed
        answers = collect(teacher(url), drafts(10), RawStore(tmp_path))
    asked = Counter(request["body"]["messages"][-1]["content"] for request in requests)
    assert len(answers) == 10 and len(asked) == 10 and set(asked.values()) == {1}
    with RawStore(tmp_path) as store:
        assert len(store) == 10


def test_another_prompt_or_decoding_is_another_question(teacher, tmp_path):
    with serve(lambda exchange: exchange.stream(TRACE)) as (url, requests):
        first = teacher(url)
        collect(first, drafts(1), RawStore(tmp_path))
        warmer = dataclasses.replace(first._spec.decoding, temperature=0.5)
        collect(teacher(url, decoding=warmer), drafts(1), RawStore(tmp_path))
        assert len(requests) == 2
        collect(teacher(url, limits={"concurrency": 2}), drafts(1), RawStore(tmp_path))
        assert len(requests) == 2


# --------------------------------------------------------------------------------------------- mixing, the file


def test_teachers_are_mixed_by_weight_and_by_task_alone(teacher):
    with serve(lambda exchange: exchange.stream(TRACE)) as (url, _):
        mix = TeacherMix([OracleTeacher(), teacher(url)], [3.0, 1.0])
        chosen = [mix.choose(draft).name for draft in drafts(400)]
        assert 0.70 < chosen.count("catalogue-oracle/1") / 400 < 0.80
        assert chosen[::-1] == [mix.choose(draft).name for draft in reversed(drafts(400))]
        with Collector(mix) as collector:
            names = Counter(answer.teacher for answer in collector.collect(drafts(12)))
        assert set(names) == {teacher.name for teacher in mix.teachers}


def test_rationales_are_paraphrased_for_a_share_of_the_tasks(teacher):
    def rewrites(exchange):
        said = exchange.asked.removeprefix("<think>").removesuffix("</think>")
        if exchange.number == 0:
            exchange.stream("I would rather not.")
        elif exchange.number == 1:
            exchange.stream("<think>it says something else</think>")  # the names are gone
        else:
            exchange.stream(f"<think>\nPut otherwise: {said} </think> Anything else?")

    asked = drafts(30)
    with serve(rewrites) as (url, requests):
        writer = ParaphrasingTeacher(OracleTeacher(), teacher(url, limits={"concurrency": 1}), 0.5)
        answers = collect(writer, asked)
    assert 8 <= len(requests) <= 22  # about half
    rewritten = [answer for answer in answers if "Put otherwise: " in answer.text]
    assert len(rewritten) == len(requests) - 2
    for draft, answer in zip(asked, answers, strict=True):
        own, trace = parse_trace(OracleTeacher().write(draft)), parse_trace(answer.text)
        assert (trace.action, trace.state) == (own.action, own.state) and answer.teacher == writer.name
        if answer in rewritten:
            assert trace.think == f"Put otherwise: {own.think}" and parse_trace(answer.original) == own
            assert answer.completion_tokens > 0
        else:
            assert trace == own and not answer.original


def changed(**changes):
    value = yaml.safe_load(CONFIG.read_text())
    for path, new in changes.items():
        part, *names = value, *path.split("__")
        for name in names[:-1]:
            part = part[int(name) if name.isdigit() else name]
        part[int(names[-1]) if names[-1].isdigit() else names[-1]] = new
    return value


def test_the_file_in_the_repository_pins_what_it_promises():
    config = load_teacher_config(CONFIG)
    decoding = config.teachers[0].decoding
    assert (decoding.temperature, decoding.top_p, decoding.max_think_tokens) == (0.3, 0.9, 512)
    assert 2 <= len(config.anchors) <= 3 and len(config.teachers[0].revision) == 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "srl-teacher/9"}, "version is 'srl-teacher/9'; this program reads"),
        ({"teachers": []}, "teachers is empty"),
        ({"teachers__0__kind": "llama"}, r"teachers\[0\]\.kind is 'llama'; must be one of openai, oracle"),
        ({"teachers__0__revision": ""}, r"teachers\[0\]\.revision: must be given"),
        ({"teachers__0__base_url": "localhost:8000"}, "is no http"),
        ({"teachers__0__weight": -1}, r"weight: is -1\.0; must be at least 0"),
        ({"teachers__0__weight": 0}, "one weight must be above 0"),
        ({"paraphrase": {"teacher": "x", "share": 0.5}}, "paraphrase.teacher is 'x'; must be the name of an openai"),
        ({"teachers__0__decoding__temperature": "hot"}, r"decoding\.temperature is 'hot'; must be float"),
        ({"teachers__0__decoding__topp": 0.9}, "has no field 'topp'; it has"),
        ({"teachers__0__limits__attempts": 0}, r"limits\.attempts: must be at least 1"),
        ({"anchors__0__action": {"language": "python"}}, r"anchors\[0\] is no example to follow: schema_violation"),
        ({"system": " "}, "system must be the text"),
        ({"surprise": 1}, "the file has no field 'surprise'"),
    ],
)
def test_a_wrong_file_is_one_clear_error(tmp_path, change, message):
    path = tmp_path / "teacher.yaml"
    path.write_text(yaml.safe_dump(changed(**change)))
    with pytest.raises(DataError, match=message) as error:
        load_teacher_config(path)
    assert str(path) in str(error.value)


def test_no_file_no_yaml_no_key_no_store(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="no such file"):
        load_teacher_config(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(DataError, match="is not YAML"):
        load_teacher_config(tmp_path / "bad.yaml")
    (tmp_path / "teacher.yaml").write_text(yaml.safe_dump(changed(teachers__0__api_key_env="NO_SUCH_KEY")))
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(DataError, match="the environment variable NO_SUCH_KEY holds no key"):
        open_collector(tmp_path / "teacher.yaml", tmp_path / "store")
    (tmp_path / "oracle.yaml").write_text(yaml.safe_dump(changed(teachers=[{"name": "o", "kind": "oracle"}])))
    with pytest.raises(DataError, match="give the folder for them with --store"):
        open_collector(tmp_path / "oracle.yaml", None)
    with open_collector(tmp_path / "oracle.yaml", tmp_path / "store") as collector:
        assert [parse_trace(answer.text) for answer in collector.collect(drafts(3))]
    assert json.loads(gzip.decompress((tmp_path / "store" / "00000.jsonl.gz").read_bytes()).splitlines()[0])["text"]
