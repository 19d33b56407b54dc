"""Tunix's GRPO learner with its own sampler, Llama model and qwix LoRA, its loop as it is, with the gate in its hooks.

Its weights are random, of the true shape: times depend on no weight. Its micro-batches are whole groups, so where a
group is larger than the other peers' micro-batch, so is Tunix's, as far as it fits.
"""

import dataclasses
import itertools
from pathlib import Path

import jax
import numpy as np
import optax
import qwix
from flax import nnx
from tunix.models.llama3 import model as llama
from tunix.rl import rl_cluster
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.rollout.base_rollout import RolloutConfig

from srl_jax.bench.ours import device_memory
from srl_jax.bench.weights import read_shape
from srl_jax.bench.worker import Gate
from srl_jax.bench.workload import Workload, advantages, prompts

# Tunix's micro-batch is a group, and eight of W3's rows take 54 GB. Of rows beyond so many tokens two make a group: the
# same work, since it computes every row's prompt anew. (Its own `RematConfig.BLOCK` fails in its sampler under qwix;
# recomputing attention by jax.checkpoint left the 54 GB as they were.)
_LONGEST_GROUPED = 512
_LINEAR = ".*q_proj|.*k_proj|.*v_proj|.*o_proj|.*gate_proj|.*up_proj|.*down_proj"


class _Ids:
    """A tokenizer whose texts are the numbers of prompts; the end token cannot be spelled."""

    def __init__(self, prompt_ids: list[list[int]], unused: int) -> None:
        self._prompt_ids, self._unused = prompt_ids, unused

    def encode(self, text: str, **_) -> list[int]:
        return self._prompt_ids[int(text)]

    def decode(self, ids, **_) -> str:
        return ""

    def bos_id(self) -> None:
        return None

    def eos_id(self) -> int:
        return self._unused

    def pad_id(self) -> int:
        return self._unused


class _Llama(llama.Llama3, pytree=True):
    """Tunix opts out of nnx's pytree modules, qwix's subclasses do not: of a model of both, nnx finds no weights."""


class _Instrumented(GRPOLearner):
    gate: Gate

    def _run_global_step(self, *args, **kwargs):
        super()._run_global_step(*args, **kwargs)
        jax.block_until_ready(nnx.state(self.rl_cluster.actor_trainer.model))
        self.gate.end(device_memory(jax.devices()[0]))

    def instrument(self, gate: Gate) -> None:
        self.gate, generate = gate, self.rl_cluster.generate

        def gated(*args, **kwargs):
            part = gate.begin("rollout")
            output = generate(*args, **kwargs)
            part.tokens = jax.block_until_ready(output.tokens).size
            gate.end()
            gate.begin("update")
            return output

        self.rl_cluster.generate = gated


def _model(workload: Workload, directory: Path) -> tuple[nnx.Module, int]:
    c = read_shape(directory)
    if workload.dtype != "float32":
        raise ValueError(f"Tunix is timed in float32; the workload's weights are {workload.dtype}")
    config = llama.ModelConfig(
        num_layers=c.n_layers,
        vocab_size=c.vocab_size,
        embed_dim=c.d_model,
        hidden_dim=c.d_ff,
        num_heads=c.n_heads,
        head_dim=c.head_dim,
        num_kv_heads=c.n_kv_heads,
        rope_theta=int(c.rope_theta),
        norm_eps=c.norm_eps,
        weight_tying=c.tie_embeddings,
    )
    if c.family != "llama":
        raise ValueError(f"Tunix is timed with its Llama model; the workload's is {c.family}")
    return _Llama(config, rngs=nnx.Rngs(0)), c.vocab_size


def run(gate: Gate, workload: Workload, directory: Path) -> None:
    gate.count_compilations()
    length = workload.prompt_tokens + workload.new_tokens
    group = 2 if length > _LONGEST_GROUPED else workload.group_size
    groups, repeat = workload.rows // group, workload.group_size // group
    prompt_ids = np.repeat(prompts(workload, directory), repeat, axis=0).tolist()
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    with mesh:
        base, vocab_size = _model(workload, directory)
        adapters = qwix.LoraProvider(module_path=_LINEAR, rank=workload.lora_rank, alpha=float(workload.lora_rank))
        actor = qwix.apply_lora_to_model(base, adapters, rngs=nnx.Rngs(1), **base.get_model_input())
    rollout = RolloutConfig(
        max_tokens_to_generate=workload.new_tokens,
        max_prompt_length=workload.prompt_tokens,
        kv_cache_size=length,
        temperature=1.0,
        top_p=1.0,
        top_k=None,
        eos_tokens=[-1],  # no token ends a completion
    )
    roles = (rl_cluster.Role.ACTOR, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT)
    training = rl_cluster.RLTrainingConfig(
        actor_optimizer=optax.adamw(1e-5),
        eval_every_n_steps=1_000_000,
        max_steps=1_000_000,
        mini_batch_size=groups,
        train_micro_batch_size=1,
        rollout_micro_batch_size=groups,
        compute_logps_micro_batch_size=1,
    )
    cluster = rl_cluster.RLCluster(
        actor=actor,
        reference=base,
        tokenizer=_Ids(prompt_ids, vocab_size - 1),
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys(roles, mesh),
            rollout_engine="vanilla",
            training_config=training,
            rollout_config=rollout,
        ),
    )
    gains = advantages(dataclasses.replace(workload, group_size=group))[0].tolist()

    def reward(prompts, completions, **_):
        return [gains[i % len(gains)] for i in range(len(completions))]

    learner = _Instrumented(
        cluster, GRPOConfig(num_generations=group, num_iterations=1, beta=0.04, epsilon=0.2), reward
    )
    learner.instrument(gate)
    learner.train(itertools.repeat({"prompts": [str(i) for i in range(groups)]}))
