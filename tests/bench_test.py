"""The benchmark: turns never overlap, failures keep their row, rounds survive, and its arithmetic is right by hand."""

import dataclasses
import itertools
import json
import pickle
import time
from unittest import mock

import jax
import numpy as np
import pytest

from srl_jax import grammar
from srl_jax.bench import floor, masking, ours, parts, scoring, tables, weights, worker, workload
from srl_jax.bench.race import SYSTEMS, race
from srl_jax.bench.workload import WORKLOADS
from srl_jax.config import ConfigError, TrainConfig
from srl_jax.model.families import ModelConfig
from srl_jax.sandbox.service import ScoreRequest
from srl_jax.steps import Step
from srl_jax.trace import parse_trace, render_trace
from tests import sandbox_soak
from tests.fakes import HashEmbedder, tiny_config
from tests.tiny_tokenizer import tiny_tokenizer

TINY = WORKLOADS["tiny"]


def quiet(line):
    """Takes what a race says."""


@pytest.fixture
def out(tmp_path):
    """A directory whose model is already there, so that fakes need none."""
    directory = tmp_path / "models" / f"{TINY.model}-{TINY.dtype}"
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    return tmp_path


def steady(out, name, seconds=0.02):
    return "tests.fake_systems:steady", {"log": str(out / "log"), "name": name, "seconds": seconds}


def test_systems_take_turns_and_rounds_survive(out):
    systems = {name: steady(out, name) for name in ("one", "two")}
    stored = race("t", TINY, systems, out, rounds=2, commit="c", say=quiet)
    assert [list(entry["systems"]) for entry in stored["rounds"]] == [["one", "two"], ["two", "one"]]
    lines = [line.split() for line in (out / "log").read_text().splitlines()]
    spans = sorted((float(began), float(ended)) for _, _, began, ended in lines)
    assert len(spans) == 3 * 2 * 2, "warm-up and two rounds of two parts of two systems"
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans)), "one at a time"
    turn = stored["rounds"][0]["systems"]["one"]["rollout"]
    assert turn["tokens"] == TINY.tokens and 0.02 <= turn["seconds"] < 60 and turn["peak_mb"] > 1
    # The same call again measures nothing; a third round adds to the two; another commit's are not mixed in.
    assert race("t", TINY, systems, out, rounds=2, commit="c", say=quiet) == stored
    more = race("t", TINY, systems, out, rounds=3, commit="c", say=quiet)
    assert more["rounds"][:2] == stored["rounds"] and len(more["rounds"]) == 3
    with pytest.raises(ConfigError, match=r"rounds of commit c, this is d; give another --out"):
        race("t", TINY, systems, out, rounds=4, commit="d", say=quiet)


def test_who_fails_keeps_its_row_with_the_reason(out):
    fakes = ("breaks_in_the_second_round", "dies", "not_installed")
    systems = {"ours": steady(out, "ours")} | {name: (f"tests.fake_systems:{name}", {}) for name in fakes}
    stored = race("t", TINY, systems, out, rounds=2, commit="c", say=quiet)
    figures = tables.summary(stored, "ours")
    assert figures["ours"]["rounds"] == 2
    assert figures["breaks_in_the_second_round"] == {"failed": "MemoryError: no room for | the logits"}
    assert figures["not_installed"]["failed"].startswith("not installed: No module named")
    assert "exit code 137" in figures["dies"]["failed"]
    page = tables.race_table(figures, "ours")
    assert "failed: MemoryError: no room for / the logits" in page and page.count("failed: ") == 3


def turn(rollout, update, tokens=100, compilations=0):
    one = {"compilations": compilations, "compile_seconds": 0.5, "peak_mb": 10.0}
    return {"rollout": {"seconds": rollout, "tokens": tokens, **one}, "update": {"seconds": update, "tokens": 0, **one}}


