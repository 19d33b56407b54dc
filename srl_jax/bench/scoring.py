"""What rewards cost, together with a step and apart from it.

Beside sampling and the update a reward costs what the step waits for it; by itself, what parsing, embedding and
comparing take (likeness), and what executions do. Apart, a batch is always new to its service, as in training: each is
scored by a service of its own, whose embedder remembers no text.
"""

import dataclasses
import itertools
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from srl_jax.bench.tables import Spread
from srl_jax.config import TrainConfig
from srl_jax.embedding import load_embedder
from srl_jax.records import TeacherRecord
from srl_jax.rollout import executable
from srl_jax.run import Run
from srl_jax.sandbox.isolation import SandboxCrash
from srl_jax.sandbox.runner import Sandbox
from srl_jax.sandbox.service import Embeds, RewardService, Score, ScoreRequest, ScoresCompletions
from srl_jax.steps import take_step
from srl_jax.trace import parse_trace, render_trace

Figures = list[dict[str, Any]]
_COUNTS = ("scored", "executed", "tested")
_PARTS = ("rollout", "reference", "reward_wait", "update", "step")


class _Remembering:
    """A reward service that keeps what it was asked last."""

    def __init__(self, service: ScoresCompletions) -> None:
        self._service = service
        self.asked: list[ScoreRequest] = []

    def submit(self, items: Sequence[ScoreRequest]) -> Future[list[Score]]:
        self.asked = list(items)
        return self._service.submit(items)


def right_answers(records: Sequence[TeacherRecord], count: int) -> list[ScoreRequest]:
    """As many tasks, each answered with its teacher's action and another one's thought.

    What a batch costs at most: every action applies and is tested, and no thought is the teacher's own, which would
    not be embedded.
    """
    traces = [parse_trace(record.trace) for record in records]
    answers = itertools.cycle(
        ScoreRequest(render_trace(dataclasses.replace(trace, think=other.think)), record)
        for record, trace, other in zip(records, traces, [*traces[1:], traces[0]], strict=True)
    )
    return list(itertools.islice(answers, count))


def measure(config: TrainConfig, records: Sequence[TeacherRecord], rounds: int) -> tuple[Figures, Figures]:
    """A record about the steps that `config` takes on `records`, and one for each kind of batch scored apart.

    Each round takes a step, then scores its completions and as many right answers. The first step, which compiles, is
    not counted. Raises `SandboxCrash` when an execution is lost, and what `Run` and `Sandbox` raise.
    """
    prompts, members = config.sampled_shape
    steps: dict[str, list[float]] = {name: [] for name in _PARTS}
    batches: dict[str, list[dict[str, float]]] = {"sampled by the student": [], "right answers": []}
    # One that remembers no text, and one that will have seen them all.
    fresh, knowing = load_embedder(cache_size=0), load_embedder()
    with (
        tempfile.TemporaryDirectory() as folder,
        Run(config, folder) as run,
        Sandbox(config.sandbox.build()) as sandbox,
    ):
        usable = [record for record in records if executable(record, sandbox.runners)]
        if not usable:
            raise ValueError(f"none of {len(records)} records can be tested here (runners: {sorted(sandbox.runners)})")
        run.rewards = kept = _Remembering(run.rewards)
        stream = itertools.cycle(usable)
        for number in range(1 + rounds):
            told = take_step(run, stream, number, None).metrics
            for name, items in zip(batches, (kept.asked, right_answers(usable, prompts * members)), strict=True):
                costs = _costs(items, run, sandbox, fresh, knowing)
                if number:
                    batches[name].append(costs | {"step": told["seconds/step"]})
            if number:
                for name in _PARTS:
                    steps[name].append(told[f"seconds/{name}"])
    spread = lambda values: dataclasses.asdict(Spread.of(list(values)))
    of_steps = {f"{name.replace('_', ' ')} s": spread(values) for name, values in steps.items()}
    return (
        [{"prompts": prompts, "completions of each": members, **of_steps}],
        [
            {
                "completions": name,
                **{count: statistics.median_low([cost[count] for cost in costs]) for count in _COUNTS},
                "likeness ms each": spread(1e3 * cost["likeness"] / cost["scored"] for cost in costs),
                "likeness, % of a step": spread(100 * cost["likeness"] / cost["step"] for cost in costs),
                "ms an execution": spread(1e3 * cost["executions"] / max(cost["executed"], 1) for cost in costs),
                "executions, % of a step": spread(100 * cost["executions"] / cost["step"] for cost in costs),
                "both s": spread(cost["both"] for cost in costs),
            }
            for name, costs in batches.items()
        ],
    )


def _costs(
    items: Sequence[ScoreRequest], run: Run, sandbox: Sandbox, fresh: Embeds, knowing: Embeds
) -> dict[str, float]:
    """Seconds of scoring `items` without executing them, of executing them, and of both as a run does them, at once."""
    whole = run.config.reward.build()
    alone = dataclasses.replace(whole, execution=0.0, match_gate=0.0)

    def score(embedder: Embeds, sandbox: Sandbox | None) -> tuple[float, list[Score], int]:
        count = lambda text: len(run.student.tokenizer.encode_text(text))
        with RewardService(embedder, count, reward=whole if sandbox else alone, sandbox=sandbox) as service:
            began = time.perf_counter()
            scores = service.score(items)
            return time.perf_counter() - began, scores, service.counts.get("executed", 0)

    score(knowing, None)
    likeness, _, _ = score(fresh, None)
    executions, scores, executed = score(knowing, sandbox)
    both, _, _ = score(fresh, sandbox)
    lost = [one.unscored for one in scores if one.unscored]
    if lost:
        raise SandboxCrash(f"{len(lost)} of {len(items)} executions were lost ({lost[0]}), so their times say nothing")
    tested = sum(one.report is not None and one.report.tests != "not_run" for one in scores)
    return {"scored": len(items), "executed": executed, "tested": tested, "likeness": likeness,
            "executions": executions, "both": both}  # fmt: skip
