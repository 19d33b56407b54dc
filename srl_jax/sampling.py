"""Sampling completions under the trace grammar: one shared prefill, then a jitted decode loop.

The distribution sampled is the model's, renormalised over the tokens that the grammar allows and top-k and top-p keep,
at the sampling temperature; the log-probs returned are those of that same distribution, and what was kept is returned
with them, so training uses exactly what was sampled.
Where the grammar leaves one token only, no logits are needed: several such tokens are read by the model at once. That
is much of a trace: the keys of its JSON, and all of it once the budget is just enough to finish.
No host call is made per token: the loop comes back to the host only when slots have become free for waiting prompts, or
when so few rows are left that a smaller batch finishes them sooner.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from srl_jax import grammar
from srl_jax.model.decoder import Decoder, Prefix, encode_prompts, init_cache, logits
from srl_jax.model.kv import as_columns
from srl_jax.truncation import NOTHING, keep_likeliest

_BLOCK = 128  # tokens per block of the two-level inverse CDF
# Below so many rows a decode step costs what reading the weights costs, so a still smaller batch gains nothing.
LEAST_ROWS = 8
# Forced tokens read at once, at most: on two cores a step over 64 tokens takes 1.4 to 1.6 times as long as one over 16.
_AHEAD = 3
_FAR = np.iinfo(np.int32).max


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How completions are drawn. Hashable: a static argument of the jitted sampler.

    Attributes:
      max_new_tokens: T, completion budget in tokens, both tags of the last block included.
      max_think_tokens: budget of the think block.
      temperature: divides the logits; 0 is greedy.
      drafts: tokens guessed ahead at every step by prompt look-up (see `look_up`) and checked together. They change
        what a step costs and how many tokens it may bring, never which tokens.
      cache_dtype: of the keys and values kept, the prompts' and the completions': "model", "bfloat16" or "int8", which
        rounds them (model/kv.py). Narrower than the model the log-probs are no longer exactly the trainer's.
      top_k, top_p: what of the distribution is kept (see `truncation`); 0 keeps all of it. Greedy takes no notice.
    """

    max_new_tokens: int
    max_think_tokens: int = 512
    temperature: float = 1.0
    drafts: int = 0
    top_k: int = 0
    top_p: float = 1.0
    cache_dtype: str = "model"

    @property
    def width(self) -> int:
        """Kept ids stored with each token; 0: the distribution is whole."""
        return self.top_k if self.temperature > 0 else 0


class Completions(NamedTuple):
    """What was sampled. `mask` is 1 on tokens of the completion, its closing tag included; padding follows.

    `finished` tells completions that reached their end from those that the budget cut off, which only happens without
    the grammar. `kept` are the ids that each token was drawn from, `truncation.NOTHING` behind the last; None where the
    distribution was whole.
    """

    tokens: Int[Array, "P G T"]
    mask: Bool[Array, "P G T"]
    logprobs: Float[Array, "P G T"]
    finished: Bool[Array, "P G"]
    kept: Int[Array, "P G T k"] | None = None


def row_keys(key: Array, rows: int) -> Array:
    """One key per row, so that a row's tokens depend on its own key only, whatever its neighbours."""
    return jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(rows))


