"""Use a trained student: an instruction and a directory in, ranked and executed proposals out.

Everything the model writes is parsed, bounded by the engine and executed in the sandbox, before a person sees it as a
diff; `srl_jax.worktree` alone writes files.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from srl_jax.checkpoint import CheckpointError
from srl_jax.config import MeshConfig, TrainConfig
from srl_jax.excerpt import excerpt
from srl_jax.records import SourceFile, Task, TestSpec
from srl_jax.relevance import Place, relevant_places
from srl_jax.rollout import decode_completions
from srl_jax.run import Run
from srl_jax.sampling import Completions, sample
from srl_jax.sandbox.engine import EngineResult, Status, reached_files
from srl_jax.sandbox.isolation import MAX_REPOSITORY_FILES
from srl_jax.sandbox.runner import Sandbox, TestOutcome, runnable_files
from srl_jax.student import Student, pad_prompts
from srl_jax.trace import StateUpdate, Trace, TraceError, parse_trace, render_action, render_state
from srl_jax.worktree import DirectoryError

_EXCERPTS = (400, 180, 90)  # characters; the longest whose prompt fits is shown


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked of the student. `runner` is a test runner of the sandbox, or None to run no tests."""

    instruction: str
    files: Mapping[str, str]
    state: StateUpdate | None = None
    languages: tuple[str, ...] = ()
    runner: str | None = None
    places: int = 1  # files shown, one a prompt
    candidates: int = 8  # for each of them; the first is greedy
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Proposal:
    """One distinct action. `logprob` is the policy's, per token, at temperature 1."""

    trace: Trace
    shown: Place
    logprob: float
    result: EngineResult
    tests: TestOutcome | None = None
    broken_tests: tuple[str, ...] = ()  # passed before the edit, do not pass after it

    @property
    def usable(self) -> bool:
        """Whether it applied, and broke no test where tests were run."""
        tested = self.tests is None or (self.tests.ended == "finished" and not self.broken_tests)
        return self.result.status is Status.OK and tested

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {
            "usable": self.usable,
            "think": self.trace.think,
            "action": render_action(self.trace.action),
            "state": render_state(self.trace.state),
            "shown": self.shown.path,
            "logprob": self.logprob,
            "status": self.result.status.value,
            "detail": self.result.detail,
            "matches": dict(self.result.matches),
            "diff": self.result.diff,
            "tests": None if self.tests is None else self.tests.ended,
            "broken_tests": list(self.broken_tests),
        }


def prompt_tasks(student: Student, config: TrainConfig, request: Request) -> list[tuple[Place, list[int]]]:
    """The files to show, each with its prompt's ids: excerpt, instruction and state as in training.

    Raises `DirectoryError` when no file is spoken of, or no prompt fits.
    """
    languages = {"languages": request.languages} if request.languages else {}
    places = relevant_places(request.instruction, request.files, limit=request.places, **languages)
    if not places:
        raise DirectoryError(
            "no file holds a word of the instruction; name a file in it, or something that stands in the code"
        )
    prompts = []
    for place in places:
        for limit in _EXCERPTS:
            shown = excerpt(request.files[place.path], place.line, limit)
            task = _task(request, place, shown)
            ids = student.tokenizer.encode_prompt(task, few_shot=config.data.few_shot)
            if shown and len(ids) <= config.data.max_prompt_tokens:
                prompts.append((place, ids))
                break
    if not prompts:
        raise DirectoryError(
            f"no prompt fits into data.max_prompt_tokens={config.data.max_prompt_tokens} of the run "
            f"(tried {', '.join(place.path for place in places)}); shorten the instruction"
        )
    return prompts


def _task(request: Request, place: Place, shown: str) -> Task:
    before = request.state or StateUpdate((), (), (), ("run the tests",))
    # In training the plan's first item is always the file at hand.
    step = f"edit {place.path}"
    focus = (step, *(item for item in before.next_focus if item != step))[:16]
    return Task(
        task_id="rewrite",
        instruction=request.instruction,
        language=place.language,
        slice=place.language,
        rule="",
        difficulty=1,
        source="real",
        files=(),
        context=(SourceFile(place.path, shown),),
        prior_state=dataclasses.replace(before, next_focus=focus),
        tests=None,
        expected=(),
    )