def test_ratios_are_taken_within_rounds():
    # The machine is four times as slow in the second round. Medians over rounds would compare unlike minutes.
    rounds = [
        {"ours": turn(1, 2), "peer": turn(2, 8)},
        {"ours": turn(4, 8), "peer": turn(12, 32)},
        {"ours": turn(1, 2, compilations=1), "peer": turn(5, 8)},
    ]
    value = {"warmup": {"ours": turn(3, 4), "peer": turn(1, 1)}, "rounds": [{"systems": entry} for entry in rounds]}
    figures = tables.summary(value, "ours")
    assert figures["peer"]["times_as_fast"]["rollout"] == {"median": 3, "least": 2, "greatest": 5}
    assert figures["peer"]["times_as_fast"]["update"] == {"median": 4, "least": 4, "greatest": 4}
    assert figures["peer"]["times_as_fast"]["step"]["median"] == pytest.approx(11 / 3)  # of 10/3, 11/3 and 13/3
    assert "times_as_fast" not in figures["ours"]
    assert figures["ours"]["tokens_per_s"] == {"median": 100, "least": 25, "greatest": 100}
    assert figures["ours"]["recompilations"] == 2 and figures["peer"]["recompilations"] == 0
    assert "| 2 | 100 | 10 |" in tables.race_table(figures, "ours"), "recompilations, tokens, MB"
    for entry in rounds:
        entry["peer"]["update"]["compilations"] = None
    uncounted = tables.summary(value, "ours")
    assert uncounted["peer"]["recompilations"] is None and "| - | 100 | 10 |" in tables.race_table(uncounted, "ours")
    assert figures["ours"]["first_step_s"] == 7 and figures["ours"]["compile_s"] == 1.0
    assert "| 100.0 (25.0..100.0) |" in tables.race_table(figures, "ours")


def test_floors_by_hand():
    # One layer, D 4, N 2, K 1, H 2, F 8, V 10: maps of 16 + 8 + 8 + 16 + 32 + 32 + 32 = 144 weights, 288 operations.
    config = ModelConfig("llama", 10, 4, 1, 2, 1, 2, 8)
    w = workload.Workload("x", 2, 3, 5, 4, lora_rank=1)
    assert floor.rows_needed(w) == (6, 10, 5 + 12)
    slow_memory = floor.floors(config, w, floor.Machine(1.0, dict.fromkeys((6, 10, 17), 1e12)))
    slow_products = floor.floors(config, w, floor.Machine(1e12, dict.fromkeys((6, 10, 17), 1.0)))
    # Prefill: weights and head, (288 + 80) / 2 * 4 bytes; 10 tokens of 288 and attention 4 * 1 * 2 * 2 * 2.5.
    assert slow_memory["prefill"].seconds == 736
    assert slow_products["prefill"].seconds == 10 * (288 + 40)
    # A step reads the weights, keys and values (2 * 1 * 1 * 2 * 4 = 16 bytes a position) of 10 shared positions and of
    # 2 on average of each of 6 rows, and writes 4 * 6 * 10 bytes of logits; it computes 6 rows that see 5 + 2.
    assert slow_memory["decode"].seconds == 4 * (736 + 16 * (10 + 12) + 240)
    assert slow_products["decode"].seconds == 4 * 6 * (288 + 80 + 16 * 7)
    # Adapters: 1 * (8 + 6 + 6 + 8 + 12 + 12 + 12) weights, 128 operations.
    products = 3 * ((10 + 24) * (288 + 128) + 24 * 80)
    assert slow_products["update"].seconds == products + 4 * (10 * 40 + 24 * 16 * 7)
    # The grammar forces 14 of the 24 tokens, so the head sees ten.
    some = floor.floors(config, w, floor.Machine(1e12, dict.fromkeys((6, 10, 17), 1.0)), scored=10)
    assert some["update"].multiplying == slow_products["update"].multiplying - 3 * 14 * 80
    assert some["decode"] == slow_products["decode"] and some["update"].reading == slow_products["update"].reading


def test_rates_are_measured():
    rates = floor.measure(ModelConfig("llama", 10, 64, 2, 2, 1, 32, 128), "float32", (1, 64))
    assert 1e8 < rates.bandwidth < 1e13 and set(rates.gemm) == {1, 64}
    assert rates.gemm[64] > rates.gemm[1], "more rows use the weights they read more often"


