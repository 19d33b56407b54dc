"""Reading a data set: balance, shuffle, resume, one pass, and every kind of damage."""

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from threading import Barrier

import numpy as np
import pytest
from array_record.python import array_record_module

from data_pipeline.chunked import CHUNK
from data_pipeline.errors import DataError
from data_pipeline.load import benchmark, make_loader, make_stream, read_sample, read_split, verify
from data_pipeline.tasks.catalogue import rule_named
from data_pipeline.tasks.generated import generate
from data_pipeline.teacher import OracleTeacher
from data_pipeline.write import FORMAT, begin, commit, file_entry, write_raw, write_shards
from srl_jax.records import SCHEMA_VERSION, TeacherRecord, Versions
from srl_jax.rewards import REWARD_VERSION

SIZES = {"python/generated": 30, "javascript/generated": 6}


def record(name, index):
    draft = generate(rule_named(name), index, 0, 300)
    versions = Versions(SCHEMA_VERSION, "t", REWARD_VERSION)
    unit = np.eye(384, dtype=np.float32)[index]
    return TeacherRecord(draft.task, OracleTeacher().write(draft), unit, 1.0, {"success": True}, versions, "t")


@pytest.fixture(scope="module")
def records():
    rules = {"python/generated": "python-rename-method", "javascript/generated": "javascript-includes"}
    return {name: [record(rules[name], index) for index in range(size)] for name, size in SIZES.items()}


@pytest.fixture
def data(tmp_path, records):
    partial = begin(tmp_path / "data")
    slices = {
        name: {"records": len(rows), "shards": write_shards(partial / "train", name, rows, 10)}
        for name, rows in records.items()
    }
    write_raw(partial / "raw" / "train.jsonl.gz", [{"task_id": "x"}])
    manifest = {
        "format": FORMAT,
        "schema": SCHEMA_VERSION,
        "splits": {"train": {"slices": slices}, "dev": {"slices": {}}},
        "raw": [file_entry(partial / "raw" / "train.jsonl.gz", partial)],
    }
    commit(partial, tmp_path / "data", manifest)
    return tmp_path / "data"


def ids(rows):
    return [row.task.task_id for row in rows]


def test_what_was_written_is_read(data, records):
    everything = [row for rows in records.values() for row in rows]
    read = read_split(data, "train")
    assert sorted(ids(read)) == sorted(ids(everything)) and ids(read) == ids(read_split(data, "train"))
    assert {row.task.task_id: row for row in read} == {row.task.task_id: row for row in everything}
    assert {row.task.language for row in read[:12]} == {"python", "javascript"}  # mixed, not slice after slice
    verify(data)


def test_slices_weigh_alike_unless_told_otherwise(data):
    even = Counter(row.task.slice for row in islice(make_stream(data, "train", seed=1), 60))
    assert even == {"python/generated": 30, "javascript/generated": 30}
    weights = {"python/generated": 3.0, "javascript/generated": 1.0}
    skewed = Counter(row.task.slice for row in islice(make_stream(data, "train", seed=1, slice_weights=weights), 60))
    assert skewed == {"python/generated": 45, "javascript/generated": 15}
    only = make_stream(data, "train", seed=1, slice_weights={"javascript/generated": 1.0})
    assert {row.task.slice for row in islice(only, 20)} == {"javascript/generated"}


def test_a_sample_is_the_same_records_every_time(data):
    sample = read_sample(data, "train", 5)
    assert len(set(ids(sample))) == 5 and ids(sample) == ids(read_sample(data, "train", 5))
    assert sorted(ids(read_sample(data, "train", 10**6))) == sorted(ids(read_split(data, "train")))


def test_an_epoch_shows_every_record_once_and_the_next_one_in_another_order(data):
    only = {"python/generated": 1.0}
    seen = ids(islice(make_stream(data, "train", seed=1, slice_weights=only), 60))
    assert sorted(seen[:30]) == sorted(seen[30:]) and len(set(seen[:30])) == 30 and seen[:30] != seen[30:]
    assert seen == ids(islice(make_stream(data, "train", seed=1, slice_weights=only), 60))
    assert seen != ids(islice(make_stream(data, "train", seed=2, slice_weights=only), 60))


