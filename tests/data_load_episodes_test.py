"""Whole episodes out of a data set: all steps together and in order, resumed to the episode, split over hosts."""

import json
from itertools import islice

import numpy as np
import pytest

from data_pipeline.errors import DataError
from data_pipeline.load import make_episodes
from data_pipeline.tasks.catalogue import CATALOGUE, rule_named
from data_pipeline.tasks.episodes import episode
from data_pipeline.tasks.generated import generate
from data_pipeline.teacher import OracleTeacher
from data_pipeline.write import FORMAT, begin, commit, file_entry, write_raw, write_shards
from srl_jax.records import SCHEMA_VERSION, TeacherRecord, Versions
from srl_jax.rewards import REWARD_VERSION

RULES = [rule for rule in CATALOGUE if rule.language == "python"]
SLICE = "python/episodes"


def record(draft) -> TeacherRecord:
    unit = np.eye(384, dtype=np.float32)[0]
    versions = Versions(SCHEMA_VERSION, "t", REWARD_VERSION)
    return TeacherRecord(draft.task, OracleTeacher().write(draft), unit, 1.0, {"success": True}, versions, "t")


def generated_episodes(count: int, start: int = 0) -> list[list[TeacherRecord]]:
    """Of the catalogue's Python rules, with the oracle's traces."""
    return [[record(draft) for draft in episode(RULES, index, 5, 180)] for index in range(start, start + count)]


def write_data(folder, splits) -> None:
    """A data set of {split: {slice: records}}, four records a shard."""
    partial = begin(folder)
    manifest = {"format": FORMAT, "schema": SCHEMA_VERSION, "splits": {}}
    for split, slices in splits.items():
        written = {
            name: {"records": len(rows), "shards": write_shards(partial / split, name, rows, 4)}
            for name, rows in slices.items()
        }
        manifest["splits"][split] = {"slices": written, "rules": []}
    write_raw(partial / "raw" / "train.jsonl.gz", [{"task_id": "x"}])
    manifest["raw"] = [file_entry(partial / "raw" / "train.jsonl.gz", partial)]
    commit(partial, folder, manifest)


WHOLE = generated_episodes(12)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Twelve whole episodes, their steps' records in no order, one without its second step, and a slice of tasks."""
    folder = tmp_path_factory.mktemp("data") / "set"
    cut = generated_episodes(1, start=12)[0]
    rows = [row for steps in WHOLE for row in steps] + [cut[0], *cut[2:]]
    mixed = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    alone = [record(generate(rule_named("python-rename-method"), index, 0, 180)) for index in range(5)]
    write_data(folder, {"train": {SLICE: mixed, "python/generated": alone}, "dev": {"python/generated": alone}})
    return folder


def ids(episodes):
    return [[row.task.task_id for row in steps] for steps in episodes]


def test_every_epoch_shows_each_whole_episode_once_its_steps_in_order(data):
    drawn = list(islice(make_episodes(data, "train", seed=1), 24))
    told = {steps[0].task.episode.episode_id: steps for steps in WHOLE}
    for steps in drawn:
        assert steps == told[steps[0].task.episode.episode_id]
    seen = ids(drawn)
    assert sorted(seen[:12]) == sorted(seen[12:]) == sorted(ids(WHOLE)) and seen[:12] != seen[12:]
    assert seen == ids(islice(make_episodes(data, "train", seed=1), 24))
    assert seen != ids(islice(make_episodes(data, "train", seed=2), 24))


@pytest.mark.parametrize("options", [{}, {"curriculum": 0.7, "bucket": 2, "batch_size": 2}])
def test_a_restored_stream_goes_on_at_the_episode_it_had_come_to(data, options):
    stream = make_episodes(data, "train", seed=4, **options)
    list(islice(stream, 7))
    state = json.loads(json.dumps(stream.get_state()))  # it is stored in a checkpoint
    rest = ids(islice(stream, 10))
    again = make_episodes(data, "train", seed=4, **options)
    again.set_state(state)
    assert ids(islice(again, 10)) == rest


def test_episodes_are_ordered_by_what_their_steps_are(data):
    hardest = [max(row.task.difficulty for row in steps) for steps in make_first(data, curriculum=1.0)]
    assert hardest == sorted(hardest)
    characters = lambda steps: sum(len(row.trace) for row in steps)
    window = list(map(characters, make_first(data, bucket=6, batch_size=2)))
    gaps = [abs(one - two) for one, two in zip(window[::2], window[1::2], strict=True)]
    assert max(gaps) < (max(window) - min(window)) / 2, "a batch holds episodes of like length"


def make_first(data, **options):
    return list(islice(make_episodes(data, "train", seed=2, **options), 12))


def test_hosts_share_the_episodes_of_one_big_host(data):
    whole = ids(islice(make_episodes(data, "train", seed=3), 12))
    hosts = [ids(islice(make_episodes(data, "train", seed=3, host=host, hosts=2), 6)) for host in range(2)]
    assert [steps for pair in zip(*hosts, strict=True) for steps in pair] == whole


def test_a_damaged_step_takes_its_episode_along(data, tmp_path, monkeypatch):
    lost = WHOLE[3][1].task.task_id
    from data_pipeline import load

    real = load.decode_record

    def decode(raw):
        found = real(raw)
        if found.task.task_id == lost:
            raise load.CorruptRecord("a damaged byte")
        return found

    monkeypatch.setattr(load, "decode_record", decode)
    seen = ids(islice(make_episodes(data, "train", seed=1, max_corrupt_share=0.1), 22))
    assert sorted(seen[:11]) == sorted(ids([*WHOLE[:3], *WHOLE[4:]])) == sorted(seen[11:])


def test_where_there_is_no_episode_it_is_said(data):
    with pytest.raises(DataError, match=r"split 'dev' of .* holds no whole episode; build it with an episode_share"):
        make_episodes(data, "dev", seed=0)
    with pytest.raises(DataError, match="slice_weights names python/generated, without a whole episode"):
        make_episodes(data, "train", seed=0, slice_weights={SLICE: 1.0, "python/generated": 1.0})
    assert next(make_episodes(data, "train", seed=0, slice_weights={SLICE: 1.0}))
