import base64
import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from srl_jax.records import (
    EMBEDDING_DIM,
    SCHEMA_VERSION,
    CorruptRecord,
    ReplayGroup,
    SamplerSettings,
    SourceFile,
    Task,
    TeacherRecord,
    TestSpec,
    Versions,
    decode_record,
    decode_replay,
    encode_record,
    encode_replay,
    task_from_json,
    task_to_json,
)
from srl_jax.trace import Action, StateUpdate, Trace, render_trace

VERSIONS = Versions(SCHEMA_VERSION, "demo-1", "srl-reward/1")


def unit_vector(seed=0):
    vector = np.random.default_rng(seed).normal(size=EMBEDDING_DIM).astype(np.float32)
    return vector / np.linalg.norm(vector)


def make_record(**changes):
    action = Action("python", "print($A)", "log.info($A)", ("app.py",))
    task = Task(
        task_id="t-1",
        instruction="Use the logger: “é”\u2028",
        language="python",
        slice="python",
        rule="print-to-log",
        difficulty=2,
        source="generated",
        files=(SourceFile("app.py", "print('\U0001f600')\r\n\tx = 1\0"), SourceFile("test_app.py", "")),
        context=(SourceFile("app.py", "print(1)"),),
        prior_state=StateUpdate(("log",), (), (), ()),
        tests=TestSpec("unittest", ("test_app.T.test_a",), ("test_app.py",)),
        expected=(SourceFile("app.py", "log.info(1)"),),
    )
    record = TeacherRecord(
        task=task,
        trace=render_trace(Trace("swap it", action, StateUpdate.empty())),
        think_embedding=unit_vector(),
        trace_quality=0.875,
        env_report={"status": "ok", "tests_passed": 3, "nested": {"a": [1, 2.5, None, True]}},
        versions=VERSIONS,
        teacher="catalogue",
    )
    return dataclasses.replace(record, **changes)


def make_group(**changes):
    group = ReplayGroup(
        task_id="t-1",
        slice="python",
        prompt_ids=np.arange(5, dtype=np.int32),
        completion_ids=np.arange(8, dtype=np.int32).reshape(2, 4),
        completion_mask=np.array([[1, 1, 1, 0], [1, 1, 1, 1]], dtype=bool),
        sampler_logprobs=np.linspace(-3, 0, 8, dtype=np.float32).reshape(2, 4),
        grammar_states=np.ones((2, 4), dtype=np.int16),
        rewards=np.array([0.5, -0.2], dtype=np.float32),
        malformed=np.array([False, True]),
        policy_version="run-1",
        policy_step=10,
        tokenizer="0" * 64,
        sampler=SamplerSettings(1.0, top_p=1.0, top_k=0, constrained=True, max_new_tokens=4, max_think_tokens=2),
        versions=VERSIONS,
    )
    return dataclasses.replace(group, **changes)


def test_record_round_trip_is_exact():
    record = make_record()
    data = encode_record(record)
    again = decode_record(data)
    assert encode_record(again) == data
    assert again == record
    assert hash(again) == hash(record)
    assert again.task == record.task
    assert again.think_embedding.dtype == np.float32
    np.testing.assert_array_equal(again.think_embedding, record.think_embedding)
    assert again != make_record(teacher="other")
    assert again != "text"


def test_bytes_do_not_depend_on_insertion_order_or_memory_layout():
    record = make_record()
    report = dict(reversed(record.env_report.items()))
    strided = np.repeat(record.think_embedding, 2)[::2]
    big_endian = record.think_embedding.astype(">f4")
    for embedding in (strided, big_endian, record.think_embedding.astype(np.float64)):
        assert encode_record(make_record(env_report=report, think_embedding=embedding)) == encode_record(record)
    assert encode_record(make_record(trace_quality=1)) == encode_record(make_record(trace_quality=1.0))


def test_bytes_are_canonical_json():
    data = encode_record(make_record())
    value = json.loads(data)
    assert data == json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    raw = base64.b64decode(value["record"]["think_embedding"]["data"])
    np.testing.assert_array_equal(np.frombuffer(raw, "<f4"), make_record().think_embedding)


def test_tests_may_be_absent():
    record = make_record(task=dataclasses.replace(make_record().task, tests=None))
    assert decode_record(encode_record(record)).task.tests is None