@pytest.mark.parametrize("consumed", [0, 1, 37])
def test_a_restored_iterator_goes_on_where_it_was(data, consumed):
    stream = make_stream(data, "train", seed=4)
    list(islice(stream, consumed))
    state = json.loads(json.dumps(stream.get_state()))  # it is stored in a checkpoint
    rest = ids(islice(stream, 20))
    again = make_stream(data, "train", seed=4)
    again.set_state(state)
    assert ids(islice(again, 20)) == rest


def test_batches_are_lists_and_one_pass_ends(data):
    batches = list(make_loader(data, "train", seed=0, batch_size=8, repeat=False))
    assert [len(batch) for batch in batches] == [8, 8, 8, 8, 4] and isinstance(batches[0], list)
    assert len({row.task.task_id for batch in batches for row in batch}) == 36
    loader = make_loader(data, "train", seed=0, batch_size=8)
    next(loader)
    state, following = loader.get_state(), ids(next(loader))
    loader.set_state(state)
    assert ids(next(loader)) == following


def test_a_stream_ordered_in_every_way_resumes_and_splits_over_hosts(data):
    options = {"seed": 2, "curriculum": 0.7, "bucket": 2, "batch_size": 4}
    whole = ids(islice(make_stream(data, "train", **{**options, "batch_size": 8}), 64))
    hosts = [make_stream(data, "train", **options, host=host, hosts=2) for host in range(2)]
    parts = [ids(islice(stream, 12)) for stream in hosts]
    state = json.loads(json.dumps(hosts[1].get_state()))
    rest = ids(islice(hosts[1], 20))
    again = make_stream(data, "train", **options, host=1, hosts=2)
    again.set_state(state)
    assert ids(islice(again, 20)) == rest
    for batch in range(3):
        assert sorted(parts[0][4 * batch :][:4] + parts[1][4 * batch :][:4]) == sorted(whole[8 * batch :][:8])


def together(hosts, work):
    """What `work(host, share)` returns for every host, each in a thread of its own, `share` between them."""
    barrier, given = Barrier(hosts, timeout=60), [None] * hosts

    def sharing(host):
        def share(mine):
            given[host] = list(mine)
            barrier.wait()
            everyones = list(given)
            barrier.wait()
            return everyones

        return share

    with ThreadPoolExecutor(hosts) as threads:
        return list(threads.map(lambda host: work(host, sharing(host)), range(hosts)))


