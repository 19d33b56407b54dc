"""What the student is measured against beside its base: the teacher itself, and answers that take no model.

Each becomes an `eval_<name>.json` with the items of `evaluate`, scored by the same service and executed in the same
sandbox, so that the report shows them as further columns. None of them is a policy, so none has a KL.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from srl_jax.config import TrainConfig
from srl_jax.embedding import cosine
from srl_jax.evaluation import VERSION, evaluation_item, summary, write_json
from srl_jax.records import Task, TeacherRecord
from srl_jax.rewards import RewardConfig, action_similarity, combine, state_overlap, think_similarity
from srl_jax.sandbox.service import ScoreRequest, ScoresCompletions
from srl_jax.tokenizer import Tokenizer
from srl_jax.trace import Action, Trace, TraceError, parse_trace, render_trace

# Each trace is compared with every other: 256 of them are 65,280 comparisons, a few seconds.
COMMON_TRACE_SAMPLE = 256


def copied_prompt(task: Task) -> str:
    """A well-formed trace made of the prompt's own text: the instruction as think, one shown line left as it is as
    pattern and replacement, the shown files, and the prior state unchanged.

    An echo of the prompt itself would be malformed and score the constant for that; this is what copying can earn.
    """
    think = " ".join(task.instruction.replace("<", " ").split()) or task.language
    files = tuple(dict.fromkeys(file.path for file in task.context)) or ("**/*",)
    lines = [line.strip() for file in task.context for line in file.text.splitlines()]
    for line in [*lines, task.language]:
        try:
            return render_trace(parse_trace(_text(think, Action(task.language, line, line, files), task)))
        except TraceError:
            continue  # blank, too long, or a bare metavariable: no pattern can be made of this line
    raise AssertionError("the name of a language is a valid pattern")


def _text(think: str, action: Action, task: Task) -> str:
    return render_trace(Trace(think, action, task.prior_state))


def common_trace(records: Sequence[TeacherRecord], count_tokens: Callable[[str], int], reward: RewardConfig) -> str:
    """The trace that earns the most, on average, as the answer to every other record: what one can know of a corpus
    without reading the prompt.

    Execution is left out, since no trace applies to most others' files. Ties go to the earlier record. Raises
    `ValueError` for no records.
    """
    if not records:
        raise ValueError("no records to take the most common trace from")
    alone = dataclasses.replace(reward, execution=0.0, match_gate=0.0)
    traces = [parse_trace(record.trace) for record in records]
    lengths = [count_tokens(trace.think) for trace in traces]
    totals = np.zeros(len(records))
    for i, ours in enumerate(traces):
        for j, theirs in enumerate(traces):
            if i == j:
                continue
            likeness = cosine(records[i].think_embedding, records[j].think_embedding)
            totals[i] += combine(
                action_similarity(ours.action, theirs.action),
                state_overlap(ours.state, theirs.state, reward.state_match),
                think_similarity(likeness, lengths[i], lengths[j], reward),
                alone,
            )
    return render_trace(traces[int(totals.argmax())])


def evaluate_answers(
    name: str,
    answers: Sequence[str],
    records: Sequence[TeacherRecord],
    tokenizer: Tokenizer,
    service: ScoresCompletions,
    config: TrainConfig,
) -> dict:
    """The evaluation of given `answers`, one a record, in the form of `evaluate`'s; `kl` is None throughout."""
    started = time.perf_counter()
    items = []
    for start in range(0, len(records), config.eval.batch_size):
        part = slice(start, start + config.eval.batch_size)
        requests = [ScoreRequest(text, record) for text, record in zip(answers[part], records[part], strict=True)]
        for request, score in zip(requests, service.score(requests), strict=True):
            item = evaluation_item(tokenizer, request.record, request.completion, score, config)
            items.append({**item, "kl": None, "tokens": len(tokenizer.encode(request.completion))})
    metrics = {**summary(items), "seconds": round(time.perf_counter() - started, 2)}
    return {"name": name, "version": VERSION, "config": config.to_dict(), "metrics": metrics, "items": items}


def bounds(
    records: Sequence[TeacherRecord],
    corpus: Sequence[TeacherRecord],
    tokenizer: Tokenizer,
    reward: RewardConfig,
) -> Mapping[str, list[str]]:
    """Name -> the answers to `records`: `teacher`, `copied_prompt`, and with a `corpus` also `common_trace`."""
    answers = {
        "teacher": [record.trace for record in records],
        "copied_prompt": [copied_prompt(record.task) for record in records],
    }
    if corpus:
        count = lambda text: len(tokenizer.encode_text(text))
        answers["common_trace"] = [common_trace(corpus[:COMMON_TRACE_SAMPLE], count, reward)] * len(records)
    return answers


def write_bounds(
    out: Path,
    records: Sequence[TeacherRecord],
    corpus: Sequence[TeacherRecord],
    tokenizer: Tokenizer,
    service: ScoresCompletions,
    config: TrainConfig,
    *,
    write: Callable[[Path, dict], None] = write_json,
) -> None:
    """Writes `eval_<name>.json` into `out` for each of `bounds`; `corpus` are training records, perhaps none."""
    for name, answers in bounds(records, corpus, tokenizer, config.reward.build()).items():
        write(out / f"eval_{name}.json", evaluate_answers(name, answers, records, tokenizer, service, config))
