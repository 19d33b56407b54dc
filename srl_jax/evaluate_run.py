"""All that a report holds of a run: teacher, floors, base and student, with every pass, in one table.

The same command again goes on where it was: an evaluation of the same tasks, settings and adapters is not repeated,
and a pass continues after its last batch.
"""

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from rich.progress import Progress

from srl_jax.checkpoint import CheckpointError
from srl_jax.config import TrainConfig
from srl_jax.episodes import whole_episodes
from srl_jax.evaluate import NothingToEvaluate, evaluate, evaluated_before, fitting_tasks
from srl_jax.evaluation import mark_rules, write_json
from srl_jax.floors import bounds, evaluate_answers
from srl_jax.model.hf import weights_hash
from srl_jax.page import write_page
from srl_jax.passes import Passes, add_answers, add_episodes, greedy_answers, teachers_answers
from srl_jax.records import TeacherRecord
from srl_jax.report import load_evaluation, write_report
from srl_jax.rollout import executable
from srl_jax.run import Run
from srl_jax.sandbox.runner import Sandbox


def evaluate_run(
    config: TrainConfig,
    workdir: Path,
    out: Path,
    held_out: Sequence[TeacherRecord],
    corpus: Sequence[TeacherRecord] = (),
    *,
    passes: Passes,
    training_rules: Collection[str] = (),
) -> Path:
    """Evaluates teacher, floors, base and newest checkpoint of the run in `workdir`, which is only read.

    `corpus` are training records: the most common trace is taken from them, and the tasks of `passes.seen`;
    `training_rules` are the names of all rules trained on. Returns the report written into `out`. Raises
    `CheckpointError` when the run has no checkpoint yet, `NothingToEvaluate`, and what `Run` and `Sandbox` raise.
    """
    with ExitStack() as stack:
        run = stack.enter_context(Run(config, workdir, read_only=True))
        bar = stack.enter_context(Progress())
        if run.resume() is None:
            raise CheckpointError(f"{workdir}: no checkpoint to evaluate; train first")
        out.mkdir(parents=True, exist_ok=True)
        one = _Evaluation(run, bar, out, corpus, training_rules)
        tasks = fitting_tasks(run.student, held_out, config, runners=run.runners, note=bar.console.print)
        episodes = [
            steps for steps in whole_episodes(held_out) if all(executable(record, run.runners) for record in steps)
        ][: passes.episodes]
        seen = one.seen_tasks(passes.seen)
        sandbox = stack.enter_context(Sandbox(config.sandbox.build())) if episodes else None
        for name, answers in bounds(tasks, corpus, run.student.tokenizer, config.reward.build()).items():
            path, found = one.given(name, answers, tasks)
            if episodes and name == "teacher":
                add_episodes(path, found, teachers_answers(run.judge), episodes, sandbox, config)
        for name, lora in (("base", None), ("student", run.state.lora)):
            path, found = one.greedy("eval", name, lora, tasks)
            for kind, count in (("sampled", passes.samples), ("free", passes.free)):
                if count:
                    advance = partial(bar.advance, bar.add_task(f"{name}, {kind}", total=len(tasks)))
                    add_answers(
                        path, found, kind, run.student, lora, tasks, run.judge, config, count=count, advance=advance
                    )
            if episodes:
                own = greedy_answers(run.student, lora, run.judge, config, like=len(episodes))
                add_episodes(path, found, own, episodes, sandbox, config, student=run.student)
            if seen:
                one.greedy("seen", name, lora, seen)
    write_page(out)
    return write_report(out)


class _Evaluation:
    """Evaluations of one run, each made unless it is there already."""

    def __init__(
        self, run: Run, bar: Progress, out: Path, corpus: Sequence[TeacherRecord], rules: Collection[str]
    ) -> None:
        self.run, self.bar, self.out, self.corpus, self.rules = run, bar, out, corpus, rules

    def given(self, name: str, answers: Sequence[str], tasks: Sequence[TeacherRecord]) -> tuple[Path, dict]:
        """That of answers which are known."""
        path, run = self.out / f"eval_{name}.json", self.run
        same = lambda saved: [item["completion"] for item in saved["items"]] == list(answers)
        if evaluated_before(path, tasks, run.config) and same(saved := load_evaluation(path)):
            return path, self._keep(path, saved)
        made = evaluate_answers(name, answers, tasks, run.student.tokenizer, run.judge, run.config)
        return path, self._keep(path, made)

    def greedy(self, prefix: str, name: str, lora: dict | None, tasks: Sequence[TeacherRecord]) -> tuple[Path, dict]:
        """That of a policy's greedy answers."""
        path, run = self.out / f"{prefix}_{name}.json", self.run
        adapters = None if lora is None else weights_hash(lora)
        if evaluated_before(path, tasks, run.config, adapters=adapters):
            return path, self._keep(path, load_evaluation(path))
        advance = partial(self.bar.advance, self.bar.add_task(f"{name}, {prefix}", total=len(tasks)))
        made = evaluate(run.student, lora, tasks, run.judge, run.config, name=name, advance=advance)
        return path, self._keep(path, made)

    def _keep(self, path: Path, evaluation: dict) -> dict:
        marked = mark_rules(evaluation, self.rules) if self.rules else evaluation
        write_json(path, marked)
        return marked

    def seen_tasks(self, count: int) -> list[TeacherRecord]:
        """At most `count` tasks of the training split that can be evaluated here."""
        if not count or not self.corpus:
            return []
        run, note = self.run, self.bar.console.print
        try:
            return fitting_tasks(run.student, self.corpus, run.config, runners=run.runners, note=note)[:count]
        except NothingToEvaluate as nothing:
            note(f"notice: no task of the training split: {nothing}")
            return []
