"""An evaluation as it is stored: `eval_<name>.json`, with one item for each task, whoever answered it."""

import json
import os
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from srl_jax.config import TrainConfig
from srl_jax.records import TeacherRecord
from srl_jax.sandbox.service import Score
from srl_jax.tokenizer import Tokenizer, render_prompt
from srl_jax.trace import TraceError, parse_trace, render_action, render_state

VERSION = "srl-evaluation/2"  # of an item's fields; an evaluation of another version is made anew
# Parts of the configuration that a greedy evaluation of given weights depends on.
DECISIVE = ("model", "data", "sampling", "reward", "eval", "sandbox")


def summary(items: Sequence[dict]) -> dict:
    """How many tasks, their mean reward (None when none is scored) and the share that parses."""
    rewards = [item["reward"] for item in items if item["reward"] is not None]
    return {
        "tasks": len(items),
        "reward": float(np.mean(rewards)) if rewards else None,
        "parse_rate": float(np.mean([item["rejection"] is None for item in items])),
    }


def evaluation_item(tokenizer: Tokenizer, record: TeacherRecord, text: str, score: Score, config: TrainConfig) -> dict:
    """What an evaluation keeps of the answer to a task, `kl` and `tokens` excepted."""
    reward, report = score.reward, score.report
    try:
        trace = parse_trace(text)
        think, action, state = trace.think, render_action(trace.action), render_state(trace.state)
    except TraceError:
        think = action = state = ""
    count = lambda part: len(tokenizer.encode_text(part))
    executed = report is not None
    return {
        "task_id": record.task.task_id,
        "slice": record.task.slice,
        "language": record.task.language,
        "source": record.task.source,
        "step": record.task.episode.step if record.task.episode else None,
        "rule": record.task.rule,
        "rule_seen": None,  # `mark_rules` knows
        "instruction": record.task.instruction,
        "prompt": render_prompt(record.task, few_shot=config.data.few_shot, chat=tokenizer.has_chat_markers),
        "completion": text,
        "teacher": record.trace,
        "reward": None if reward is None else reward.total,
        "action": None if reward is None else reward.action,
        "state": None if reward is None else reward.state,
        "think": None if reward is None else reward.think,
        "brevity": None if reward is None else reward.brevity,
        "rejection": rejection_of(score),
        "executed": executed,
        "success": success_of(score, config),
        "match_f1": score.match_f1,
        "match_precision": score.match_precision,
        "match_recall": score.match_recall,
        "status": report.status.value if executed else score.unscored,
        "diff": report.diff if executed else None,
        "think_tokens": count(think),
        "action_tokens": count(action),
        "state_tokens": count(state),
    }


def rejection_of(score: Score) -> str | None:
    """Why a scored answer is malformed; None for one that is not."""
    rejection = score.reward.rejection if score.reward is not None else None
    return None if rejection is None else rejection.value


def success_of(score: Score, config: TrainConfig) -> bool | None:
    """Whether an answer's execution succeeded; None where that is not known.

    A malformed answer cannot be executed, which is a failure; an execution that could not run is unknown.
    """
    if score.report is not None:
        return score.report.success
    executing = config.eval.execute or config.reward.build().needs_execution
    return False if executing and rejection_of(score) is not None else None


def mark_rules(evaluation: dict, training: Collection[str]) -> dict:
    """The evaluation with every item told whether its rule is among those of the `training` split."""
    items = [{**item, "rule_seen": item["rule"] in training} for item in evaluation["items"]]
    return {**evaluation, "items": items}


def write_json(path: str | os.PathLike[str], value: dict) -> None:
    """Writes JSON atomically."""
    write_bytes(Path(path), json.dumps(value, ensure_ascii=False, indent=1).encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file atomically: what was there stays until the whole of `data` is on disk."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
