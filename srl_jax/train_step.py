"""One pure update: rollouts with advantages in, new adapters out.

Only the `lora` collection is trained. Each prompt is computed once for its G completions, forward and backward.
Denominators count the global batch, so micro-batches add up to the whole and devices to one.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from srl_jax import grammar, grpo
from srl_jax.logprobs import TokenLogprobs, token_logprobs
from srl_jax.model.decoder import Decoder, completion_hidden, head
from srl_jax.truncation import restrict


class TrainState(NamedTuple):
    """What changes from step to step on the device; a checkpoint holds exactly this, on the device side."""

    step: Int[Array, ""]
    lora: dict
    opt_state: Any
    key: Array  # raw uint32 key data of the run's PRNG; each step folds its number in
    value: dict = {}  # noqa: RUF012  the value head's weights (srl_jax/value.py); {} without one


class TrainBatch(NamedTuple):
    """P groups of G completions. Every array leads with the prompt axis, which is what the mesh splits."""

    prompt_tokens: Int[Array, "P Lp"]
    prompt_lengths: Int[Array, "P"]
    completions: Int[Array, "P G T"]
    completion_mask: Bool[Array, "P G T"]
    states: grammar.GrammarState  # before each completion token, leading [P, G, T]
    old_logprobs: Float[Array, "P G T"]
    advantages: Float[Array, "P G"] | Float[Array, "P G T"]
    ref_logprobs: Float[Array, "P G T"] | None = None  # for an estimated KL in the loss
    token_weights: Float[Array, "P G T"] | None = None  # truncated importance weights
    imitated: Bool[Array, "P G"] | None = None  # rows that no policy of ours sampled
    kept: Int[Array, "P G T k"] | None = None  # what each token was drawn from, where top-k truncates (truncation.py)


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """The static part of an update; see `config.GrpoConfig` for the meaning of each."""

    temperature: float = 1.0
    clip_epsilon_low: float = 0.2
    clip_epsilon_high: float = 0.2
    aggregation: grpo.Aggregation = "token"
    max_length: int | None = None
    ratio: grpo.RatioLevel = "token"
    negative_ratio_cap: float | None = None
    entropy_coef: float = 0.0
    kl_in_loss: grpo.Estimator | Literal["exact"] | None = None
    imitation_gamma: float = 0.1
    micro_batch: int = 1  # groups in one forward and backward pass
    logprob_chunk: int = 256


def make_optimizer(
    learning_rate: float,
    *,
    steps: int,
    warmup_steps: int = 0,
    schedule: str = "cosine",
    max_grad_norm: float = 1.0,
    weight_decay: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.99,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """AdamW with global-norm clipping, and its schedule: linear warm-up, then cosine to zero or constant."""
    warmup = optax.linear_schedule(learning_rate / max(warmup_steps, 1), learning_rate, max(warmup_steps - 1, 1))
    if schedule == "cosine":
        rest = optax.cosine_decay_schedule(learning_rate, max(steps - warmup_steps, 1))
    else:
        rest = optax.constant_schedule(learning_rate)
    rates = optax.join_schedules([warmup, rest], [warmup_steps]) if warmup_steps else rest
    adam = optax.adamw(rates, b1=b1, b2=b2, weight_decay=weight_decay)
    return optax.chain(optax.clip_by_global_norm(max_grad_norm), adam), rates


def updates_made(state: TrainState) -> int:
    """Where the schedule stands: at the updates made, without those skipped or with nothing to learn from."""
    return int(optax.tree.get_all_with_path(state.opt_state, "count")[0][1])


def policy_logprobs(
    decoder: Decoder,
    variables: dict,
    automaton: grammar.TokenAutomaton,
    batch: TrainBatch,
    *,
    temperature: float,
    chunk: int,
    with_reference: bool = False,
    entropy_gradient: bool = False,
    kl_gradient: bool = False,
) -> TokenLogprobs:
    """Log-probs and entropies [P, G, T] of a batch's completions under the policy as it is sampled.

    The policy when `variables` holds `lora`, the frozen reference when it does not: one code path, so that their
    difference at B = 0 is exactly zero. `with_reference` adds the reference's log-probs and the exact KL, for another
    forward pass of the base.
    """
    shape = batch.completions.shape
    # The axis of the prompts, which the mesh splits, and that of their tokens.
    flat = lambda x: x.reshape(shape[0], -1, *x.shape[len(shape) :])
    rows = (batch.prompt_tokens, batch.prompt_lengths, batch.completions)
    hidden = completion_hidden(decoder, variables, *rows)
    reference = None
    if with_reference:
        reference = completion_hidden(decoder, {"params": variables["params"]}, *rows)
        reference = flat(reference)
    forced = grammar.only_token(automaton, batch.states) == batch.completions
    scored = token_logprobs(
        flat(hidden),
        head(variables["params"]),
        flat(batch.completions),
        wanted=flat(batch.completion_mask & ~forced),
        allowed_from=partial(_allowed, automaton),
        constraint=jax.tree.map(flat, (batch.states, batch.kept)),
        temperature=temperature,
        reference_hidden=reference,
        softcap=decoder.config.final_softcap,
        chunk_size=chunk,
        compute_kl=with_reference,
        entropy_gradient=entropy_gradient,
        kl_gradient=kl_gradient,
    )
    return jax.tree.map(lambda x: x.reshape(shape), scored)


def _allowed(
    automaton: grammar.TokenAutomaton, constraint: tuple[grammar.GrammarState, Int[Array, "n k"] | None]
) -> Bool[Array, "n V"]:
    """The support of the distribution that each of n tokens was drawn from."""
    state, kept = constraint
    allowed = grammar.allowed_tokens(automaton, state)
    return allowed if kept is None else restrict(allowed, kept)


def _imitated(batch: TrainBatch) -> Bool[Array, "rows 1"]:
    """Which completions are a teacher's; False alone, of any shape, where none is."""
    return jnp.zeros((1, 1), bool) if batch.imitated is None else batch.imitated.reshape(-1, 1)