@pytest.mark.parametrize("hosts", [2, 3])
def test_hosts_that_share_have_the_order_of_one_and_read_only_their_part(data, hosts):
    replace_one_record(data, b"{rubbish")
    options = {"seed": 2, "curriculum": 0.7, "bucket": 2, "max_corrupt_share": 1.0}
    alone = make_stream(data, "train", **options, batch_size=12)
    whole = [(row, alone.get_state()) for row in islice(alone, 150)]
    lengths = []

    def read(host, share):
        def counting(mine):
            lengths.append(len(mine))
            return share(mine)

        split = {"host": host, "hosts": hosts, "share": counting, "batch_size": 12 // hosts}
        stream = make_stream(data, "train", **options, **split)
        seen = [(row, stream.get_state()) for row in islice(stream, 150)]
        again = make_stream(data, "train", **options, **split)
        again.set_state(whole[99][1])  # where a single host stood
        return seen, list(islice(again, 50))

    for seen, rest in together(hosts, read):
        assert seen == whole and rest == [row for row, _ in whole[100:]]
    at, end, width = whole[99][1]["next_index"], whole[-1][1]["next_index"], CHUNK * hosts
    assert sum(lengths) == width * (-(-end // width) + -(-end // width) - at // width)  # no record by two hosts


def test_lengths_are_known_without_reading_records(data, records):
    path = sorted((data / "train").glob("javascript-generated-*.index.npy"))[0]
    rows = np.load(path)
    assert rows.dtype == np.int32 and rows.shape == (6, 2)
    for (difficulty, length), row in zip(rows, records["javascript/generated"], strict=True):
        assert difficulty == row.task.difficulty and length > len(row.trace) + len(row.task.instruction)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(DataError, match=rf"{path} is missing or damaged"):
        make_stream(data, "train", seed=0, curriculum=1.0)
    next(make_stream(data, "train", seed=0))  # a plain shuffle does not need it
    with pytest.raises(DataError, match="differs from the manifest"):
        verify(data)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"curriculum": 1.5}, r"curriculum is 1\.5; must lie between 0"),
        ({"bucket": 0}, "bucket is 0; must be a whole number"),
        ({"hosts": 2, "host": 2}, "host is 2; must be one of 0 to 1"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(data, wrong, message):
    with pytest.raises(DataError, match=message):
        make_stream(data, "train", seed=0, **wrong)


def test_the_benchmark_counts_records(data):
    measured = benchmark(data, records=50)
    assert measured["records"] == 50 and measured["records_per_second"] > 0
    assert measured["distinct"] == len(set(ids(islice(make_stream(data, "train", seed=0), 200, 250))))
    assert measured["bytes"] == sum(path.stat().st_size for path in (data / "train").glob("*.arrayrecord"))


def replace_one_record(data, payload):
    """Rewrites the first python shard with its third record replaced by `payload`, keeping the manifest true."""
    path = sorted((data / "train").glob("python-generated-*.arrayrecord"))[0]
    reader = array_record_module.ArrayRecordReader(str(path))
    rows = [reader.read([index])[0] for index in range(reader.num_records())]
    reader.close()
    rows[2] = payload
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for row in rows:
        writer.write(row)
    writer.close()
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["splits"]["train"]["slices"]["python/generated"]["shards"][0]["bytes"] = path.stat().st_size
    (data / "manifest.json").write_text(json.dumps(manifest))
    return path


def test_one_bad_record_is_skipped_by_name(data, caplog):
    path = replace_one_record(data, b"{rubbish")
    stream = make_stream(data, "train", seed=1, slice_weights={"python/generated": 1.0}, max_corrupt_share=0.05)
    assert len(set(ids(islice(stream, 58)))) == 29
    assert f"skipping record 2 of {path}" in caplog.text
    assert len(read_split(data, "train", max_corrupt_share=0.05)) == 35


def test_too_many_bad_records_stop_the_run(data):
    path = replace_one_record(data, b"{rubbish")
    with pytest.raises(DataError, match=rf"1 of 36 records cannot be read, the last being record 2 of {path}"):
        read_split(data, "train", max_corrupt_share=0.0)
    with pytest.raises(DataError, match="1 of 36 records cannot be read"):
        list(islice(make_stream(data, "train", seed=1, max_corrupt_share=0.0), 200))


def test_a_flipped_byte_in_a_shard_costs_its_record_only(data, caplog):
    path = sorted((data / "train").glob("python-generated-*.arrayrecord"))[0]
    raw = bytearray(path.read_bytes())
    raw[500] ^= 0xFF
    path.write_bytes(bytes(raw))
    read = read_split(data, "train", max_corrupt_share=0.1)
    assert 33 <= len(read) <= 35 and str(path) in caplog.text
    with pytest.raises(DataError, match="differs from the manifest"):
        verify(data)


def test_a_damaged_data_set_is_one_clear_error(data, tmp_path):
    with pytest.raises(DataError, match=r"holds no manifest\.json.*prepare_data"):
        make_stream(tmp_path, "train", seed=0)
    with pytest.raises(DataError, match="has no split 'eval'; it has"):
        read_split(data, "eval")
    with pytest.raises(DataError, match=r"split 'dev'.*is empty"):
        read_split(data, "dev")
    with pytest.raises(DataError, match="slice_weights names java/real"):
        make_stream(data, "train", seed=0, slice_weights={"java/real": 1.0})
    with pytest.raises(DataError, match="one more than 0"):
        make_stream(data, "train", seed=0, slice_weights={"python/generated": 0.0})
    path = sorted((data / "train").glob("python-generated-*.arrayrecord"))[1]
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=rf"{path} has {len(whole) // 2} bytes instead of {len(whole)}"):
        make_stream(data, "train", seed=0)
    path.unlink()
    with pytest.raises(DataError, match=f"{path} is missing"):
        make_stream(data, "train", seed=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "srl-record/0"}, "schema is 'srl-record/0', this program reads"),
        ({"format": "other"}, "format is 'other'"),
    ],
)
def test_a_foreign_version_is_refused(data, change, message):
    path = data / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(DataError, match=message):
        make_stream(data, "train", seed=0)
    path.write_text("[1, 2")
    with pytest.raises(DataError, match="is not JSON"):
        make_stream(data, "train", seed=0)