def edit(data, path, value):
    """The record's bytes with one field replaced, or removed for `...`."""
    root = json.loads(data)
    *parents, last = path.split(".")
    node = root["record"]
    for name in parents:
        node = node[name]
    if value is ...:
        del node[last]
    else:
        node[last] = value
    return json.dumps(root).encode()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("teacher", ..., "teacher is missing"),
        ("extra", 1, "extra is unknown"),
        ("task.rule", ..., r"task\.rule is missing"),
        ("task.files", [{"path": "a"}], r"task\.files\[0\]\.text is missing"),
        ("task.files", "a.py", r"task\.files must be a list"),
        ("task.instruction", 5, r"task\.instruction is a int"),
        ("task.difficulty", 1.0, r"task\.difficulty is a float"),
        ("task.difficulty", True, r"task\.difficulty is a bool"),
        ("task.difficulty", 0, r"task\.difficulty is 0"),
        ("task.language", "rust", r"task\.language is 'rust'"),
        ("task.source", "dreamt", r"task\.source is 'dreamt'"),
        ("task.source", None, r"task\.source is None"),
        ("task.tests", {"runner": "unittest"}, r"task\.tests\.expected_ids is missing"),
        ("task.episode", {"episode_id": "e", "step": 1}, r"task\.episode\.steps is missing"),
        ("task.episode", {"episode_id": "e", "step": 3, "steps": 2}, r"task\.episode\.step is 3; must lie in 1 \.\. 2"),
        ("task.prior_state", None, r"task\.prior_state must be an object"),
        ("task.prior_state.decisions", [1], r"task\.prior_state\.decisions\[0\] is a int"),
        ("trace_quality", 1, "trace_quality is a int"),
        ("trace_quality", 1.5, "trace_quality is 1.5"),
        ("env_report", [], "env_report must be an object"),
        ("trace", "<think>", "trace is malformed: truncated"),
        ("trace", " " + make_record().trace, "not in canonical form"),
        ("trace", make_record().trace + "\n", "not in canonical form"),
        ("versions.schema", "srl-record/0", "'srl-record/0', this program reads"),
        ("think_embedding", [0.0], "think_embedding must be an object"),
        ("think_embedding.data", "!!!!", r"think_embedding\.data is not base64"),
        ("think_embedding.data", "AAAA", "holds 3 bytes"),
        ("think_embedding.data", base64.b64encode(bytes(1536)).decode(), "norm 0"),
        ("think_embedding.data", base64.b64encode(b"\xff" * 1536).decode(), "NaN"),
        ("think_embedding.shape", [383], "must be .* with 384"),
        ("think_embedding.shape", [384, 1], "1 axes"),
        ("think_embedding.shape", [-384], "list of sizes"),
    ],
)
def test_damaged_fields_are_named(path, value, message):
    with pytest.raises(CorruptRecord, match=message):
        decode_record(edit(encode_record(make_record()), path, value))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"null",
        b"[]",
        b"\xff\xfe",
        b"{" * 10**6,
        b'{"kind":"teacher","record":NaN}',
        b'{"kind":"teacher","record":[]}',
        b'{"kind":1,"record":{}}',
        b'{"kind":"teacher","kind":"teacher","record":{}}',
        encode_replay(make_group()),
    ],
    ids=lambda data: data[:45].decode(errors="replace"),
)
def test_bytes_that_are_no_teacher_record(data):
    with pytest.raises(CorruptRecord):
        decode_record(data)


def test_another_version_is_named_even_when_its_fields_differ():
    data = edit(edit(encode_record(make_record()), "teacher", ...), "versions.schema", "srl-record/1")
    with pytest.raises(CorruptRecord, match="'srl-record/1', this program reads"):
        decode_record(data)


@given(st.integers(0, 10**6), st.integers(1, 255))
def test_a_flipped_byte_is_noticed_or_leaves_a_valid_record(place, flip):
    data = bytearray(DATA)
    data[place % len(data)] ^= flip
    try:
        record = decode_record(bytes(data))
    except CorruptRecord:
        return
    assert decode_record(encode_record(record)) == record


@given(st.integers(0, 10**6))
def test_a_cut_record_is_noticed(place):
    with pytest.raises(CorruptRecord):
        decode_record(DATA[: place % len(DATA)])


DATA = encode_record(make_record())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trace": "<think>"}, "malformed"),
        ({"think_embedding": np.ones(384, np.float32)}, "norm"),
        ({"think_embedding": np.ones(384, np.int32)}, "dtype"),
        ({"think_embedding": np.ones(3, np.float32)}, "shape"),
        ({"think_embedding": np.full(384, 1e30, np.float32)}, "norm"),
        ({"think_embedding": np.full(384, 1e300)}, "infinity"),
        ({"think_embedding": None}, "dtype"),
        ({"trace_quality": float("nan")}, "finite"),
        ({"env_report": {"x": float("inf")}}, "cannot be stored"),
        ({"env_report": {"x": object()}}, "cannot be stored"),
        ({"env_report": {1: 2}}, "string keys"),
        ({"teacher": "\ud800"}, "cannot be stored"),
        ({"task": None}, "task is a NoneType"),
        ({"versions": Versions("old", "d", "r")}, "versions.schema"),
    ],
)
def test_records_that_could_not_be_read_back_are_not_written(changes, message):
    with pytest.raises(CorruptRecord, match=message):
        encode_record(make_record(**changes))


text = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)


@given(st.lists(st.builds(SourceFile, text, text), max_size=3), text, st.floats(0, 1), st.integers(1, 2**70))
def test_round_trip_property(files, instruction, quality, difficulty):
    task = dataclasses.replace(make_record().task, files=tuple(files), instruction=instruction, difficulty=difficulty)
    record = make_record(task=task, trace_quality=quality)
    assert decode_record(encode_record(record)).task == task
    assert decode_record(encode_record(record)) == record


def test_a_task_alone_is_named_from_the_task_on():
    value = task_to_json(make_record().task)
    assert task_from_json(value) == make_record().task
    with pytest.raises(CorruptRecord, match=r"^task\.files\[1\]\.text is a int, must be str$"):
        task_from_json({**value, "files": [value["files"][0], {"path": "a", "text": 1}]})
    with pytest.raises(CorruptRecord, match=r"^task must be an object, not list$"):
        task_from_json([])
    with pytest.raises(CorruptRecord, match=r"^record must be an object, not list$"):
        decode_record(b'{"kind":"teacher","record":[]}')
    with pytest.raises(CorruptRecord, match=r"^task\.tests\.files\[0\] is a int, must be str$"):
        task_to_json(dataclasses.replace(make_record().task, tests=TestSpec("unittest", ("a",), (1,))))


@pytest.mark.parametrize(("depth", "fits"), [(60, True), (61, False)])
def test_free_objects_are_nested_only_so_deep(depth, fits):
    value = 1
    for level in range(depth):
        value = [value] if level % 2 else {"inner": value}
    record = make_record(env_report={"value": value})
    if fits:
        assert decode_record(encode_record(record)) == record
    else:
        with pytest.raises(CorruptRecord, match=r"^env_report is nested more than 60 deep$"):
            encode_record(record)


def test_replay_round_trip_is_exact():
    group = make_group()
    data = encode_replay(group)
    again = decode_replay(data)
    assert again == group
    assert encode_replay(again) == data
    assert hash(again) == hash(group)
    assert again.grammar_states.dtype == np.int32
    assert again.completion_mask.dtype == bool
    np.testing.assert_array_equal(again.sampler_logprobs, group.sampler_logprobs)
    assert again.sampler_logprobs.flags.writeable
    assert again != make_group(policy_step=11)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler_logprobs": None}, "without them cannot be trained on"),
        ({"sampler_logprobs": np.zeros((2, 3), np.float32)}, "sampler_logprobs has shape"),
        ({"sampler_logprobs": np.full((2, 4), -np.inf, np.float32)}, "NaN or infinity"),
        ({"sampler_logprobs": np.full((2, 4), 0.5, np.float32)}, "at most 0"),
        ({"rewards": np.zeros(3, np.float32)}, "rewards has shape"),
        ({"rewards": np.array([np.nan, 1], np.float32)}, "NaN"),
        ({"completion_ids": np.zeros((2, 4), np.float32)}, "dtype"),
        ({"prompt_ids": np.array([2**40])}, "do not fit"),
        ({"prompt_ids": np.array([], np.int32)}, "at least one token"),
        ({"completion_mask": np.ones((2, 4), np.int32)}, "dtype"),
        ({"sampler": SamplerSettings(0.0, 1.0, 0, True, 4, 2)}, "temperature"),
        ({"versions": Versions("old", "d", "r")}, "versions.schema"),
    ],
)
def test_groups_that_could_not_be_trained_on_are_refused(changes, message):
    with pytest.raises(CorruptRecord, match=message):
        encode_replay(make_group(**changes))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("sampler_logprobs", ..., "sampler_logprobs is missing"),
        ("sampler_logprobs", None, "sampler_logprobs must be an object"),
        ("completion_mask.data", base64.b64encode(bytes([1, 1, 1, 2, 1, 1, 1, 1])).decode(), "neither 0 nor 1"),
        ("completion_ids.shape", [4, 2], "completion_mask has shape"),
        ("completion_ids.shape", [2, 2**62], "needs another number"),
        ("sampler.constrained", 1, r"sampler\.constrained is a int"),
    ],
)
def test_damaged_groups_are_refused(path, value, message):
    with pytest.raises(CorruptRecord, match=message):
        decode_replay(edit(encode_replay(make_group()), path, value))


def test_kinds_are_not_mixed_up():
    with pytest.raises(CorruptRecord, match="expected a replay record, found 'teacher'"):
        decode_replay(encode_record(make_record()))
