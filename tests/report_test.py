"""The report: right numbers, hostile model text contained, one clear error for what cannot be reported."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from srl_jax.metrics import METRICS_FILE, read_metrics
from srl_jax.report import ReportError, write_report

PNG = b"\x89PNG\r\n\x1a\n"


def item(number: int, reward: float | None = 0.5, **changes: object) -> dict:
    values = {
        "task_id": f"task-{number:02}", "slice": "python" if number % 2 else "javascript", "rule": f"rule-{number % 3}",
        "instruction": "Rename old to new", "prompt": "...", "completion": f"<think>try {number}</think>",
        "teacher": "<think>rename</think>", "reward": reward, "action": reward, "state": 0.5, "think": 0.5,
        "brevity": 0.0, "rejection": None, "executed": True, "success": reward is not None and reward > 0.6,
        "kl": 0.01, "tokens": 50, "think_tokens": 10, "state_tokens": 20,
    }  # fmt: skip
    return {**values, **changes}


MALFORMED = {
    "action": None, "state": None, "think": None, "brevity": None, "rejection": "truncated", "executed": False,
    "success": False, "reward": -0.2,
}  # fmt: skip


def write_evaluation(workdir: Path, name: str, items: list[dict]) -> None:
    (workdir / f"eval_{name}.json").write_text(json.dumps({"name": name, "config": {}, "metrics": {}, "items": items}))


@pytest.fixture
def workdir(tmp_path):
    base = [item(n, 0.3 + n / 100) for n in range(10)]
    base[4] = {**item(4), **MALFORMED}
    write_evaluation(tmp_path, "base", base)
    write_evaluation(tmp_path, "student", [item(n, 0.5 + n / 50) for n in range(10)])
    lines = (
        {"step": s, "reward/total": 0.3 + s / 100, "reward/action": None, "kl": s / 1000, "parse_rate": 1.0}
        for s in range(1, 21)
    )
    (tmp_path / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def table_row(text: str, label: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| {label} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_numbers_of_the_comparison(workdir):
    text = write_report(workdir).read_text()
    # Base rewards: .30 ... .39 without .34, and -.2: sum 3.45 - .34 - .2 = 2.91. Student: mean .5 + 4.5/50 = .59.
    base, student, difference = table_row(text, "reward")
    assert base.startswith("0.291 [")
    assert student.startswith("0.590 [")
    assert difference.startswith("0.299 [")
    # The malformed trace has no action: nine values, sum 3.11; pairs leave task 4 (student .58) out: 5.32 - 3.11.
    base, student, difference = table_row(text, "R_action")
    assert base.startswith("0.346 [")
    assert difference.startswith(f"{(5.32 - 3.11) / 9:.3f} [")
    assert [cell[:5] for cell in table_row(text, "parse rate")] == ["0.900", "1.000", "0.100"]
    assert [cell[:5] for cell in table_row(text, "execution success")] == ["0.000", "0.400", "0.400"]
    assert table_row(text, "truncated") == ["1", "0"]
    assert "student minus base: **0.299 [" in text and "the student scores higher" in text
    assert "Training: 20 steps." in text


def test_what_recording_cost_is_told_without_the_steps_that_compiled(workdir):
    assert "Storing" not in write_report(workdir).read_text(), "nothing was recorded"
    spent = [(0.9, 10.0, 30), (0.01, 2.0, 0), (0.03, 6.0, 0)]
    lines = [
        {"step": step, "seconds/record": record, "seconds/step": whole, "compiles": compiles}
        for step, (record, whole, compiles) in enumerate(spent, start=1)
    ]
    (workdir / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "Storing their rollouts took 0.50% of 2 steps' time" in write_report(workdir).read_text()
    (workdir / METRICS_FILE).write_text(json.dumps(lines[0]) + "\n")
    assert "Storing their rollouts took 9.00% of 1 steps' time" in write_report(workdir).read_text()


def test_every_slice_has_its_own_table(workdir):
    text = write_report(workdir).read_text()
    javascript = text.split("### <code>javascript</code>, 5 tasks")[1].split("### <code>python</code>, 5 tasks")[0]
    # Even tasks: .30, .32, -.2, .36, .38.
    assert table_row(javascript, "reward")[0].startswith("0.232 [")


def test_plots_are_images_and_linked(workdir):
    text = write_report(workdir).read_text()
    linked = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert linked == ["plots/reward.png", "plots/kl.png", "plots/parse_rate.png", "plots/before_after.png"]
    assert all((workdir / path).read_bytes().startswith(PNG) for path in linked)
    assert not list(workdir.rglob("*tmp"))


def test_traces_are_chosen_by_rule(workdir):
    text = write_report(workdir).read_text()
    titles = re.findall(r"### (.*?): <code>(task-\d\d)</code>", text)
    # Gains rise with the task number (.2 + n/100); the malformed one gains .78.
    assert titles == [("Greatest gain", "task-04"), ("Median", "task-05"), ("Greatest loss", "task-00")]


def test_floors_and_teacher_get_their_columns(workdir):
    write_evaluation(workdir, "floor_copy", [item(n, 0.1, kl=None, success=None) for n in range(10)])
    text = write_report(workdir).read_text()
    assert "|  | base | student | floor_copy | student - base |" in text
    assert table_row(text, "reward")[2] == "0.100 [0.100, 0.100]"
    assert table_row(text, "execution success")[2] == "-"


def test_evaluations_during_training_are_a_curve_not_columns(workdir):
    for step in (4, 12):
        write_evaluation(workdir, f"step{step}", [item(n, 0.4) for n in range(10)])
    text = write_report(workdir).read_text()
    assert "|  | base | student | student - base |" in text
    assert "plots/held_out.png" in text
    assert (workdir / "plots" / "held_out.png").read_bytes().startswith(PNG)


def test_the_curve_is_of_the_same_tasks_and_of_what_was_evaluated_then(workdir, monkeypatch):
    last = read_metrics(workdir)[-1]["step"]
    write_evaluation(workdir, "step1", [item(n, 0.4) for n in range(10)])
    write_evaluation(workdir, "step2", [item(n + 100, 0.4) for n in range(10)])  # of another split
    write_evaluation(workdir, f"step{last}", [item(n, 0.05) for n in range(10)])  # worse than the best, which was kept
    drawn = []
    monkeypatch.setattr("srl_jax.report._plots", lambda *given: drawn.append(given[-1]) or "")
    write_report(workdir)
    means = {step: round(float(np.mean([one["reward"] for one in items])), 3) for step, items in drawn[0].items()}
    assert sorted(means) == [0, 1, last] and means[1] == 0.4 and means[last] == 0.05


def test_unscored_tasks_are_left_out_and_counted(workdir):
    unscored = {"reward": None, "action": None, "state": None, "think": None, "brevity": None, "success": None}
    write_evaluation(workdir, "student", [item(0, **unscored), *(item(n, 0.5 + n / 50) for n in range(1, 10))])
    text = write_report(workdir).read_text()
    assert "over 9 tasks" in text
    assert "1 tasks could not be scored" in text
    # The other nine: student .5 + 5/50 = .6 on average, base 2.61 / 9 = .29.
    assert table_row(text, "reward")[2].startswith("0.310 [")
    assert table_row(text, "parse rate")[1].startswith("1.000 [")
    write_evaluation(workdir, "student", [item(n, **unscored) for n in range(10)])
    assert "nothing can be compared" in write_report(workdir).read_text()


def test_lower_and_undecided_are_said_plainly(workdir):
    write_evaluation(workdir, "student", [item(n, 0.1) for n in range(10)])
    write_evaluation(workdir, "base", [item(n, 0.2) for n in range(10)])
    assert "the student scores **lower**" in write_report(workdir).read_text()
    write_evaluation(workdir, "student", [item(n, 0.2 + (-1) ** n / 10) for n in range(10)])
    assert "no difference can be told" in write_report(workdir).read_text()


def test_a_handful_of_tasks_shows_no_difference_however_they_agree(workdir):
    for name, reward in (("base", 0.2), ("student", 0.3)):
        write_evaluation(workdir, name, [item(n, reward + n / 100 * (name == "student")) for n in range(5)])
    text = write_report(workdir).read_text()
    # All five gain, so the interval of the mean lies above 0; but of 2^5 flips two are as extreme: p = .0625.
    assert "**0.120 [0.1" in text and "no difference can be told" in text and "p = 0.062" in text


def test_without_training_metrics_the_tables_remain(workdir):
    (workdir / METRICS_FILE).unlink()
    text = write_report(workdir).read_text()
    assert "plots/kl.png" not in text
    assert "plots/before_after.png" in text


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)


def test_model_text_cannot_break_out(workdir):
    hostile = "</pre></td></table>\n\n# Heading\n\n<script>alert(1)</script>```\n| a | b |\r\n![x](http://e.com/x)"
    write_evaluation(
        workdir,
        "student",
        [item(n, 0.5, completion=hostile, instruction=hostile, slice="a|b\n# c", rule="<b>") for n in range(10)],
    )
    write_evaluation(workdir, "base", [item(n, 0.4, slice="a|b\n# c", rule="<b>") for n in range(10)])
    text = write_report(workdir).read_text()
    tags = _Tags()
    tags.feed(text)
    assert tags.seen <= {"table", "tr", "th", "td", "pre", "code", "br"}
    headings = [line for line in text.splitlines() if line.startswith("# ")]
    assert headings == ["# Report"]


def test_long_traces_are_cut(workdir):
    write_evaluation(workdir, "student", [item(n, 0.5, completion="x" * 100_000) for n in range(10)])
    text = write_report(workdir).read_text()
    assert "... (100000 characters)" in text
    assert len(text) < 50_000


def without(field: str) -> dict:
    return {name: value for name, value in item(0, 0.5).items() if name != field}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"eval_student\.json: no such file; run launch/evaluate\.py"),
        ("{", r"eval_student\.json: not an evaluation"),
        ("[]", r"eval_student\.json: not an evaluation"),
        ('{"items": [3]}', r"eval_student\.json: not an evaluation"),
        ('{"items": []}', r"eval_student\.json: items is empty"),
        (json.dumps({"items": [without("kl")]}), r"eval_student\.json: items\[0\] lacks kl"),
        (json.dumps({"items": [item(0, 0.5)] * 2}), r"'task-00' occurs 2 times"),
        (json.dumps({"items": [item(0, 0.5)]}), r"task 'task-01' \(9 in all\) is in only one"),
    ],
)
def test_what_cannot_be_reported_is_one_error(workdir, content, message):
    path = workdir / "eval_student.json"
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    with pytest.raises(ReportError, match=message):
        write_report(workdir)
    assert not (workdir / "report.md").exists()


def deep(number: int, reward: float, **changes: object) -> dict:
    """An item of an evaluation with samples and kinds."""
    answer = lambda success: {"reward": reward, "rejection": None, "success": success, "kl": 0.25}
    values = {
        "language": "python", "source": "real" if number < 4 else "generated", "step": 2 if number < 2 else None,
        "rule_seen": False, "action_tokens": 30, "match_precision": 0.5, "match_recall": 1.0,
        "sampled": [answer(True), answer(False)],
        "free": [answer(False), {**answer(False), "reward": -0.2, "rejection": "missing_tag"}],
    }  # fmt: skip
    return item(number, reward, **{**values, **changes})


def test_samples_kinds_and_match_sets_have_their_rows(workdir):
    write_evaluation(workdir, "base", [deep(n, 0.3) for n in range(10)])
    write_evaluation(workdir, "student", [deep(n, 0.5 if n < 4 else 0.2) for n in range(10)])
    text = write_report(workdir).read_text()
    assert [cell[:5] for cell in table_row(text, "sampled: pass@1")] == ["0.500", "0.500", "0.000"]
    assert [cell[:5] for cell in table_row(text, "sampled: pass@2")] == ["1.000", "1.000", "0.000"]
    assert "sampled: pass@4" not in text, "a row that nobody has is left out"
    assert table_row(text, "without the grammar: parse rate")[0].startswith("0.500")
    assert [table_row(text, f"match-set {name}")[0][:5] for name in ("precision", "recall")] == ["0.500", "1.000"]
    assert table_row(text, "missing_tag (free)") == ["10", "10"]
    kinds = text.split("## By kind of task")[1]
    # tasks, reward of base and student, the difference, success of base and student
    real = table_row(kinds, "code: real")
    assert real[0] == "4" and real[3].startswith("0.200 [0.200, 0.200], p = 0.125")  # 2 of 2^4 flips
    assert table_row(kinds, "code: synthetic")[3].startswith("-0.100 [-0.100, -0.100], p = 0.031")  # 2 of 2^6
    assert table_row(kinds, "place: step 2 of an episode")[0] == "2"
    assert table_row(kinds, "rule: held out")[0] == "10" and "seen in training" not in text


def test_the_verdict_comes_with_a_paired_test(workdir):
    text = write_report(workdir).read_text()
    # Ten gains, all above 0: the two extreme flips of 2^10, and of 2^3 where whole rules are flipped.
    assert "Sign-flip test of the paired differences: p = 0.002; flipping whole rules: p = 0.250." in text


def test_tasks_of_seen_rules_stand_beside_the_held_out_ones_and_nowhere_else(workdir):
    write_evaluation(workdir, "base", [deep(n, 0.3) for n in range(10)])
    write_evaluation(workdir, "student", [deep(n, 0.4) for n in range(10)])
    for name, reward in (("base", 0.3), ("student", 0.9)):
        write_evaluation(workdir, name + "_x", [deep(n, reward, rule_seen=True) for n in range(20, 25)])
        (workdir / f"eval_{name}_x.json").rename(workdir / f"seen_{name}.json")
    text = write_report(workdir).read_text()
    assert table_row(text, "reward")[1].startswith("0.400 ["), "the headline is of held-out tasks"
    kinds = text.split("## By kind of task")[1]
    assert table_row(kinds, "rule: held out")[:3] == ["10", "0.300 [0.300, 0.300]", "0.400 [0.400, 0.400]"]
    assert table_row(kinds, "rule: seen in training")[:3] == ["5", "0.300 [0.300, 0.300]", "0.900 [0.900, 0.900]"]
    assert table_row(kinds, "language: python")[0] == "10"
    assert "may have been trained on themselves" in text


def test_episodes_stand_beside_the_same_steps_alone(workdir):
    steps = [
        {"episode_id": episode, "step": step, "steps": 2, "task_id": f"task-0{2 * number + step}",
         "reward": 0.5 / step, "success": success}
        for number, (episode, ends) in enumerate({"a": (True, False), "b": (True, True), "c": (True, None)}.items())
        for step, success in enumerate(ends, 1)
    ]  # fmt: skip
    items = [item(n, 0.7) for n in range(10)]
    content = {"name": "student", "config": {}, "metrics": {}, "items": items, "episodes": steps}
    (workdir / "eval_student.json").write_text(json.dumps(content))
    part = write_report(workdir).read_text().split("## Episodes")[1]
    rows = [line.split(" | ") for line in part.splitlines() if line.startswith("| student |")]
    assert [row[1] for row in rows] == ["1", "2", "3"]
    assert [cell[:5] for cell in rows[0][2:]] == ["3", "0.500", "0.700", "1.000", "1.000"]
    assert [cell[:5] for cell in rows[1][2:]] == ["3", "0.250", "0.700", "0.500", "1.000"]  # one end is unknown
    assert rows[2][2].startswith("0.500 ["), "of the two episodes whose end is known, one succeeds throughout"


def test_time_is_told_where_it_is_known(workdir):
    content = json.loads((workdir / "eval_student.json").read_text())
    content["metrics"] = {"seconds": 10.0, "seconds_by_part": {"rollout": 7.5, "reward_wait": 2.0}}
    content["passes"] = {"sampled": {"count": 8, "seconds": 61.25, "seconds_by_part": {}}}
    (workdir / "eval_student.json").write_text(json.dumps(content))
    text = write_report(workdir).read_text()
    assert "| student | greedy | 10.0 | rollout 7.5, reward_wait 2 |" in text
    assert "| student | sampled | 61.2 | - |" in text