def draw(probs: Float[Array, "B V"], u: Float[Array, "B 2"]) -> Int[Array, "B"]:
    """Inverse-CDF sample of each row of unnormalised `probs`, from two uniforms in [0, 1) a row.

    Two levels (a block, then a token in it) keep the running sums short: cheaper than Gumbel noise over V, and more
    exact than one float32 sum over it. A token of probability 0 is never drawn.
    """
    batch, vocab = probs.shape
    blocks = -(-vocab // _BLOCK)
    table = jnp.pad(probs, ((0, 0), (0, blocks * _BLOCK - vocab))).reshape(batch, blocks, _BLOCK)

    def pick(weights, fraction):
        # Sums are made in parallel and may round upwards where nothing is added, which must not draw a zero.
        sums = jnp.where(weights > 0, jnp.cumsum(weights, axis=-1), -jnp.inf)
        total = sums.max(-1)
        # u < 1, but u * total may round up to total, which no running sum exceeds.
        target = jnp.minimum(fraction * total, jnp.nextafter(total, jnp.zeros_like(total)))
        return jnp.argmax(sums > target[:, None], axis=-1)

    block = pick(table.sum(-1), u[:, 0])
    within = pick(jnp.take_along_axis(table, block[:, None, None], axis=1)[:, 0], u[:, 1])
    return block * _BLOCK + within


def look_up(
    context: Int[Array, "B S"], known: Bool[Array, "B S"], last: Int[Array, "B 2"], count: int
) -> Int[Array, "B count"]:
    """The `count` tokens that followed the nearest earlier place where the last two tokens stood; -1 where unknown.

    Prompt look-up decoding: an action's patterns and a state's lists copy much of the prompt. `known` tells the tokens
    of `context` that exist already; `last` are the last two, oldest first, and themselves the end of what is known.
    """
    pairs = (context[:, :-1] == last[:, :1]) & (context[:, 1:] == last[:, 1:]) & known[:, :-1] & known[:, 1:]
    # The pair must have a known follower; this also leaves out the end itself.
    pairs = pairs & jnp.pad(known[:, 2:], ((0, 0), (0, 1)))
    place = (pairs * jnp.arange(1, pairs.shape[1] + 1)[None, :]).max(axis=1)
    at = place[:, None] + 1 + jnp.arange(count)[None, :]
    found = jnp.take_along_axis(context, at, axis=1, mode="fill", fill_value=-1)
    there = jnp.take_along_axis(known, at, axis=1, mode="fill", fill_value=False)
    return jnp.where((place[:, None] > 0) & there, found, -1)


class Flight(NamedTuple):
    """P slots of G rows in mid-decode: B = P*G, row b in slot b // G.

    Each row is as far as its own `age` tells, and sees that many columns of the cache. So a slot can be given to a new
    prompt at any time, and nothing of the one before is seen.
    """

    prefix: Prefix
    prompts: Int[Array, "P Lp"]
    lengths: Int[Array, "P"]
    cache: dict
    keys: Array  # [B], one PRNG key a row
    token: Int[Array, "B"]  # the last one, the next input
    state: grammar.GrammarState  # fields [B]
    age: Int[Array, "B"]  # tokens drawn so far
    done: Bool[Array, "B"]
    tokens: Int[Array, "B T"]
    logprobs: Float[Array, "B T"]
    kept: Int[Array, "B T k"] | None


_ROW_FIELDS = ("keys", "token", "state", "age", "done", "tokens", "logprobs", "kept")


@partial(jax.jit, static_argnames=("decoder", "group_size", "settings", "pad_id", "sharding"))
def prefill(
    decoder: Decoder,
    variables: dict,
    automaton: grammar.TokenAutomaton,
    prompt_tokens: Int[Array, "P Lp"],
    prompt_lengths: Int[Array, "P"],
    keys: Array,
    *,
    group_size: int,
    settings: SamplingConfig,
    pad_id: int,
    sharding: NamedSharding | None = None,
) -> Flight:
    """Encodes each prompt once and readies `group_size` rows for it; `keys` [P*G] is each row's own.

    `sharding`, where prompts are split over several devices: that of `prompt_lengths`. Each slot's rows live beside it.
    """
    b, t_max = keys.shape[0], settings.max_new_tokens
    last = jnp.take_along_axis(prompt_tokens, prompt_lengths[:, None] - 1, axis=1)[:, 0]
    own = variables["params"]["embedding"].dtype
    dtype = own if settings.cache_dtype == "model" else jnp.dtype(settings.cache_dtype)
    prefix = encode_prompts(decoder, variables, prompt_tokens, prompt_lengths, dtype)
    flight = Flight(
        prefix=prefix._replace(k=as_columns(prefix.k)),
        prompts=prompt_tokens,
        lengths=prompt_lengths,
        cache=init_cache(decoder.config, b, t_max, dtype),
        keys=keys,
        token=jnp.repeat(last, group_size),
        state=grammar.initial_state(automaton, b, t_max, settings.max_think_tokens),
        age=jnp.zeros((b,), jnp.int32),
        done=jnp.zeros((b,), bool),
        tokens=jnp.full((b, t_max), pad_id, jnp.int32),
        logprobs=jnp.zeros((b, t_max), jnp.float32),
        kept=jnp.full((b, t_max, settings.width), NOTHING, jnp.int32) if settings.width else None,
    )
    return flight if sharding is None else _split(flight, sharding)


def _split(flight: Flight, sharding: NamedSharding) -> Flight:
    """`flight` with its slots, and their rows, split as `sharding` splits an array's first axis."""

    def along(axis: int, tree):
        def constrained(x):
            # What the compiler does with heads is its own affair.
            spec = [PartitionSpec.UNCONSTRAINED] * x.ndim
            spec[axis] = sharding.spec[0]
            return jax.lax.with_sharding_constraint(x, NamedSharding(sharding.mesh, PartitionSpec(*spec)))

        return jax.tree.map(constrained, tree)

    layered = {"prefix": Prefix(*along(1, flight.prefix[:2]), along(0, flight.prefix.mask))}
    layered["cache"] = along(1, flight.cache)
    rest = {name: along(0, value) for name, value in flight._asdict().items() if name not in layered}
    return Flight(**layered, **rest)


@partial(jax.jit, static_argnames=("decoder", "settings"), donate_argnames=("flight",))
def decode(
    decoder: Decoder,
    variables: dict,
    automaton: grammar.TokenAutomaton,
    flight: Flight,
    few_slots: Int[Array, ""] | int = 0,
    few_rows: Int[Array, ""] | int = 0,
    *,
    settings: SamplingConfig,
) -> Flight:
    """Draws tokens until all rows are done, at most `few_slots` slots are busy, or groups of `few_rows` hold the rest.

    The last means as many groups as there are slots, each of rows of one slot; 0: never. `flight` is donated: its cache
    is written in place.
    """
    slots, rows = flight.lengths.shape[0], flight.token.shape[0]
    group_size = rows // slots

    def read(flight: Flight, ahead: Int[Array, "B n"]) -> tuple[Flight, Float[Array, "B n+1 D"]]:
        """Runs the model on each row's last token and the ones `ahead` of it; negative ones are read as anything."""
        inputs = jnp.concatenate([flight.token[:, None], jnp.maximum(ahead, 0)], axis=1)
        positions = (jnp.repeat(flight.lengths - 1, group_size) + flight.age)[:, None] + jnp.arange(inputs.shape[1])[
            None, :
        ]
        (hidden, _), updated = decoder.apply(
            {**variables, "cache": flight.cache}, inputs, positions, flight.prefix, flight.age, mutable=["cache"]
        )
        return flight._replace(cache=updated["cache"]), hidden

    def draw_next(flight: Flight, hidden: Float[Array, "B D"], open_: Bool[Array, "B"]) -> Flight:
        scores = logits(decoder.config, variables["params"], hidden)
        scores = jnp.where(grammar.allowed_tokens(automaton, flight.state), scores, -jnp.inf)
        return _append(automaton, flight, open_, *_choose(scores, flight.keys, flight.age, settings))

    def step(flight: Flight) -> Flight:
        drafts = _drafts(flight, settings.drafts)
        flight, hidden = read(flight, drafts)
        open_ = ~flight.done
        for i in range(hidden.shape[1]):
            flight = draw_next(flight, hidden[:, i], open_)
            if i < drafts.shape[1]:
                # What was drawn after a wrong guess saw that guess: the row waits for the next step.
                open_ = open_ & ~flight.done & (flight.token == drafts[:, i])
        return flight

    def leap(flight: Flight) -> Flight:
        """A step that reads what is forced before it draws."""
        written, ahead, certain = flight, [], jnp.zeros((rows,), jnp.float32)
        for _ in range(_AHEAD):
            token = grammar.only_token(automaton, written.state)
            open_ = ~written.done & (token >= 0) & (written.age == flight.age + len(ahead))
            kept = None if flight.kept is None else _alone(token, flight.kept.shape[-1])
            written = _append(automaton, written, open_, token, certain, kept)
            ahead.append(token)
        forced = written.age - flight.age
        read_, hidden = read(flight, jnp.stack(ahead, axis=1))
        written = written._replace(cache=read_.cache)
        last = jnp.take_along_axis(hidden, forced[:, None, None], axis=1)[:, 0]
        return draw_next(written, last, ~written.done)

    def running(flight: Flight) -> Bool[Array, ""]:
        alive = (~flight.done).reshape(slots, group_size).sum(axis=1)
        groups = (-(-alive // jnp.maximum(few_rows, 1))).sum()
        return alive.any() & ((alive > 0).sum() > few_slots) & ((few_rows == 0) | (groups > slots))

    def leaping(flight: Flight) -> Bool[Array, ""]:
        """Whether so many rows have forced tokens that the dearer step pays."""
        forced = ~flight.done & (grammar.only_token(automaton, flight.state) >= 0)
        return 2 * forced.sum() > (~flight.done).sum()

    # Loops within a loop, since a conditional would copy the cache.
    def turn(flight: Flight) -> Flight:
        flight = jax.lax.while_loop(lambda x: running(x) & leaping(x), leap, flight)
        return jax.lax.while_loop(lambda x: running(x) & ~leaping(x), step, flight)

    return jax.lax.while_loop(running, turn, flight)


def _append(
    automaton: grammar.TokenAutomaton,
    flight: Flight,
    open_: Bool[Array, "B"],
    token: Int[Array, "B"],
    logprob: Float[Array, "B"],
    kept: Int[Array, "B k"] | None,
) -> Flight:
    """`flight` with one more token in its open rows; the cache is left alone."""
    # A closed row writes nowhere and keeps its state; what it would do with padding must not matter.
    at = (jnp.arange(open_.shape[0]), jnp.where(open_, flight.age, _FAR))
    state = jax.tree.map(partial(jnp.where, open_), grammar.advance(automaton, flight.state, token), flight.state)
    return flight._replace(
        token=jnp.where(open_, token, flight.token),
        state=state,
        age=flight.age + open_,
        done=flight.done | grammar.is_done(automaton, state),
        tokens=flight.tokens.at[at].set(token, mode="drop"),
        logprobs=flight.logprobs.at[at].set(logprob, mode="drop"),
        kept=None if kept is None else flight.kept.at[at].set(kept, mode="drop"),
    )


def _alone(token: Int[Array, "B"], width: int) -> Int[Array, "B k"]:
    """What is kept of a distribution over one token."""
    return jnp.pad(token[:, None], ((0, 0), (0, width - 1)), constant_values=NOTHING)


def _drafts(flight: Flight, count: int) -> Int[Array, "B count"]:
    """Guesses of each row's next tokens, from its prompt and from what it has written so far."""
    rows, written = flight.tokens.shape
    if count == 0:
        return jnp.zeros((rows, 0), jnp.int32)
    slots, width = flight.prompts.shape
    by_row = partial(jnp.repeat, repeats=rows // slots, axis=0)
    context = jnp.concatenate([by_row(flight.prompts), flight.tokens], axis=1)
    known = jnp.concatenate(
        [
            by_row(jnp.arange(width)[None, :] < flight.lengths[:, None]),
            jnp.arange(written)[None, :] < flight.age[:, None],
        ],
        axis=1,
    )
    before = jnp.take_along_axis(flight.tokens, jnp.maximum(flight.age - 2, 0)[:, None], axis=1)
    # Before its second token a row has no pair of its own to look up.
    before = jnp.where(flight.age[:, None] >= 2, before, -1)
    return look_up(context, known, jnp.concatenate([before, flight.token[:, None]], axis=1), count)


def _choose(
    scores: Float[Array, "B V"], keys: Array, age: Int[Array, "B"], settings: SamplingConfig
) -> tuple[Int[Array, "B"], Float[Array, "B"], Int[Array, "B k"] | None]:
    """Each row's next token from its masked logits, that token's log-prob, and the ids it was drawn from."""
    greedy = settings.temperature == 0.0
    scores = scores if greedy else scores / settings.temperature
    kept = None
    if settings.width:
        scores, kept = keep_likeliest(scores, settings.top_k, settings.top_p)
    top = scores.max(axis=-1, keepdims=True)
    weights = jnp.exp(scores - top)
    if greedy:
        chosen = jnp.argmax(scores, axis=-1)
    else:
        uniforms = jax.vmap(lambda key, n: jax.random.uniform(jax.random.fold_in(key, n), (2,)))
        chosen = draw(weights, uniforms(keys, age))
    score = jnp.take_along_axis(scores, chosen[:, None], axis=-1)[:, 0]
    logprob = score - top[:, 0] - jnp.log(weights.sum(axis=-1))
    if kept is not None:
        chosen = jnp.take_along_axis(kept, chosen[:, None], axis=-1)[:, 0]
    return chosen.astype(jnp.int32), logprob, kept


@partial(jax.jit, static_argnames=("sharding",), donate_argnames=("flight",))
def _refill(flight: Flight, fresh: Flight, slots: Int[Array, "R"], *, sharding: NamedSharding | None = None) -> Flight:
    """`flight` with the new prompts of `fresh` in the given slots; a slot number out of range is a prompt too many.

    `sharding` as in `prefill`.
    """
    group_size = flight.token.shape[0] // flight.lengths.shape[0]
    rows = (slots[:, None] * group_size + jnp.arange(group_size)[None, :]).reshape(-1)
    by_slot, by_row = partial(_put, at=slots, axis=0), partial(_put, at=rows, axis=0)
    filled = flight._replace(
        prefix=Prefix(
            *jax.tree.map(partial(_put, at=slots, axis=1), flight.prefix[:2], fresh.prefix[:2]),
            by_slot(flight.prefix.mask, fresh.prefix.mask),
        ),
        prompts=by_slot(flight.prompts, fresh.prompts),
        lengths=by_slot(flight.lengths, fresh.lengths),
        **{name: jax.tree.map(by_row, getattr(flight, name), getattr(fresh, name)) for name in _ROW_FIELDS},
    )
    return filled if sharding is None else _split(filled, sharding)


def _put(old: Array, new: Array, *, at: Int[Array, "R"], axis: int) -> Array:
    return old.at[(slice(None),) * axis + (at,)].set(new, mode="drop")


@partial(jax.jit, static_argnames=("sharding",))
def compact(
    flight: Flight, slots: Int[Array, "P2"], rows: Int[Array, "P2 G2"], *, sharding: NamedSharding | None = None
) -> Flight:
    """The given rows, those of [n, :] in a copy of slot n of `slots`, as a smaller flight; split as in `prefill`."""
    rows = rows.reshape(-1)
    prefix = Prefix(*jax.tree.map(lambda x: x[:, slots], flight.prefix[:2]), flight.prefix.mask[slots])
    fewer = flight._replace(
        prefix=prefix,
        prompts=flight.prompts[slots],
        lengths=flight.lengths[slots],
        cache=jax.tree.map(lambda x: x[:, rows], flight.cache),
        **{name: jax.tree.map(lambda x: x[rows], getattr(flight, name)) for name in _ROW_FIELDS},
    )
    return fewer if sharding is None else _split(fewer, sharding)


def sample(
    decoder: Decoder,
    variables: dict,
    automaton: grammar.TokenAutomaton,
    prompt_tokens: Int[Array, "N Lp"],
    prompt_lengths: Int[Array, "N"],
    key: Array,
    *,
    group_size: int,
    settings: SamplingConfig,
    pad_id: int,
    slots: int = 0,
) -> Completions:
    """Draws `group_size` completions for each of N prompts.

    Args:
      variables: `{"params": ...}`, and `{"lora": ...}` when the adapters are not merged into the params.
      automaton: the grammar; `grammar.free_automaton` samples without constraint.
      prompt_tokens, prompt_lengths: right-padded prompts of at least two tokens.
      key: one JAX PRNG key, or one for each of the N * group_size rows; with the same key a row gets the same tokens
        whatever else is in the batch.
      pad_id: written after a completion's end.
      slots: prompts decoded at once; the others wait until all of a group is done. 0: all N.
    """
    count = prompt_tokens.shape[0]
    keys = key if key.ndim else row_keys(key, count * group_size)
    sharding = getattr(prompt_tokens, "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.is_fully_replicated:
        sharding, shares = None, 1
    else:
        shares = count // sharding.shard_shape(prompt_tokens.shape)[0]

    def start(tokens, lengths, keys) -> Flight:
        own = None if len(lengths) % shares else sharding  # where they do not divide, each device has them all
        placed = (tokens, lengths) if own is None else jax.device_put((tokens, lengths), own)
        return prefill(
            decoder, variables, automaton, *placed, keys,
            group_size=group_size, settings=settings, pad_id=pad_id, sharding=own,
        )  # fmt: skip

    go_on = partial(decode, decoder, variables, automaton, settings=settings)
    if jax.process_count() > 1:
        # Rows live on other hosts too, and all hosts must take the same turns: one loop to the end.
        return completions(automaton, go_on(start(prompt_tokens, prompt_lengths, keys)), count)

    width = min(slots or count, count)
    one_device = len(jax.tree.leaves(variables)[0].sharding.device_set) == 1
    if width < count:
        # Chosen from anew at every intake.
        prompt_tokens, prompt_lengths = np.asarray(prompt_tokens), np.asarray(prompt_lengths)
    flight = start(prompt_tokens[:width], prompt_lengths[:width], keys[: width * group_size])
    split = None if width % shares else sharding  # each device goes on with its share of the slots, whatever takes them
    # Which of the N*G completions each row of the flight is.
    origin = np.arange(width * group_size).reshape(width, group_size)
    waiting, intake = list(range(width, count)), intake_of(width)
    out: dict[str, np.ndarray] = {}
    while True:
        p, g = origin.shape
        if waiting:
            few = (p - min(intake, len(waiting)), 0)
        elif p * g > LEAST_ROWS:
            few = (p // 2 if one_device else 0, g // 2)
        else:
            few = (0, 0)
        flight = go_on(flight, *few)
        drawn = completions(automaton, flight, p)
        alive = ~np.asarray(flight.done).reshape(p, g)
        if not alive.any() and not waiting and not out:
            return drawn
        for name, array in drawn._asdict().items():
            if array is None:
                continue
            whole = out.setdefault(name, np.zeros((count * group_size, *array.shape[2:]), array.dtype))
            whole[origin[~alive]] = np.asarray(array)[~alive]
        if waiting:
            free = np.flatnonzero(~alive.any(axis=1))[:intake]
            taken, waiting = waiting[: len(free)], waiting[len(free) :]
            # Always `intake` prompts, so that one shape is compiled; a copy's place is out of range.
            chosen, places = np.resize(taken, intake), np.full(intake, p)
            places[: len(taken)] = free[: len(taken)]
            rows = chosen[:, None] * group_size + np.arange(group_size)[None, :]
            fresh = start(prompt_tokens[chosen], prompt_lengths[chosen], keys[rows.reshape(-1)])
            flight = _refill(flight, fresh, places, sharding=split)
            del fresh  # or it would stay beside the next one
            origin[places[: len(taken)]] = rows[: len(taken)]
        elif alive.any():
            slots_left, rows = smaller(alive, divide_slots=one_device)
            flight = compact(flight, slots_left, rows, sharding=split)
            origin = origin.reshape(-1)[rows]
        else:
            return Completions(**{name: x.reshape(count, group_size, *x.shape[1:]) for name, x in out.items()})


def intake_of(slots: int) -> int:
    """How many waiting prompts take free slots at once."""
    return max(1, slots // 4)


def smaller(alive: np.ndarray, *, divide_slots: bool) -> tuple[np.ndarray, np.ndarray]:
    """Slots [P2] and rows [P2, G2] of a smaller flight with all rows `alive` [P, G] in it, filled up with a dead one.

    Sizes come by halving, first the slots, then their rows, whereby a slot may be there twice. Halving ends where it
    gains nothing, which also leaves few sizes to compile: 16 rows of two slots have two.
    """
    p, g = alive.shape
    counts = alive.sum(axis=1)
    groups = lambda size: (-(-counts // size)).sum()
    while p * g > LEAST_ROWS:
        if divide_slots and p > 1 and groups(g) <= p // 2:
            p //= 2
        elif g > 1 and groups(g // 2) <= p:
            g //= 2
        else:
            break
    numbers = np.arange(alive.size).reshape(alive.shape)
    slots, rows = np.zeros(p, np.int32), np.full((p, g), numbers[~alive][0])
    parts = []
    for slot, living in enumerate(alive):
        of_slot = numbers[slot][living]
        parts += [(slot, of_slot[i : i + g]) for i in range(0, len(of_slot), g)]
    for place, (slot, part) in enumerate(parts):
        slots[place], rows[place, : len(part)] = slot, part
    return slots, rows


@partial(jax.jit, static_argnames=("slots",))
def completions(automaton: grammar.TokenAutomaton, flight: Flight, slots: int) -> Completions:
    """What the rows of `flight` have drawn so far, by slot."""
    columns = jnp.arange(flight.tokens.shape[1])[None, :]
    finished = flight.state.state == automaton.end_state
    flat = Completions(flight.tokens, columns < flight.age[:, None], flight.logprobs, finished, flight.kept)
    return jax.tree.map(lambda x: x.reshape(slots, -1, *x.shape[1:]), flat)
