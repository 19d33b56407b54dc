"""This project as it trains: shared prefill, constrained decode loop, prompt-shared reference and update."""

import contextlib
import itertools
import time
from collections.abc import Mapping
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from srl_jax import grammar, sampling, sharding
from srl_jax.bench.masking import Vocabulary
from srl_jax.bench.weights import load_model
from srl_jax.bench.worker import Gate
from srl_jax.bench.workload import Workload, advantages, prompts
from srl_jax.model.decoder import Decoder, encode_prompts
from srl_jax.rollout import make_batch
from srl_jax.sampling import SamplingConfig, sample
from srl_jax.student import Student
from srl_jax.trace import STOP
from srl_jax.train_step import StepSettings, TrainState, make_optimizer, reference_logprobs, train_step

_RAGGED = 64  # one token in so many ends a row of the ragged variants


def make_student(workload: Workload, directory: Path, *, ragged: bool = False, drafts: int = 0) -> Student:
    tokenizer, config, params = load_model(workload, directory)
    decoder = Decoder(config, workload.lora_rank, float(workload.lora_rank), remat="dots")  # as the laptop recipe
    # The thought may take all that the shortest rest leaves, so that a row lives to the end of its budget.
    settings = SamplingConfig(workload.new_tokens, workload.new_tokens - 1, drafts=drafts)
    if ragged:
        spelled = [STOP.encode() if i % _RAGGED == 0 else raw for i, raw in enumerate(tokenizer.token_bytes)]
        vocabulary = Vocabulary(spelled, tokenizer.tag_ids, tokenizer.eos_id, "ragged")
        automaton = grammar.free_automaton(vocabulary, vocab_size=config.vocab_size)
    else:
        automaton = grammar.compile_grammar(tokenizer, vocab_size=config.vocab_size)
        grammar.check_budget(automaton, settings.max_new_tokens, settings.max_think_tokens)
    mesh = sharding.make_mesh(1, devices=jax.devices()[:1])
    return Student(decoder, params, tokenizer, automaton, mesh, settings, "")


def run(
    gate: Gate,
    workload: Workload,
    directory: Path,
    *,
    shared: bool = True,
    masked: bool = True,
    forced: bool = True,
    compact: bool = True,
    ragged: bool = False,
    drafts: int = 0,
) -> None:
    """Options change one thing, for the ablation.

    `shared=False`: each completion is a group of one, so its prompt is computed for it alone, as peers do; an update
    then takes as many rows at a time as the peers'. `masked=False`: nothing is forbidden, and no mask is made.
    `forced=False`: tokens that the grammar forces are drawn and scored like any other.
    `ragged=True`: no grammar, and every 64th token of the vocabulary ends its row, so that rows end at different
    lengths, which is what `compact=False`, no smaller batch for the last rows, is to be compared on. `drafts`: tokens
    guessed ahead.
    """
    gate.count_compilations()
    with contextlib.ExitStack() as changes:
        if not masked:
            everything = lambda automaton, state: jnp.ones((*state.state.shape, *automaton.kind_of_token.shape), bool)
            changes.enter_context(mock.patch.object(grammar, "allowed_tokens", everything))
        if not forced:
            never = lambda automaton, state: jnp.full_like(state.state, -1)
            changes.enter_context(mock.patch.object(grammar, "only_token", never))
        if not compact:
            changes.enter_context(mock.patch.object(sampling, "LEAST_ROWS", workload.rows))
        student = make_student(workload, directory, ragged=ragged, drafts=drafts)
        _train(gate, workload, directory, student, shared, compact)


def _train(gate: Gate, workload: Workload, directory: Path, student: Student, shared: bool, compact: bool) -> None:
    repeat, group = (1, workload.group_size) if shared else (workload.group_size, 1)
    prompt_tokens = np.repeat(prompts(workload, directory), repeat, axis=0)
    lengths = np.full(len(prompt_tokens), workload.prompt_tokens, np.int32)
    gains = advantages(workload).reshape(-1, group)
    settings = StepSettings(micro_batch=1 if shared else workload.micro_batch, max_length=workload.new_tokens)
    optimizer, _ = make_optimizer(1e-5, steps=1000)
    lora = student.fresh_lora(0)
    state = TrainState(jnp.int32(0), lora, optimizer.init(lora), jax.random.key_data(jax.random.key(0)))
    # Placed as an update returns them, which spares the second step its compilation; a run does the same.
    state = jax.tree.map(lambda x: jax.device_put(x, sharding.replicated(student.mesh)), state)
    device = jax.devices()[0]
    while True:
        with gate.part("rollout") as part:
            drawn = sample(
                student.decoder,
                student.sampling_variables(state.lora),
                student.automaton,
                prompt_tokens,
                lengths,
                jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step),
                group_size=group,
                settings=student.sampling,
                pad_id=student.tokenizer.pad_id,
            )
            arrays = {name: np.asarray(getattr(drawn, name)) for name in ("tokens", "mask", "logprobs")}
            part.tokens = int(arrays["mask"].sum())
        extra = {}
        if int(state.step) == 0:  # after the warm-up's rollout, on nobody's clock
            extra["prefill_s"] = _prefill_seconds(student, state.lora, prompt_tokens, lengths)
            if compact:
                compile_smaller(student, state.lora, prompt_tokens, lengths, group)
            if drafts := student.sampling.drafts:
                extra["drafts_accepted"] = accepted_drafts(prompt_tokens, lengths, arrays, drafts)
        with gate.part("update") as part:
            arrays |= {"prompt_tokens": prompt_tokens, "prompt_lengths": lengths}
            batch = make_batch(student, arrays, gains)
            reference = reference_logprobs(student.decoder, student.params, student.automaton, batch, settings=settings)
            state, metrics = train_step(
                state,
                student.params,
                student.automaton,
                batch,
                decoder=student.decoder,
                optimizer=optimizer,
                settings=settings,
            )
            jax.block_until_ready((reference, state, metrics))
            if int(state.step) == 1:
                forced = grammar.only_token(student.automaton, batch.states) == batch.completions
                extra["scored_tokens"] = int((batch.completion_mask & ~forced).sum())
            part.extra = {"logprob_gap": float(metrics["logprob_gap"]), **extra, **device_memory(device)}


