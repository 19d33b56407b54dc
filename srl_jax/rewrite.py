"""Use a trained student: an instruction and a directory in, ranked and executed proposals out.

The student is the newest checkpoint of a run, or what launch/export.py wrote.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from srl_jax.config import TrainConfig
from srl_jax.proposals import Proposal, Request, TestBench, judge, places_to_show, task_of
from srl_jax.relevance import Place
from srl_jax.rollout import decode_completions
from srl_jax.sampling import Completions, sample
from srl_jax.sandbox.runner import Sandbox
from srl_jax.student import Student, pad_prompts, prompt_width
from srl_jax.trace import Trace, TraceError, parse_trace, render_action
from srl_jax.trained import open_trained
from srl_jax.worktree import DirectoryError

_EXCERPTS = (400, 180, 90)  # characters; the longest whose prompt fits is shown

_Drawn = list[tuple[Place, Trace, float | None]]


def prompt_tasks(student: Student, config: TrainConfig, request: Request) -> list[tuple[Place, list[int]]]:
    """The files to show, each with its prompt's ids: excerpt, instruction and state as in training.

    Raises `DirectoryError` when no file is spoken of, or no prompt fits.
    """
    places = places_to_show(request)
    prompts = []
    for place in places:
        for limit in _EXCERPTS:
            task = task_of(request, place, limit)
            ids = student.tokenizer.encode_prompt(task, few_shot=config.data.few_shot) if task else []
            if task and len(ids) <= config.data.max_prompt_tokens:
                prompts.append((place, ids))
                break
    if not prompts:
        raise DirectoryError(
            f"no prompt fits into data.max_prompt_tokens={config.data.max_prompt_tokens} of the run "
            f"(tried {', '.join(place.path for place in places)}); shorten the instruction"
        )
    return prompts


def draw_traces(
    student: Student, lora: dict | None, prompts: Sequence[Sequence[int]], config: TrainConfig, count: int, seed: int
) -> list[list[tuple[Trace, float]]]:
    """For each prompt its distinct actions' traces with log-prob per token: one greedy, `count - 1` sampled.

    Traces that do not parse, which only an unconstrained policy writes, are left out.
    """
    variables = student.sampling_variables(lora)
    width = prompt_width(prompts, config.data.max_prompt_tokens)
    tokens, lengths = pad_prompts([list(ids) for ids in prompts], width, student.tokenizer.pad_id)
    found: list[dict[str, tuple[Trace, float]]] = [{} for _ in prompts]
    for temperature, group_size in ((0.0, 1), (1.0, count - 1)):
        if not group_size:
            continue
        drawn: Completions = sample(
            student.decoder, variables, student.automaton, tokens, lengths, jax.random.key(seed),
            group_size=group_size, pad_id=student.tokenizer.pad_id,
            settings=dataclasses.replace(student.sampling, temperature=temperature, top_k=0, top_p=1.0),
        )  # fmt: skip
        mask = np.asarray(drawn.mask)
        logprobs = (np.asarray(drawn.logprobs) * mask).sum(-1) / mask.sum(-1)
        for row, texts in enumerate(found):
            decoded = decode_completions(student, np.asarray(drawn.tokens)[row], mask[row])
            for text, logprob in zip(decoded, logprobs[row].tolist(), strict=True):
                try:
                    trace = parse_trace(text)
                except TraceError:
                    continue
                name = render_action(trace.action)
                if name not in texts or texts[name][1] < logprob:
                    texts[name] = (trace, logprob)
    return [list(texts.values()) for texts in found]


def propose(config: TrainConfig | None, path: Path, request: Request) -> list[Proposal]:
    """Proposals of the newest checkpoint of the run in `path`, the best first, all executed in the sandbox.

    Without a `config` `path` is what launch/export.py wrote, or any model that transformers loads. Raises
    `DirectoryError` for a directory or instruction that gives nothing to do, and what `open_trained` and `Sandbox`
    raise.
    """
    places_to_show(request)  # that there are none, or no tests, is known at once; the model takes long to load
    with Sandbox(request.sandbox()) as sandbox:
        bench = TestBench(sandbox, request.files, request.runner) if request.runner else None
        return judge(_ask(config, path, request), request, sandbox, bench)


def _ask(config: TrainConfig | None, path: Path, request: Request) -> _Drawn:
    """What the policy proposes; its weights are let go before anything is executed."""
    with open_trained(config, path) as (config, student, lora):
        return _draw(student, lora, config, request)


def _draw(student: Student, lora: dict | None, config: TrainConfig, request: Request) -> _Drawn:
    prompts = prompt_tasks(student, config, request)
    drawn = draw_traces(student, lora, [ids for _, ids in prompts], config, request.candidates, request.seed)
    return [(place, *found) for (place, _), some in zip(prompts, drawn, strict=True) for found in some]