def test_ours_runs_as_it_trains(tmp_path):
    stored = race("t", TINY, {"ours": SYSTEMS["ours"]}, tmp_path, rounds=2, commit="c", say=quiet)
    figures = tables.summary(stored, "ours")["ours"]
    assert figures["tokens"] == TINY.tokens, "under the grammar every row lives to its last token"
    assert figures["recompilations"] == 0 and figures["compile_s"] > 0
    assert stored["rounds"][-1]["systems"]["ours"]["update"]["logprob_gap"] < 1e-4, "what was sampled is trained on"
    assert figures["prefill_s"] < figures["rollout_s"]["median"]
    ids = workload.prompts(TINY, tmp_path / "models" / "tiny-float32")
    assert ids.shape == (TINY.prompts, TINY.prompt_tokens) and len({row.tobytes() for row in ids}) == TINY.prompts
    rates = floor.Machine(1e10, dict.fromkeys(floor.rows_needed(TINY), 1e10))
    config = weights.read_shape(tmp_path / "models" / "tiny-float32")
    assert 0 < figures["scored_tokens"] < TINY.tokens, "some tokens are forced"
    floors = {part: value.to_dict() for part, value in floor.floors(config, TINY, rates).items()}
    assert tables.floor_table(floors, figures).count("\n") == 4


def test_made_up_advantages_are_relative():
    gains = workload.advantages(WORKLOADS["w2"])
    assert gains.shape == (2, 8) and np.allclose(gains.sum(axis=1), 0) and gains.std() > 0.5


def test_a_widened_vocabulary_still_spells_traces(tmp_path):
    tokenizer = tiny_tokenizer()
    vocabulary = masking.widened(tokenizer, 1200)
    assert vocabulary.vocab_size == 1200 and vocabulary.token_bytes[: tokenizer.vocab_size] == tokenizer.token_bytes
    made = vocabulary.token_bytes[tokenizer.vocab_size :]
    assert len(set(made)) == len(made) and not set(made) & set(tokenizer.token_bytes)
    automaton = grammar.compile_grammar(vocabulary, cache_dir=tmp_path)
    assert automaton.kind_of_token.shape == (1200,)
    assert grammar.shortest_trace(automaton) <= grammar.shortest_trace(
        grammar.compile_grammar(tokenizer, cache_dir=tmp_path)
    )


def test_the_mask_of_a_step_is_timed():
    automaton = grammar.compile_grammar(tiny_tokenizer())
    scores = jax.numpy.zeros((2, automaton.kind_of_token.shape[0]))
    state, _ = masking.steps(automaton, scores, 3, True)
    assert state.remaining.tolist() == [15_997] * 2, "three tokens were chosen and followed"


def test_what_a_variant_changes_changes_no_token(tmp_path):
    # Compaction and guesses only make the same tokens sooner; ragged rows end early, which is what compaction is for.
    work = dataclasses.replace(TINY, group_size=8)  # two slots of eight rows, enough to compact
    variants = {name: SYSTEMS[name] for name in ("ragged", "uncompacted", "speculating")}
    stored = race("t", work, variants, tmp_path, rounds=3, commit="c", say=quiet)
    for turns in (entry["systems"] for entry in stored["rounds"]):
        ragged, uncompacted, speculating = (turns[name]["rollout"] for name in variants)
        assert ragged["tokens"] == uncompacted["tokens"] < work.tokens
        assert speculating["tokens"] == work.tokens
        assert not ragged["compilations"] and not speculating["compilations"], "all sizes are compiled before"
    assert "drafts_accepted" in tables.summary(stored, "ragged")["speculating"]


