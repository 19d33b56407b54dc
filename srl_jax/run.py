"""A run: its student, services, state and directory, opened the same way by training and by evaluation."""

import dataclasses
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from srl_jax import hosts, rewards
from srl_jax.checkpoint import Checkpointer, CheckpointMeta
from srl_jax.config import ConfigError, TrainConfig, config_hash, validate
from srl_jax.control import ControlState
from srl_jax.embedding import load_embedder
from srl_jax.records import SCHEMA_VERSION
from srl_jax.sandbox.runner import Sandbox
from srl_jax.sandbox.service import RewardService, ScoresCompletions
from srl_jax.sandbox.wire import SERVER_TOKEN, Contract
from srl_jax.sharding import make_mesh, replicated
from srl_jax.shared_rewards import SharedRewards
from srl_jax.student import Student, load_student
from srl_jax.train_step import TrainState, make_optimizer
from srl_jax.value import fresh_value


class Run:
    """Everything a run needs beside its data. A context manager.

    Attributes:
      student: the loaded base model with tokenizer and grammar.
      rewards: scores rollouts, executing only when the reward has an execution term.
      judge: scores held-out answers, executing them when `eval.execute` or when the reward needs it.
      sandbox: where training applies the actions of episodes, on this machine whatever `sandbox.server` says; None
        unless `grpo.returns` asks for it.
      runners: test runners the sandbox can serve; None when nothing is executed.
      optimizer, rates: the gradient transformation and its learning-rate schedule.
      state: fresh training state, or the newest checkpoint's after `resume`.
      control: what the controllers remember, saved with the state.
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
            executes = not config.sandbox.server and (config.eval.execute or reward.needs_execution)
            applies = config.plays_episodes and not self._read_only
            if executes or applies:
                sandbox = stack.enter_context(Sandbox(config.sandbox.build()))
            self.sandbox = sandbox if applies else None
            self.student: Student = load_student(config, mesh)
            self.runners: frozenset[str] | None
            if config.sandbox.ray_address:
                self._open_cluster(stack, reward)
            elif config.sandbox.server:
                self._open_remote(stack, reward, token)
            else:
                self._open_local(stack, reward, sandbox if executes else None)
            if hosts.count() > 1:
                self.rewards, self.judge = SharedRewards(self.rewards), SharedRewards(self.judge)
                runners = "none" if self.runners is None else ", ".join(sorted(self.runners))
                hosts.check_same({"the test runners": runners, "the tokenizer": self.student.tokenizer.fingerprint})
            self.optimizer: optax.GradientTransformation
            updates, optim = config.updates_per_step, dataclasses.asdict(config.optim)
            optim["warmup_steps"] *= updates
            self.optimizer, self.rates = make_optimizer(steps=config.steps * updates, **optim)
            lora = self.student.fresh_lora(config.seed)
            key = jax.random.key_data(jax.random.key(config.seed))
            value = fresh_value(self.student.decoder.config.d_model) if config.grpo.baseline == "value" else {}
            state = TrainState(jnp.int32(0), lora, self.optimizer.init(lora), key, value)
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
            self.control = ControlState()
            open_at = lambda name, keep: stack.enter_context(
                Checkpointer(self.workdir / name, keep, meta, read_only=self._read_only)
            )
            self.checkpoints = open_at("checkpoints", config.checkpoint.keep)
            kept = config.control.keep_best and (not self._read_only or (self.workdir / "best").is_dir())
            self._best = open_at("best", 1) if kept else None
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

    def __exit__(self, *exception: Any) -> None:
        self._stack.__exit__(*exception)

    def resume(self) -> tuple[int, Any] | None:
        """Takes over the newest checkpoint: (its step, the data stream's position), or None where there is none.

        A read-only run, one that is used rather than trained, takes its best state where that was kept. Raises
        `CheckpointMismatch` when the checkpoint belongs to another tokenizer, base model, schema or reward.
        """
        best = self._best if self._read_only else None
        restored = best.restore(self.state) if best else None
        restored = restored or self.checkpoints.restore(self.state)
        if restored is None:
            return None
        step, self.state, position = restored
        self.control = ControlState.from_dict(position["control"])
        return step, position["stream"]

    def save(self, step: int, position: Any) -> None:
        """Starts saving everything a resume needs; `position` is the data stream's, plain JSON data."""
        self.checkpoints.save(step, self.state, {"stream": position, "control": self.control.to_dict()})

    def keep_as_best(self, step: int, position: Any) -> None:
        """Puts the present state in the place of the best one.

        A run that was killed after its next best, and goes on from here, keeps that: it will come to it again.
        """
        if (self._best.latest_step() or 0) < step:
            self._best.save(step, self.state, {"stream": position, "control": self.control.to_dict()})

    def best_lora(self) -> dict:
        """The adapters of the best evaluated state where such are kept, else the present ones."""
        best = self._best.restore(self.state) if self._best else None
        return self.state.lora if best is None else best[1].lora

    def wait(self) -> None:
        """Blocks until everything saved is on disk; raises `CheckpointError` for what is not."""
        self.checkpoints.wait()
        if self._best:
            self._best.wait()