def _micro_batches(batch: TrainBatch, size: int) -> TrainBatch:
    """Splits the prompt axis into [micro-batches, size] by stride, so that each spans every device."""
    prompts = batch.prompt_lengths.shape[0]
    count = prompts // size
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(size, count, *x.shape[1:]), 1, 0), batch)


@partial(jax.jit, static_argnames=("decoder", "settings"))
def forward_logprobs(
    decoder: Decoder,
    variables: dict,
    automaton: grammar.TokenAutomaton,
    batch: TrainBatch,
    *,
    settings: StepSettings,
) -> Float[Array, "P G T"]:
    """Log-probs [P, G, T] under fixed `variables`, a micro-batch at a time."""

    def one(micro):
        scored = policy_logprobs(
            decoder, variables, automaton, micro, temperature=settings.temperature, chunk=settings.logprob_chunk
        )
        return scored.logprobs

    stacked = jax.lax.map(one, _micro_batches(batch, settings.micro_batch))
    return jnp.moveaxis(stacked, 0, 1).reshape(batch.completions.shape)


@partial(jax.jit, static_argnames=("decoder", "settings"))
def reference_logprobs(
    decoder: Decoder,
    params: dict,
    automaton: grammar.TokenAutomaton,
    batch: TrainBatch,
    *,
    settings: StepSettings,
) -> Float[Array, "P G T"]:
    """Log-probs [P, G, T] under the frozen base, a micro-batch at a time."""
    return forward_logprobs(decoder, {"params": params}, automaton, batch, settings=settings)


@partial(jax.jit, static_argnames=("decoder", "settings"))
def current_scores(
    decoder: Decoder,
    params: dict,
    lora: dict,
    automaton: grammar.TokenAutomaton,
    batch: TrainBatch,
    *,
    settings: StepSettings,
) -> TokenLogprobs:
    """The present policy's log-probs of a batch, the reference's, and the exact KL between them, all [P, G, T]."""

    def one(micro):
        return policy_logprobs(
            decoder,
            {"params": params, "lora": lora},
            automaton,
            micro,
            temperature=settings.temperature,
            chunk=settings.logprob_chunk,
            with_reference=True,
        )

    stacked = jax.lax.map(one, _micro_batches(batch, settings.micro_batch))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(batch.completions.shape), stacked)