def test_accepted_drafts_by_hand():
    # The prompt is 1 2 3 4 1 2. Row one: 3 4 1 2 3 9; row two: 7 8.
    drawn = {"tokens": np.asarray([[[3, 4, 1, 2, 3, 9], [7, 8, 0, 0, 0, 0]]])}
    drawn["mask"] = np.asarray([[[1] * 6, [1, 1, 0, 0, 0, 0]]], bool)
    # After 3 4: 1 2 was right, both of two guesses; then 3 is drawn, and after 2 3 comes 4, wrong where 9 ends the row.
    share = ours.accepted_drafts(np.asarray([[1, 2, 3, 4, 1, 2]]), np.asarray([6]), drawn, 2)
    assert share == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parts": []}, r"parts = '': must name one or more of ablation, grammar, reward, tags, workloads"),
        ({"workloads": []}, r"workload = '': must name one or more of gpu05b"),
        ({"parts": ["speed"]}, r"parts = 'speed': must be among ablation, grammar, reward, tags, workloads"),
        ({"workloads": ["w9"]}, r"workload = 'w9': must be among gpu05b"),
        ({"compare": ["verl"]}, r"compare = 'verl': must be among hf, trl, tunix, unforced"),
        ({"compare": ["ours"]}, r"compare = 'ours'"),
        ({"parts": ["reward"]}, r"config = None: --parts=reward takes steps: give --config=configs/smollm2_cpu.py"),
        (
            {"parts": ["reward"], "config": TrainConfig(method="sft")},
            r"method = 'sft': --parts=reward takes steps of method 'srl'",
        ),
    ],
)
def test_names_are_checked_first(tmp_path, changes, message):
    wanted = {"parts": ["workloads"], "workloads": ["tiny"], "compare": [], **changes}
    request = parts.Request(tmp_path / "new", rounds=1, command="", records=list, **wanted)
    with pytest.raises(ConfigError, match=message):
        parts.run(request, quiet)
    assert not (tmp_path / "new").exists()


def test_the_page_shows_every_section(out, monkeypatch):
    for name in SYSTEMS:
        monkeypatch.setitem(SYSTEMS, name, steady(out, name, 0.4 if name == "unshared" else 0.02))
    request = parts.Request(out, ["ablation"], ["tiny"], [], 2, "the command", list)
    parts.run(request, quiet)
    page = (out / "results.md").read_text()
    assert "the command" in page and "### TINY: 2 prompts x 2 completions" in page and "| unshared |" in page
    sections = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [(section["section"], section.get("first")) for section in sections] == [
        ("machine", None), ("race", "ours"), ("race", "ours"), ("race", "ragged"), ("race", "speculating")
    ]  # fmt: skip
    faster = sections[1]["figures"]["unshared"]["times_as_fast"]
    assert faster["rollout"]["median"] > 2 and faster["update"]["median"] > 2
    found = parts.page([{"section": "figures", "title": "some figures", "figures": [{"a": 1, "b": 0.12345}]}])
    assert found == "### Some figures\n\n| a | b |\n| --- | --- |\n| 1 | 0.1235 |\n" or "0.1234" in found


def test_what_another_call_measured_at_this_commit_stays(tmp_path):
    figures = lambda title, value: {"section": "figures", "title": title, "figures": [{"a": value}]}
    of = lambda command, commit="c": {**parts.machine(command), "commit": commit}
    first = parts.Results(tmp_path, of("one"))
    first.add([figures("rewards", 1), figures("tags", 2)])
    second = parts.Results(tmp_path, of("two"))
    second.add([figures("tags", 3)])
    stored = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(s["section"], s.get("command"), s.get("figures")) for s in stored] == [
        ("machine", "one", None), ("figures", None, [{"a": 1}]), ("figures", None, [{"a": 3}]), ("machine", "two", None)
    ]  # fmt: skip
    page = (tmp_path / "results.md").read_text()
    assert "`one` at c" in page and "`two` at c" in page and "### Rewards" in page
    # Another commit's go.
    assert [s["section"] for s in parts.Results(tmp_path, of("one", "d")).sections] == ["machine"]


def test_who_takes_too_long_does_not_go_on_beside_the_others(out, monkeypatch):
    systems = {"slow": ("tests.fake_systems:hangs_in_the_second_turn", {}), "quick": steady(out, "quick")}
    started = time.monotonic()
    hurry = lambda line: monkeypatch.setattr("srl_jax.bench.race._LIMIT_S", 3.0)  # once both have started
    stored = race("t", TINY, systems, out, rounds=1, commit="c", say=hurry)
    assert time.monotonic() - started < 300, "it is not waited for"
    [reports] = [entry["systems"] for entry in stored["rounds"]]
    assert reports["slow"] == {"failed": "rollout took longer than 3 s"}
    assert reports["quick"]["rollout"]["tokens"] == TINY.tokens
    went_on = out / "models" / f"{TINY.model}-{TINY.dtype}" / "went-on"
    time.sleep(4)  # more than it would have needed
    assert not went_on.exists()


