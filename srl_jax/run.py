"""A run: its student, services, state and directory, opened the same way by training and by evaluation."""

import dataclasses
import os
import platform
import time
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from srl_jax import rewards
from srl_jax.checkpoint import Checkpointer, CheckpointMeta
from srl_jax.config import ConfigError, TrainConfig, config_hash, validate
from srl_jax.embedding import load_embedder
from srl_jax.records import SCHEMA_VERSION
from srl_jax.sandbox.runner import Sandbox
from srl_jax.sandbox.service import RewardService, ScoresCompletions
from srl_jax.sandbox.wire import SERVER_TOKEN, Contract
from srl_jax.sharding import make_mesh, replicated
from srl_jax.student import Student, load_student
from srl_jax.train_step import TrainState, make_optimizer


class Run:
    """Everything a run needs beside its data. A context manager.

    Attributes:
      student: the loaded base model with tokenizer and grammar.
      rewards: scores rollouts, executing only when the reward has an execution term.
      judge: scores held-out answers, executing them when `eval.execute` or when the reward needs it.
      runners: test runners the sandbox can serve; None when nothing is executed.
      optimizer, rates: the gradient transformation and its learning-rate schedule.
      state: fresh training state, or the newest checkpoint's after `resume`.
      checkpoints: under `workdir`.

    Raises on entry:
      ConfigError, BadMesh: before any work, naming the field.
      SandboxUnavailable: when actions are to be executed and no sandbox passes its probe.
    """

    def __init__(self, config: TrainConfig, workdir: str | os.PathLike[str], *, read_only: bool = False) -> None:
        validate(config)
        self.config = config
        self.workdir = Path(workdir)
        self._read_only = read_only
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        config = self.config
        with ExitStack() as stack:
            mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
            # Before the student is loaded, which takes longest: a sandbox that is refused, a token that is missing.
            sandbox, token = None, os.environ.get(SERVER_TOKEN)
            if config.sandbox.server and not config.sandbox.ray_address and not token:
                raise ConfigError("sandbox.server", config.sandbox.server, f"needs the token in ${SERVER_TOKEN}")
            reward = config.reward.build()
            if not config.sandbox.server and (config.eval.execute or reward.needs_execution):
                sandbox = stack.enter_context(Sandbox(config.sandbox.build()))
            self.student: Student = load_student(config, mesh)
            self.runners: frozenset[str] | None
            if config.sandbox.ray_address:
                self._open_cluster(stack, reward)
            elif config.sandbox.server:
                self._open_remote(stack, reward, token)
            else:
                self._open_local(stack, reward, sandbox)
            self.optimizer: optax.GradientTransformation
            self.optimizer, self.rates = make_optimizer(steps=config.steps, **dataclasses.asdict(config.optim))
            lora = self.student.fresh_lora(config.seed)
            key = jax.random.key_data(jax.random.key(config.seed))
            state = TrainState(jnp.int32(0), lora, self.optimizer.init(lora), key)
            # Placed as an update returns them; otherwise the second step would compile everything again.
            on_mesh = lambda x: x if isinstance(x.sharding, NamedSharding) else jax.device_put(x, replicated(mesh))
            self.state = jax.tree.map(on_mesh, state)
            meta = CheckpointMeta(
                config=config_hash(config),
                tokenizer=self.student.tokenizer.fingerprint,
                base_weights=self.student.base_hash,
                schema=SCHEMA_VERSION,
                reward=rewards.REWARD_VERSION,
            )
            directory = self.workdir / "checkpoints"
            self.checkpoints = stack.enter_context(
                Checkpointer(directory, config.checkpoint.keep, meta, read_only=self._read_only)
            )
            self._stack = stack.pop_all()
        return self

    def _open_local(self, stack: ExitStack, reward: rewards.RewardConfig, sandbox: Sandbox | None) -> None:
        embedder = load_embedder()
        count = lambda text: len(self.student.tokenizer.encode_text(text))
        executing = sandbox if reward.needs_execution else None
        self.runners = sandbox.runners if sandbox else None
        self.rewards: ScoresCompletions = stack.enter_context(
            RewardService(embedder, count, reward=reward, sandbox=executing)
        )
        self.judge: ScoresCompletions = stack.enter_context(
            RewardService(embedder, count, reward=reward, sandbox=sandbox)
        )

    def _open_cluster(self, stack: ExitStack, reward: rewards.RewardConfig) -> None:
        """The same on the Ray cluster that the configuration names; raises RemoteError when it does not start."""
        settings = self.config.sandbox
        try:
            from srl_jax.sandbox.cluster import Cluster
        except ModuleNotFoundError as error:
            raise ConfigError("sandbox.server", settings.server, f"{error}; pip install 'srl_jax[ray]'") from error
        cluster = stack.enter_context(Cluster(self.config, hosts=settings.hosts, address=settings.ray_address))
        executes = self.config.eval.execute or reward.needs_execution
        self.rewards, self.judge = cluster.service(execute=False), cluster.service(execute=executes)
        runners = cluster.connect(Contract(self.student.tokenizer.fingerprint, reward))
        self.runners = runners if executes else None

    def _open_remote(self, stack: ExitStack, reward: rewards.RewardConfig, token: str) -> None:
        """The same on the reward server that the configuration names; raises RemoteError when it refuses."""
        url = self.config.sandbox.server
        try:
            from srl_jax.sandbox.client import RemoteRewardService
        except ModuleNotFoundError as error:
            raise ConfigError("sandbox.server", url, f"{error}; pip install 'srl_jax[server]'") from error
        executes = self.config.eval.execute or reward.needs_execution
        contract = Contract(self.student.tokenizer.fingerprint, reward)
        self.rewards = stack.enter_context(RemoteRewardService(url, token, contract))
        self.judge = stack.enter_context(RemoteRewardService(url, token, contract, execute=executes))
        runners = self.judge.connect()
        self.runners = runners if executes else None

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def resume(self) -> tuple[int, Any] | None:
        """Takes over the newest checkpoint: (its step, the data stream's position), or None where there is none.

        Raises `CheckpointMismatch` when it belongs to another tokenizer, base model, schema or reward.
        """
        restored = self.checkpoints.restore(self.state)
        if restored is None:
            return None
        step, self.state, position = restored
        return step, position


def environment() -> dict[str, Any]:
    """What a run's numbers depend on beside its configuration: versions, machine, devices."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "ast-grep-cli", "numpy")
    return {
        "python": platform.python_version(),
        "machine": platform.platform(),
        "cpus": os.cpu_count(),
        "devices": [device.device_kind for device in jax.devices()],
        "packages": {name: metadata.version(name) for name in packages},
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