@partial(jax.jit, static_argnames=("count",))
def mini_batches(batch: TrainBatch, count: int) -> tuple[TrainBatch, ...]:
    """The batch in `count` parts of as many groups, one for each of several updates; each spans every device."""
    parts = _micro_batches(batch, batch.prompt_lengths.shape[0] // count)
    return tuple(jax.tree.map(lambda x, i=i: x[i], parts) for i in range(count))


@partial(jax.jit, static_argnames=("decoder", "optimizer", "settings"), donate_argnames=("state",))
def train_step(
    state: TrainState,
    params: dict,
    automaton: grammar.TokenAutomaton,
    batch: TrainBatch,
    kl_coef: float | Float[Array, ""] = 0.0,
    *,
    decoder: Decoder,
    optimizer: optax.GradientTransformation,
    settings: StepSettings,
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """One GRPO update of the adapters.

    `kl_coef` weighs the KL in the loss, where `settings.kl_in_loss` asks for one (K in the reward is part of the
    advantages already). Returns the new state and scalars: loss, grad_norm, entropy (nats per token), ratio_mean,
    clip_low, clip_high, logprob_gap (mean |policy - old| per token; on policy it is the sampler's and trainer's
    disagreement), kl_loss (the divergence in the loss, 0 without one) and skipped (1 when a non-finite gradient left
    the adapters as they were).
    """
    flat_mask = batch.completion_mask.reshape(-1, batch.completion_mask.shape[-1])
    scaled = {"aggregation": settings.aggregation}
    scaled["denominator"] = grpo.loss_denominator(flat_mask, **scaled, max_length=settings.max_length)
    number = lambda mask: jnp.maximum(mask.sum(), 1).astype(jnp.float32)
    # A teacher's own tokens have no old log-prob, so they would only dilute what is said of the sampler's.
    tokens, drawn = number(flat_mask), number(flat_mask & ~_imitated(batch))
    clip = {"clip_epsilon_low": settings.clip_epsilon_low, "clip_epsilon_high": settings.clip_epsilon_high}

    def loss(lora, micro: TrainBatch):
        scored = policy_logprobs(
            decoder, {"params": params, "lora": lora}, automaton, micro,
            temperature=settings.temperature, chunk=settings.logprob_chunk,
            with_reference=settings.kl_in_loss == "exact", kl_gradient=settings.kl_in_loss == "exact",
            entropy_gradient=settings.entropy_coef > 0,
        )  # fmt: skip
        rows = lambda x: None if x is None else x.reshape(-1, flat_mask.shape[-1])
        logprobs, old, entropy = rows(scored.logprobs), rows(micro.old_logprobs), rows(scored.entropy)
        everything = sampled = rows(micro.completion_mask)
        advantages = micro.advantages.reshape(everything.shape[0], *micro.advantages.shape[2:])
        value = jnp.float32(0.0)
        if micro.imitated is not None:
            sampled = everything & ~_imitated(micro)
            value = grpo.imitation_gain(
                logprobs, advantages, everything & ~sampled, gamma=settings.imitation_gamma, **scaled
            )
        value += grpo.clipped_surrogate(
            logprobs, old, advantages, sampled, **clip, **scaled, level=settings.ratio,
            negative_ratio_cap=settings.negative_ratio_cap, token_weights=rows(micro.token_weights),
        )  # fmt: skip
        divergence = jnp.float32(0.0)
        if settings.kl_in_loss == "exact":
            divergence = grpo.aggregate(rows(scored.kl), sampled, **scaled)
        elif settings.kl_in_loss:
            divergence = grpo.kl_loss(
                logprobs, old, rows(micro.ref_logprobs), sampled, estimator=settings.kl_in_loss, **scaled
            )
        if settings.kl_in_loss:
            value += kl_coef * divergence
        if settings.entropy_coef:
            value -= settings.entropy_coef * grpo.aggregate(entropy, sampled, **scaled)
        clipped = grpo.clip_fractions(
            logprobs, old, advantages, sampled, **clip, level=settings.ratio, denominator=drawn
        )
        sums = {
            "entropy": jnp.where(everything, entropy, 0.0).sum() / tokens,
            "logprob_gap": jnp.where(sampled, jnp.abs(logprobs - old), 0.0).sum() / drawn,
            "ratio_mean": clipped.ratio_mean,
            "clip_low": clipped.low,
            "clip_high": clipped.high,
            "kl_loss": divergence,
        }
        return value, sums

    names = ("entropy", "logprob_gap", "ratio_mean", "clip_low", "clip_high", "kl_loss")
    return descend(state, batch, loss, names, optimizer=optimizer, micro_batch=settings.micro_batch)


def descend(
    state: TrainState,
    batch: TrainBatch,
    loss: Callable[[dict, TrainBatch], tuple[Float[Array, ""], dict[str, Float[Array, ""]]]],
    names: Sequence[str],
    *,
    optimizer: optax.GradientTransformation,
    micro_batch: int,
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """One optimiser step on the sum over micro-batches of `loss(lora, micro)`.

    `loss` also returns the scalars called `names`, which are summed too: whoever writes it divides by counts of the
    global batch. Returns the new state, and the scalars with loss, grad_norm and skipped.
    """

    def accumulate(total, micro):
        (value, sums), grads = jax.value_and_grad(loss, has_aux=True)(state.lora, micro)
        return jax.tree.map(jnp.add, total, (grads, {"loss": value, **sums})), None

    zero = (jax.tree.map(jnp.zeros_like, state.lora), {name: jnp.float32(0.0) for name in ("loss", *names)})
    (grads, metrics), _ = jax.lax.scan(accumulate, zero, _micro_batches(batch, micro_batch))

    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"])
    updates, opt_state = optimizer.update(grads, state.opt_state, state.lora)
    new = state._replace(lora=optax.apply_updates(state.lora, updates), opt_state=opt_state)
    # One poisoned batch must not poison the run, and one without a token must not be a step along old momentum:
    # adapters and moments stay, only the counter moves on.
    new = jax.tree.map(lambda a, b: jnp.where(finite & batch.completion_mask.any(), a, b), new, state)
    new = new._replace(step=state.step + 1)
    return new, {**metrics, "grad_norm": norm, "skipped": 1.0 - finite.astype(jnp.float32)}
