"""Metrics survive a kill and a resume, and say the same to a file, to TensorBoard and to a person."""

import io
import json
import math

import numpy as np
import pytest
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c

from srl_jax.metrics import (
    HISTOGRAMS_FILE,
    METRICS_FILE,
    MetricWriter,
    describe,
    is_timing,
    read_metrics,
    trend,
)

STEP = {"reward/total": 0.5, "reward/action": 0.25, "kl": 0.0125, "kept_groups": 0.75, "tokens_per_second": 812.4}


def plain() -> Console:
    return Console(file=io.StringIO(), width=200)


def write_steps(workdir, *steps, resumed_step=0, console=None):
    with MetricWriter(workdir, 10, resumed_step=resumed_step, console=console or plain()) as writer:
        for step in steps:
            writer.write(step, {"reward/total": step / 10})


def tensorboard_scalars(workdir) -> list[tuple[int, str, float]]:
    return [(event.step, v.tag, v.simple_value) for event in tensorboard_events(workdir) for v in event.summary.value]


def tensorboard_events(workdir) -> list[Event]:
    """Reads event files by the TFRecord framing: length, its checksum, the event, its checksum."""
    events = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            payload, stored, data = data[12 : 12 + size], data[12 + size : 16 + size], data[16 + size :]
            assert masked_crc32c(payload) == int.from_bytes(stored, "little")
            events.append(Event.FromString(payload))
    return events


def test_every_step_is_on_disk_before_close(tmp_path):
    writer = MetricWriter(tmp_path, 10, console=plain())
    writer.write(1, STEP)
    (record,) = read_metrics(tmp_path)
    writer.close()
    assert record.pop("time") > 0
    assert record == {"step": 1, **STEP}


def test_tensorboard_holds_the_same_numbers(tmp_path):
    with MetricWriter(tmp_path, 10, console=plain()) as writer:
        writer.write(3, {"reward/total": 0.5, "reward/think": None})
    assert tensorboard_scalars(tmp_path) == [(3, "reward/total", 0.5)]


def test_resume_drops_what_came_after_the_checkpoint(tmp_path):
    write_steps(tmp_path, 1, 2, 3, 4, 5)
    write_steps(tmp_path, 4, 5, 6, resumed_step=3)
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_fresh_start_drops_everything_but_step_zero(tmp_path):
    write_steps(tmp_path, 0, 1, 2)
    write_steps(tmp_path, 1)
    assert [record["step"] for record in read_metrics(tmp_path)] == [0, 1]


@pytest.mark.parametrize("cut", range(1, 30))
def test_line_cut_by_a_kill_is_dropped(tmp_path, cut):
    write_steps(tmp_path, 1, 2, 3)
    path = tmp_path / METRICS_FILE
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    steps = [record["step"] for record in read_metrics(tmp_path)]
    assert steps in ([1, 2], [1, 2, 3])
    write_steps(tmp_path, 3, resumed_step=2)
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3]


def test_line_that_lost_only_its_newline_does_not_swallow_the_next(tmp_path):
    write_steps(tmp_path, 1, 2)
    path = tmp_path / METRICS_FILE
    path.write_bytes(path.read_bytes()[:-1])
    write_steps(tmp_path, 3, resumed_step=2)
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3]


def test_rubbish_in_the_middle_is_named(tmp_path):
    write_steps(tmp_path, 1)
    path = tmp_path / METRICS_FILE
    path.write_text("rubbish\n" + path.read_text())
    with pytest.raises(ValueError, match=r"metrics\.jsonl:1: not a metrics record"):
        read_metrics(tmp_path)


def test_non_finite_values_stay_valid_json_and_are_named(tmp_path):
    with MetricWriter(tmp_path, 10, console=plain()) as writer:
        writer.write(1, {"loss": math.nan, "grad_norm": math.inf, "kl": 0.5, "reward/think": None})
    line = (tmp_path / METRICS_FILE).read_text()
    record = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert record["non_finite"] == ["grad_norm", "loss"]
    assert (record["loss"], record["kl"], record["reward/think"]) == (None, 0.5, None)