def draw_traces(
    student: Student, lora: dict | None, prompts: Sequence[Sequence[int]], config: TrainConfig, count: int, seed: int
) -> list[list[tuple[Trace, float]]]:
    """For each prompt its distinct actions' traces with log-prob per token: one greedy, `count - 1` sampled.

    Traces that do not parse, which only an unconstrained policy writes, are left out.
    """
    variables = student.sampling_variables(lora)
    tokens, lengths = pad_prompts(
        [list(ids) for ids in prompts], config.data.max_prompt_tokens, student.tokenizer.pad_id
    )
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


class TestBench:
    """The directory's tests before any edit, and which of them an edit breaks."""

    __test__ = False  # pytest would collect the class for its name

    def __init__(self, sandbox: Sandbox, files: Mapping[str, str], runner: str) -> None:
        if len(files) > MAX_REPOSITORY_FILES:
            raise DirectoryError(
                f"{len(files)} files, and the sandbox lays out at most {MAX_REPOSITORY_FILES} for tests; "
                "give a smaller --directory or leave --tests out"
            )
        try:
            self.files = runnable_files(TestSpec(runner, (), tuple(files)))
        except ValueError:
            raise DirectoryError(f"no {runner} test file in the directory; leave --tests out") from None
        self._sandbox, self._repository = sandbox, files
        self._spec = TestSpec(runner, (), self.files)
        self.before = sandbox.run_tests(files, self._spec)
        if not self.before.passed:
            raise DirectoryError(
                f"no {runner} test passes before the edit ({self.before.ended}), so tests can tell nothing; leave "
                f"--tests out. They said: {self.before.output.strip()[-500:]}"
            )

    def run(self, edited: Mapping[str, str]) -> tuple[TestOutcome, tuple[str, ...]]:
        """The tests' outcome after the edit, and those that passed before and do not now."""
        after = self._sandbox.run_tests({**self._repository, **edited}, self._spec)
        return after, tuple(sorted(set(self.before.passed) - set(after.passed)))


def judge(
    traces: Sequence[tuple[Place, Trace, float]], files: Mapping[str, str], sandbox: Sandbox, bench: TestBench | None
) -> list[Proposal]:
    """Executes each trace's action on `files`; the best first.

    Usable ones come first, then those that applied at all, then the rest; within each the policy's own log-prob
    decides.
    """
    proposals = []
    for shown, trace, logprob in traces:
        reached = reached_files(trace.action, files)
        if len(reached) > MAX_REPOSITORY_FILES:
            result = EngineResult(Status.TOO_MANY, reached, f"reaches {len(reached)} files")
        else:
            result = sandbox.apply(trace.action, reached, protected=_exactly(bench.files) if bench else ())
        proposal = Proposal(trace, shown, logprob, result)
        if bench and result.status is Status.OK:
            tests, broken = bench.run(result.files_after)
            proposal = dataclasses.replace(proposal, tests=tests, broken_tests=broken)
        proposals.append(proposal)
    return sorted(proposals, key=lambda p: (not p.usable, p.result.status is not Status.OK, -p.logprob))


def _exactly(paths: Sequence[str]) -> tuple[str, ...]:
    """Globs that match these very paths."""
    return tuple(path.replace("[", "[[]").replace("*", "[*]").replace("?", "[?]") for path in paths)


def propose(config: TrainConfig, workdir: Path, request: Request) -> list[Proposal]:
    """Proposals of the newest checkpoint of the run in `workdir`, the best first, all executed in the sandbox.

    Raises `CheckpointError` for a run without a checkpoint, `DirectoryError` for a directory or instruction that gives
    nothing to do, and what `Run` and `Sandbox` raise.
    """
    if jax.device_count() > 1:
        config = dataclasses.replace(config, mesh=MeshConfig(data=1))  # a few prompts do not split over devices
    with Sandbox() as sandbox:
        # Tests first: that they cannot run is known in seconds, and the model takes longer to load.
        bench = TestBench(sandbox, request.files, request.runner) if request.runner else None
        with Run(config, workdir, read_only=True) as run:
            if run.resume() is None:
                raise CheckpointError(f"{workdir}: no checkpoint to rewrite with; train first")
            prompts = prompt_tasks(run.student, config, request)
            ids = [ids for _, ids in prompts]
            drawn = draw_traces(run.student, run.state.lora, ids, config, request.candidates, request.seed)
        traces = [(place, *found) for (place, _), some in zip(prompts, drawn, strict=True) for found in some]
        return judge(traces, request.files, sandbox, bench)
