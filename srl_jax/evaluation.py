"""An evaluation as it is stored: `eval_<name>.json`, with one item for each task, whoever answered it."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from srl_jax.config import TrainConfig
from srl_jax.records import TeacherRecord
from srl_jax.sandbox.service import Score
from srl_jax.tokenizer import Tokenizer, render_prompt
from srl_jax.trace import TraceError, parse_trace, render_state


def summary(items: Sequence[dict]) -> dict:
    """How many tasks, their mean reward (None when none is scored) and the share that parses."""
    rewards = [item["reward"] for item in items if item["reward"] is not None]
    return {
        "tasks": len(items),
        "reward": float(np.mean(rewards)) if rewards else None,
        "parse_rate": float(np.mean([item["rejection"] is None for item in items])),
    }


def evaluation_item(tokenizer: Tokenizer, record: TeacherRecord, text: str, score: Score, config: TrainConfig) -> dict:
    """What an evaluation keeps of one answer, `kl` and `tokens` excepted."""
    reward, report = score.reward, score.report
    try:
        trace = parse_trace(text)
        think, state = trace.think, render_state(trace.state)
    except TraceError:
        think = state = ""
    count = lambda part: len(tokenizer.encode_text(part))
    executed = report is not None
    # A malformed answer cannot be executed, which is a failure; an execution that could not run is unknown.
    executing = config.eval.execute or config.reward.build().needs_execution
    malformed = reward is not None and reward.rejection is not None
    return {
        "task_id": record.task.task_id,
        "slice": record.task.slice,
        "rule": record.task.rule,
        "instruction": record.task.instruction,
        "prompt": render_prompt(record.task, few_shot=config.data.few_shot, chat=tokenizer.has_chat_markers),
        "completion": text,
        "teacher": record.trace,
        "reward": None if reward is None else reward.total,
        "action": None if reward is None else reward.action,
        "state": None if reward is None else reward.state,
        "think": None if reward is None else reward.think,
        "brevity": None if reward is None else reward.brevity,
        "rejection": reward.rejection.value if malformed else None,
        "executed": executed,
        "success": report.success if executed else (False if executing and malformed else None),
        "match_f1": score.match_f1,
        "status": report.status.value if executed else score.unscored,
        "diff": report.diff if executed else None,
        "think_tokens": count(think),
        "state_tokens": count(state),
    }


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
