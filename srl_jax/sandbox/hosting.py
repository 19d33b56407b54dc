"""What a host of rewards opens, as a run's configuration says: tokenizer, embedder, sandbox and the services over them.

The reward server has one, and every actor of a cluster.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from srl_jax import assets
from srl_jax.config import TrainConfig
from srl_jax.embedding import load_embedder
from srl_jax.sandbox.runner import Sandbox
from srl_jax.sandbox.service import RewardService
from srl_jax.sandbox.wire import Contract
from srl_jax.tokenizer import load_tokenizer


@dataclass(frozen=True)
class RewardHost:
    """`services[True]` executes every well-formed completion, `services[False]` as the reward needs."""

    services: Mapping[bool, RewardService]
    contract: Contract
    runners: frozenset[str]
    isolation: str


@contextmanager
def open_host(config: TrainConfig) -> Iterator[RewardHost]:
    """Open it; raises AssetError, TokenizerError, SandboxUnavailable, each naming what is missing."""
    tokenizer = load_tokenizer(assets.model_path(config.model.source), atomic_tags=config.model.atomic_tags)
    reward, embedder = config.reward.build(), load_embedder()

    def count(text: str) -> int:
        return len(tokenizer.encode_text(text))

    with ExitStack() as stack:
        sandbox = stack.enter_context(Sandbox(config.sandbox.build()))
        executing = {False: sandbox if reward.needs_execution else None, True: sandbox}
        services = {
            execute: stack.enter_context(RewardService(embedder, count, reward=reward, sandbox=used))
            for execute, used in executing.items()
        }
        yield RewardHost(services, Contract(tokenizer.fingerprint, reward), sandbox.runners, sandbox.isolation)