def compile_smaller(student: Student, lora: dict, tokens: np.ndarray, lengths: np.ndarray, group_size: int) -> None:
    """Compiles what `sample` calls where rows end at different steps: every smaller batch that one can become.

    So do those of one length, since forced tokens are read several at a time. A run compiles each size when it is met
    first, which would fall into whichever round meets it.
    """
    variables, count = student.sampling_variables(lora), len(tokens)
    keys = sampling.row_keys(jax.random.key(0), count * group_size)
    start = sampling.prefill(
        student.decoder, variables, student.automaton, tokens, lengths, keys,
        group_size=group_size, settings=student.sampling, pad_id=student.tokenizer.pad_id,
    )  # fmt: skip
    ended = start._replace(done=jnp.ones_like(start.done))
    seen = set()

    def below(flight: sampling.Flight, size: tuple[int, int]) -> None:
        p, g = size
        for busy, living in itertools.product(range(1, p + 1), range(1, g + 1)):
            rows = np.zeros(size, bool)
            rows[:busy, :living] = True
            if rows.all():
                continue
            chosen = sampling.smaller(rows, divide_slots=True)
            if chosen[1].shape == size or (size, chosen[1].shape) in seen:
                continue
            seen.add((size, chosen[1].shape))
            small = sampling.compact(flight, *chosen)
            p2, g2 = chosen[1].shape
            few = (p2 // 2, g2 // 2) if p2 * g2 > sampling.LEAST_ROWS else (0, 0)
            done = sampling.decode(
                student.decoder, variables, student.automaton, small, *few, settings=student.sampling
            )
            jax.block_until_ready(sampling.completions(student.automaton, done, p2))
            below(done, (p2, g2))

    below(ended, (count, group_size))


def accepted_drafts(
    prompt_tokens: np.ndarray, lengths: np.ndarray, drawn: Mapping[str, np.ndarray], count: int
) -> float:
    """Share of the tokens guessed by prompt look-up that were right, had the completions been drawn by it alone.

    `drawn` has `tokens` and `mask` [P, G, T]; a step offers up to `count` guesses and its rest is lost with the first
    wrong one, as in `sampling.decode` where nothing is forced.
    """
    tokens, mask = (drawn[name].reshape(-1, drawn[name].shape[-1]) for name in ("tokens", "mask"))
    prompts, held = (np.repeat(x, len(tokens) // len(x), axis=0) for x in (prompt_tokens, lengths))
    columns = np.arange(prompts.shape[1])[None, :] < held[:, None]
    context, ends = np.concatenate([prompts, tokens], axis=1), mask.sum(axis=1)
    age, offered, right = np.full(len(tokens), 2), 0, 0
    look_up = jax.jit(sampling.look_up, static_argnums=3)
    while (age < ends).any():
        known = np.concatenate([columns, np.arange(tokens.shape[1])[None, :] < age[:, None]], axis=1)
        last = np.take_along_axis(tokens, np.minimum(age[:, None] - [2, 1], tokens.shape[1] - 1), axis=1)
        guesses = np.asarray(look_up(context, known, last, count))
        for row in np.flatnonzero(age < ends):
            wanted = tokens[row, age[row] : ends[row]][:count]
            hits = guesses[row, : len(wanted)] == wanted
            matched = len(hits) if hits.all() else int(hits.argmin())
            offered += int((guesses[row, : len(wanted)] >= 0).sum())
            right += matched
            age[row] += matched + 1
    return right / max(offered, 1)


def _prefill_seconds(student: Student, lora: dict, tokens: np.ndarray, lengths: np.ndarray) -> float:
    """Seconds of the shared prefill alone, the best of three."""
    encode, variables = jax.jit(encode_prompts, static_argnums=0), student.sampling_variables(lora)
    times = []
    for _ in range(4):
        started = time.perf_counter()
        jax.block_until_ready(encode(student.decoder, variables, tokens, lengths))
        times.append(time.perf_counter() - started)
    return min(times[1:])


def device_memory(device: jax.Device) -> dict[str, float]:
    """Peak use of the accelerator's memory, where the backend knows it."""
    stats = device.memory_stats() or {}
    return {"peak_device_mb": stats["peak_bytes_in_use"] / 2**20} if "peak_bytes_in_use" in stats else {}
