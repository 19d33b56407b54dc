"""Teachers' traces as rows of tokens: which fit, which the constrained policy could have written, and groups with one.

A teacher as a member of the student's own group (kind C; LUFFY, arXiv 2504.14945) shows a student that earns nothing
what would be rewarded: a cold start. Its row has no log-probs of ours; `grpo.imitation_gain` says what is trained.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from srl_jax import grammar, hosts
from srl_jax.config import TrainConfig
from srl_jax.groups import Groups
from srl_jax.rewards import Reward, combine
from srl_jax.sandbox.service import Score
from srl_jax.student import Student, pad_prompts
from srl_jax.truncation import NOTHING


def trace_ids(student: Student, trace: str) -> list[int] | None:
    """The trace's tokens, None where the vocabulary lacks a byte of it."""
    try:
        return student.tokenizer.encode_trace(trace)
    except ValueError:
        return None


@jax.jit
def possible_rows(
    automaton: grammar.TokenAutomaton,
    states: grammar.GrammarState,
    tokens: Int[Array, "P G T"],
    mask: Bool[Array, "P G T"],
) -> Bool[Array, "P G"]:
    """Whether the grammar, budgets included, allows every token of a completion; `states` as in a `TrainBatch`."""

    def row(of):
        state, token = of
        kinds = grammar.allowed_kinds(automaton, state)
        kind = automaton.kind_of_token[token].astype(jnp.int32)
        return jnp.take_along_axis(kinds, kind[..., None], axis=-1)[..., 0]

    allowed = jax.lax.map(row, (states, tokens))
    return jnp.all(allowed | ~mask, axis=-1)


def with_teachers(student: Student, groups: Groups, config: TrainConfig) -> Groups:
    """The groups with their teacher's trace as one further member, last in each.

    It earns what an identical trace would. One that does not fit into `sampling.max_new_tokens`, cannot be spelled or
    could not have been sampled under the grammar counts as unscored, and so takes no part.
    """
    width = groups.arrays["tokens"].shape[-1]
    ids = [trace_ids(student, record.trace) or [] for record in groups.records]
    ids = [row if len(row) <= width else [] for row in ids]
    tokens, sizes = pad_prompts(ids, width, student.tokenizer.pad_id)
    mask = np.arange(width) < sizes[:, None]
    budgets = (student.sampling.max_new_tokens, student.sampling.max_think_tokens)
    allowed = hosts.gather(_possible(student.automaton, tokens, mask, *budgets)) & (sizes > 0)
    best = config.reward.build()
    total = combine(1.0, 1.0, 1.0, best, executed=True, match_f1=1.0)
    scores = [
        Score(Reward(total, 1.0, 1.0, 1.0, 0.0)) if fits else Score(None, None, "teacher: its trace cannot be sampled")
        for fits in allowed
    ]
    nothing = np.zeros((len(ids), 1, width), np.float32)
    rows = {"tokens": tokens[:, None], "mask": mask[:, None] & allowed[:, None, None]}
    rows |= {"logprobs": nothing, "ref": nothing, "finished": allowed[:, None]}
    if "kept" in groups.arrays:  # nobody drew it from a truncated distribution
        rows["kept"] = np.full((len(ids), 1, *groups.arrays["kept"].shape[2:]), NOTHING, np.int32)
    return Groups(
        groups.records,
        [[*texts, record.trace] for texts, record in zip(groups.texts, groups.records, strict=True)],
        [[*row, score] for row, score in zip(groups.scores, scores, strict=True)],
        {name: np.concatenate([x, rows[name]], axis=1) if name in rows else x for name, x in groups.arrays.items()},
    )


@partial(jax.jit, static_argnums=(3, 4))
def _possible(automaton, tokens, mask, max_new_tokens: int, max_think_tokens: int):
    states = grammar.replay(automaton, tokens, max_new_tokens, max_think_tokens)
    one = lambda x: x[:, None]
    return possible_rows(automaton, jax.tree.map(one, states), one(tokens), one(mask))[:, 0]
