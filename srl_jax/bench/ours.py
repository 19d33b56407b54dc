"""This project as it trains: shared prefill, constrained decode loop, prompt-shared reference and update."""

import time
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from srl_jax import grammar, sharding
from srl_jax.bench.weights import load_model
from srl_jax.bench.worker import Gate
from srl_jax.bench.workload import Workload, advantages, prompts
from srl_jax.model.decoder import Decoder, encode_prompts
from srl_jax.rollout import make_batch
from srl_jax.sampling import SamplingConfig, sample
from srl_jax.student import Student
from srl_jax.train_step import StepSettings, TrainState, make_optimizer, reference_logprobs, train_step


def make_student(workload: Workload, directory: Path) -> Student:
    tokenizer, config, params = load_model(workload, directory)
    decoder = Decoder(config, workload.lora_rank, float(workload.lora_rank))
    automaton = grammar.compile_grammar(tokenizer, vocab_size=config.vocab_size)
    # The thought may take all that the shortest rest leaves, so that a row lives to the end of its budget.
    settings = SamplingConfig(workload.new_tokens, workload.new_tokens - 1)
    grammar.check_budget(automaton, settings.max_new_tokens, settings.max_think_tokens)
    mesh = sharding.make_mesh(1, devices=jax.devices()[:1])
    return Student(decoder, params, tokenizer, automaton, mesh, settings, "")


def run(gate: Gate, workload: Workload, directory: Path, *, shared: bool = True, masked: bool = True) -> None:
    """Options switch one thing off, for the ablation.

    `shared=False`: each completion is a group of one, so its prompt is computed for it alone, as peers do; an update
    then takes as many rows at a time as the peers'. `masked=False`: nothing is forbidden, and no mask is made.
    """
    gate.count_compilations()
    if masked:
        return _train(gate, workload, directory, shared)
    everything = lambda automaton, state: jnp.ones((*state.state.shape, *automaton.kind_of_token.shape), bool)
    with mock.patch.object(grammar, "allowed_tokens", everything):
        return _train(gate, workload, directory, shared)


def _train(gate: Gate, workload: Workload, directory: Path, shared: bool) -> None:
    student = make_student(workload, directory)
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
            if int(state.step) == 0:  # the warm-up's time is no figure, so there is time for this one
                part.extra = {"prefill_seconds": _prefill_seconds(student, state.lora, prompt_tokens, lengths)}
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
            part.extra = {"logprob_gap": float(metrics["logprob_gap"]), **device_memory(device)}


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