def fails(value):
    raise ConfigError("a", value, "must be 2")


def test_what_a_part_raises_comes_back_from_its_process(capsys):
    with pytest.raises(worker.PartFailed, match=r"^ConfigError: config.a = 1: must be 2$") as caught:
        worker.carried(fails, 1)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    assert "in fails" in capsys.readouterr().err


def runnable_record(number):
    """A task with a unittest, its own for each number, and its teacher's own thought."""
    record = sandbox_soak.record(2 * number)
    trace = dataclasses.replace(parse_trace(record.trace), think=f"{number}: the old call is gone")
    return dataclasses.replace(record, trace=render_trace(trace))


class Counting(HashEmbedder):
    """Counts the thoughts it is given."""

    given = 0

    def embed(self, texts):
        Counting.given += len(texts)
        return super().embed(texts)


class StepOnly:
    """Stands for `Run` and its steps, whose real ones `steps_test` has: four completions to score, and its times."""

    def __init__(self, config, folder):
        self.config, self.rewards = config, mock.Mock()
        self.student = mock.Mock(tokenizer=mock.Mock(encode_text=str.split))

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def step(self, stream, number, recorder):
        trace = parse_trace((record := next(stream)).trace)
        odd = dataclasses.replace(trace, action=dataclasses.replace(trace.action, pattern="gone($X)"))
        own = [dataclasses.replace(odd, think=f"step {number}, thought {i}") for i in range(3)]
        self.rewards.submit(
            [*(ScoreRequest(render_trace(one), record) for one in own), ScoreRequest("malformed", record)]
        )
        seconds = {"rollout": 2.0, "reference": 1.0, "reward_wait": 0.25, "update": 3.0, "step": 6.5 + number}
        return Step({f"seconds/{name}": value for name, value in seconds.items()}, {})


def test_rewards_are_timed_together_with_a_step_and_apart_on_what_nobody_has_seen(monkeypatch):
    config = tiny_config()
    config.data.prompts_per_step, config.grpo.group_size, config.grpo.micro_batch = 2, 2, 2
    records = [runnable_record(number) for number in range(4)]
    answers = scoring.right_answers(records, 6)
    assert [answer.record for answer in answers] == [*records, *records[:2]]
    for answer, follower in zip(answers, [*answers[1:4], answers[0]], strict=False):
        ours, teachers = parse_trace(answer.completion), parse_trace(answer.record.trace)
        assert (ours.action, ours.state) == (teachers.action, teachers.state)
        assert ours.think == parse_trace(follower.record.trace).think != teachers.think
    made = []
    load = lambda cache_size=1: made.append(cache_size) or Counting()
    monkeypatch.setattr(scoring, "load_embedder", load)
    monkeypatch.setattr(scoring, "Run", StepOnly)
    monkeypatch.setattr(scoring, "take_step", StepOnly.step)
    [steps], (sampled, right) = scoring.measure(config, records, 1)
    assert made == [0, 1], "one embedder keeps nothing"
    # Three thoughts of the students and four of the right answers, in two rounds, each four times: to know it, alone,
    # its executions alone, and both.
    assert Counting.given == (3 + 4) * 2 * 4
    assert steps["prompts"] == 2 and steps["completions of each"] == 2
    assert steps["reward wait s"]["median"] == 0.25 and steps["step s"]["greatest"] == 7.5, "without the first step"
    assert (right["scored"], right["executed"], right["tested"]) == (4, 4, 4)
    # The three sampled actions are one, which matches nothing: it is executed once, and no test has to run.
    assert (sampled["scored"], sampled["executed"], sampled["tested"]) == (4, 1, 0)
    for row in (sampled, right):
        assert row["ms an execution"]["least"] > 1 and 0 < row["likeness ms each"]["median"] < 1000
        share = row["ms an execution"]["median"] * row["executed"] / 7500 * 100
        assert row["executions, % of a step"]["median"] == pytest.approx(share)
    assert "| right answers | 4 | 4 | 4 | " in tables.figures_table([sampled, right])
    spread = {"median": 12.3456, "least": 9.3e-5, "greatest": 1234.5}
    assert tables.figures_table([{"a": spread}]).endswith("| 12.35 (0.0001..1234) |")