def test_one_line_description():
    assert describe(STEP) == "reward 0.500  action 0.250  KL 0.0125  kept 75%  812 tok/s"
    assert describe({"reward/total": None}) == ""


def test_plain_lines_without_control_codes(tmp_path):
    console = plain()
    with MetricWriter(tmp_path, 10, console=console) as writer:
        writer.note("loading [bold]model[/bold]")
        writer.write(9, STEP)
        writer.write(10, STEP)
        with writer.progress("evaluating base", 3) as advance:
            advance(2)
            advance(1)
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "loading [bold]model[/bold]"
    assert lines[1].startswith("step 9/10  reward 0.500") and "  ETA 0:00:0" in lines[1]
    assert lines[2].endswith("ETA 0:00:00")
    assert lines[3:] == ["evaluating base 3/3"]
    assert "\x1b" not in console.file.getvalue()


def test_live_view_on_a_terminal(tmp_path):
    console = Console(file=io.StringIO(), force_terminal=True, width=200)
    with MetricWriter(tmp_path, 10, resumed_step=4, console=console) as writer:
        writer.write(5, STEP | {"seconds/data_wait": 0.375, "seconds/queue_mean": None, "seconds/queue_max": None})
        writer.note("checkpoint 5 saved")
        with writer.progress("evaluating", 2) as advance:
            advance(1)
    output = console.file.getvalue()
    assert "5/10" in output
    assert "reward" in output and "0.500" in output and "0.0125" in output
    assert "entropy" not in output, "what is not measured has no row"
    assert "s queued: data, slot, longest" in output and "0.38  -  -" in output
    assert "checkpoint 5 saved" in output


def test_trends_run_from_the_lowest_to_the_highest_value():
    assert trend([0.0, 0.5, 1.0]) == "▁▅█"
    assert trend([2.0, None, 2.0, math.nan]) == "▁ ▁ "
    assert trend([None]) == " " and trend([]) == ""


def test_a_step_of_malformed_completions_alone_has_a_histogram(tmp_path):
    with MetricWriter(tmp_path, 10, console=plain()) as writer:
        writer.write(1, {"kl": 0.5}, {"reward/total": np.full(8, -0.2, np.float32)})  # a little less than -0.2
    (record,) = read_metrics(tmp_path, HISTOGRAMS_FILE)
    assert record["reward/total"]["counts"][0] == 8
    (histogram,) = [v.histo for e in tensorboard_events(tmp_path) for v in e.summary.value if v.tag.endswith("/total")]
    assert histogram.num == 8


def test_histograms_are_counted_alike_in_both_places(tmp_path):
    values = {"reward/total": np.array([-0.2, 0.11, 0.12, 1.0, 1.4]), "completion_tokens": [10, 20, 20], "none": []}
    with MetricWriter(tmp_path, 10, console=plain()) as writer:
        writer.write(1, {"kl": 0.5}, values)
        writer.write(2, {"kl": 0.5})
    (record,) = read_metrics(tmp_path, HISTOGRAMS_FILE)
    assert record["step"] == 1 and "none" not in record
    reward, tokens = record["reward/total"], record["completion_tokens"]
    assert reward["range"] == [-0.2, 1.0] and sum(reward["counts"]) == 5 and len(reward["counts"]) == 24
    assert reward["counts"][0] == 1 and reward["counts"][6] == 2 and reward["counts"][-1] == 2
    assert tokens["range"] == [10, 20] and (tokens["counts"][0], tokens["counts"][-1]) == (1, 2)
    (histogram,) = [v.histo for e in tensorboard_events(tmp_path) for v in e.summary.value if v.tag.endswith("/total")]
    assert histogram.num == 5 and list(histogram.bucket_limit)[-1] == pytest.approx(1.0)
    with MetricWriter(tmp_path, 10, resumed_step=0, console=plain()):
        assert not read_metrics(tmp_path, HISTOGRAMS_FILE)


def test_what_the_clock_decides_is_told_apart():
    assert is_timing("seconds/step") and is_timing("tokens_per_second") and is_timing("compiles")
    assert not is_timing("reward/total") and not is_timing("kl")
