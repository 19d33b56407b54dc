"""Every knob of a run: typed, bounded where it is declared, validated once before any work.

A recipe (`configs/<name>.py`) returns a `TrainConfig` from `get_config()`; the command line overrides single
fields (`--config.grpo.kl_coef=0.1`, by `ml_collections.config_flags`, which needs plain mutable dataclasses
with real types as annotations). Past `validate` nothing checks these values again: jitted code receives plain
numbers.
"""

import dataclasses
import difflib
import hashlib
import json
import math
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from srl_jax.rewards import RewardConfig
from srl_jax.sandbox.isolation import Limits
from srl_jax.sandbox.runner import SandboxConfig


class ConfigError(ValueError):
    """A configuration that cannot run; the message names the field, its value, and what would be right.

    Without a `field`, `value` is what else is wrong: a flag, a variable, a directory.
    """

    def __init__(self, field: str, value: object, expected: str):
        self.field = field
        super().__init__(f"config.{field} = {value!r}: {expected}" if field else f"{value}: {expected}")


class NotARun(ValueError):
    """A directory that is not that of a run; the message says what is missing."""


def number(
    default: float,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> Any:
    """A numeric field with its bounds (`at_*` are inclusive)."""
    bounds = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    return dataclasses.field(default=default, metadata={"bounds": bounds})


def choice(default: str, *others: str) -> Any:
    """A string field that must be one of the listed values."""
    return dataclasses.field(default=default, metadata={"choices": (default, *others)})


class Section:
    """Base of every part: assigning a field that does not exist is an error, not a silent new attribute."""

    def __setattr__(self, name: str, value: object) -> None:
        if name not in self.__dataclass_fields__:
            raise _unknown_field(type(self), name, prefix=f"<{type(self).__name__}>.")
        super().__setattr__(name, value)


@dataclasses.dataclass
class ModelSource(Section):
    """Which student is trained."""

    # "asset:<name>" (third_party/manifest.toml), a Hugging Face directory, a .gguf file, or "random:<shape>".
    source: str = "asset:smollm2-135m-instruct"
    dtype: str = choice("float32", "bfloat16")  # base weights and activations; adapters stay float32
    # Of the base's linear maps (QLoRA); the rest stays in dtype. "bfloat16" speeds a float32 model up on CPUs with AMX.
    quantize: str = choice("none", "bfloat16", "int8", "nf4")
    remat: str = choice("none", "dots", "full")  # what the backward pass recomputes instead of keeping
    attention: str = choice("auto", "xla")  # "auto": cuDNN or splash where model/flash.py chooses them
    atomic_tags: bool = True  # the six tags as single tokens rather than as text


@dataclasses.dataclass
class LoraConfig(Section):
    """Adapters on every linear layer; the update is scaled by alpha / rank and starts at zero."""

    rank: int = number(32, at_least=1)
    alpha: float = number(32.0, above=0)


@dataclasses.dataclass
class DataConfig(Section):
    """Which teacher records are read, and how their prompts are built."""

    dir: str = "data/demo"
    prompts_per_step: int = number(8, at_least=1)  # groups per update
    max_prompt_tokens: int = number(1024, at_least=1)  # longer prompts are dropped and counted
    few_shot: int = number(0, at_least=0)  # worked examples shown before the task
    slice_weights: dict[str, float] = dataclasses.field(default_factory=dict)  # empty: every slice alike
    curriculum: float = number(0.0, at_least=0, at_most=1)  # first epoch: 0 shuffled, 1 strictly easy and short first
    bucket: int = number(1, at_least=1)  # steps drawn together and sorted by length, so that a step pads less


@dataclasses.dataclass
class SamplingSettings(Section):
    """How completions are drawn. The same settings define the policy whose log-probs are trained."""

    max_new_tokens: int = number(1024, at_least=16)
    max_think_tokens: int = number(512, at_least=1)
    temperature: float = number(1.0, above=0)
    top_k: int = number(0, at_least=0, at_most=1024)  # only so many likeliest tokens are drawn from; 0: all
    top_p: float = number(1.0, above=0, at_most=1)  # of these, only the fewest that have so much of their probability
    constrained: bool = True  # renormalise over the tokens the trace grammar allows
    drafts: int = number(0, at_least=0, at_most=16)  # tokens guessed ahead by prompt look-up: for few rows at once
    slots: int = number(0, at_least=0)  # prompts decoded at once, where all of a step's do not fit; 0: all
    # Of the keys and values kept while sampling, in training, evaluation and rewriting; for where they do not fit.
    # Narrower than the model they are rounded, and what is sampled differs a little from the policy that is trained:
    # the update then takes its old log-probs from the trainer, and grpo.importance_cap = 2 would weigh the difference.
    cache_dtype: str = choice("model", "bfloat16", "int8")


@dataclasses.dataclass
class GrpoConfig(Section):
    """From rewards to a gradient (GRPO, DAPO, Dr. GRPO)."""

    group_size: int = number(8, at_least=1)
    kl_coef: float = number(0.05, at_least=0)
    kl_estimator: str = choice("k1", "k2", "k3", "exact")  # "exact": the full distribution's, a pass more
    kl_placement: str = choice("reward", "loss")  # "loss" is GRPO's own form; for comparisons with it
    baseline: str = choice("group", "none", "value")
    value_rate: float = number(0.5, above=0, at_most=1)  # of the value head, for baseline "value"
    scale: str = choice("none", "std", "components")  # "components": each by its own std, where one drowns the others
    credit: str = choice("trace", "blocks")  # "blocks": a component's advantage on its own block of tokens only
    ratio: str = choice("token", "sequence")  # "sequence" is GSPO's, for long completions of large models
    clip_epsilon_low: float = number(0.2, above=0, below=1)
    clip_epsilon_high: float = number(0.2, above=0)
    negative_ratio_cap: float = number(0.0, at_least=0)  # dual clip, for several updates a rollout; 0: none
    # Truncated importance weights, where sampler and trainer differ (bf16, a narrow sampling.cache_dtype); 0: none. Old
    # log-probs and the KL in the reward are then the trainer's.
    importance_cap: float = number(0.0, at_least=0)
    aggregation: str = choice("token", "sequence", "constant")
    entropy_coef: float = number(0.0, at_least=0)  # where the policy's entropy collapses
    malformed_advantage: str = choice("zero", "penalize")
    dynamic_sampling_min_std: float = number(0.02, at_least=0)  # a group is kept when std R exceeds this
    max_extra_rollouts: int = number(0, at_least=0)  # rollout batches a step may add to replace dropped groups
    # "step": steps of episodes are tasks of their own. "n", "episode": whole episodes are drawn, each group member goes
    # its own way through one (srl_jax/chains.py), and a step has the credit of the next `horizon` steps, or of all.
    returns: str = choice("step", "n", "episode")
    horizon: int = number(2, at_least=1)  # steps in a return of "n", its own included
    discount: float = number(1.0, at_least=0, at_most=1)  # of each step's reward against the one before it
    episode_steps: int = number(5, at_least=1)  # longer episodes are left out; a batch has room for so many steps
    teacher_in_group: bool = False  # the teacher's trace is one of the G members: a cold start (LUFFY)
    imitation_gamma: float = number(0.1, above=0)  # of the teacher's row: smaller trains unlikely tokens less
    epochs: int = number(1, at_least=1)  # passes over each rollout, where sampling costs most of a step
    mini_batches: int = number(1, at_least=1)  # updates in each pass, over as many parts of the rollout
    # Prompts per forward and backward pass: groups, or single completions where `returns` gives each its own prompt.
    micro_batch: int = number(8, at_least=1)


@dataclasses.dataclass
class ReplayConfig(Section):
    """Rollouts stored while a run samples, and trained on without sampling (method "replay")."""

    record: bool = False  # store this run's rollouts in <workdir>/replay, to train on again under other settings
    dir: str = "runs/demo/replay"  # what method "replay" trains on: the replay directory of another run
    shuffle: bool = False  # False: in the order recorded, where the policy is nearest to the one that sampled
    max_age: int = number(0, at_least=0)  # steps between the policy that sampled and this one; older is dropped; 0: any
    min_ess: float = number(0.5, at_least=0, at_most=1)  # effective share of a group's samples; less is dropped
    # What is left of a negative advantage of a sample from an older policy. Pushing down what the policy has since
    # left teaches little and has no lower bound; pulling up has one.
    stale_negatives: float = number(0.5, at_least=0, at_most=1)


@dataclasses.dataclass
class RewardSettings(Section):
    """`srl_jax.rewards.RewardConfig`, field for field, in the mutable form that overrides need."""

    action_weight: float = number(0.5, at_least=0)
    state_weight: float = number(0.3, at_least=0)
    think_weight: float = number(0.2, at_least=0)
    malformed: float = number(-0.2, at_most=0)
    clip_low: float = number(-0.2, at_most=0)
    clip_high: float = number(1.0, above=0)
    brevity_penalty: float = number(0.2, at_least=0)
    brevity_ratio: float = number(1.5, above=0)
    state_match: str = choice("exact", "soft")
    execution: float = number(0.0, at_least=0)  # weight of the sandbox's verdict; 0 leaves rewards unexecuted
    match_gate: float = number(0.0, at_least=0, at_most=1)  # match-set F1 that earns the action's part in full; 0: off

    def build(self) -> RewardConfig:
        """The immutable form the reward functions take."""
        return RewardConfig(**dataclasses.asdict(self))


@dataclasses.dataclass
class OptimConfig(Section):
    """AdamW over the adapters."""

    learning_rate: float = number(5e-6, above=0)
    warmup_steps: int = number(0, at_least=0)
    schedule: str = choice("cosine", "constant")
    max_grad_norm: float = number(1.0, above=0)
    weight_decay: float = number(0.0, at_least=0)
    b1: float = number(0.9, at_least=0, below=1)
    b2: float = number(0.99, at_least=0, below=1)


@dataclasses.dataclass
class MeshConfig(Section):
    """Devices along each mesh axis; -1 on `data` takes whatever the other two leave."""

    data: int = number(-1, at_least=-1)
    fsdp: int = number(1, at_least=1)
    tensor: int = number(1, at_least=1)


@dataclasses.dataclass
class EvalConfig(Section):
    """Greedy evaluation on held-out tasks, executed in the sandbox."""

    split: str = choice("test", "dev")
    every: int = number(0, at_least=0)  # steps between evaluations of the student; 0: only before and after
    max_tasks: int = number(64, at_least=1)
    batch_size: int = number(16, at_least=1)
    execute: bool = True


@dataclasses.dataclass
class ControlConfig(Section):
    """What changes or ends a run while it goes on (srl_jax/control.py).

    Every part is off unless it is set, but for `max_broken_updates` and `gap_stop`.
    """

    kl_target: float = number(0.0, at_least=0)  # smoothed KL per token beyond which lambda moves; 0: never
    kl_response: str = choice("raise", "lower")  # what lambda does then; "lower" is the notes' form, for comparison
    kl_factor: float = number(1.1, above=1)  # per step, for whoever sees lambda react too slowly
    kl_stop: float = number(0.0, at_least=0)  # smoothed KL per token that ends the run; for runs nobody watches
    kl_coef_decay_to: float = number(1.0, at_least=0)  # share of lambda left at the last step (linear)
    vanishing_spread: float = number(0.0, at_least=0)  # lambda falls while groups' std of rewards is below this
    patience: int = number(0, at_least=0)  # evaluations without a new best before the run ends; 0: never
    keep_best: bool = False  # keep the best evaluated state apart, and make it the run's student
    max_broken_updates: int = number(3, at_least=1)  # steps in a row without a finite update end the run
    # Mean |sampler's - trainer's log-prob| per token that ends the run after so many steps in a row; 0: never. The two
    # are held to 1e-5 in float32 and 1e-2 in bfloat16.
    gap_stop: float = number(0.05, at_least=0)
    gap_steps: int = number(3, at_least=1)


@dataclasses.dataclass
class CheckpointConfig(Section):
    """How often training state is saved and how many states are kept."""

    every: int = number(10, at_least=1)
    keep: int = number(3, at_least=1)


@dataclasses.dataclass
class SandboxSettings(Section):
    """Reward and execution workers on the host."""

    workers: int = number(2, at_least=1)
    wall_seconds: float = number(10.0, above=0)  # per action or test run
    # What scores and executes instead of this machine: the URL of a launch/reward_server.py, or a Ray cluster's `hosts`
    # actors with `workers` slots each ("ray": the cluster that this machine belongs to, or "ray://head:10001").
    server: str = ""
    hosts: int = number(1, at_least=1)

    @property
    def ray_address(self) -> str | None:
        """Where the Ray cluster is; None when rewards do not come from one."""
        return "auto" if self.server == "ray" else self.server if self.server.startswith("ray://") else None

    def build(self) -> SandboxConfig:
        """What a sandbox of these settings is opened with."""
        limits = Limits(wall_s=self.wall_seconds, cpu_s=math.ceil(self.wall_seconds))
        return SandboxConfig(self.workers, engine_limits=limits, test_limits=limits)


@dataclasses.dataclass
class TrainConfig(Section):
    """One run. Equal configurations on equal data and hardware give equal trajectories."""

    # "sft": the baseline, likelihood of the teacher's traces; "replay": stored rollouts. Neither samples.
    method: str = choice("srl", "sft", "replay")
    seed: int = number(0, at_least=0, below=2**31)
    steps: int = number(100, at_least=1)
    model: ModelSource = dataclasses.field(default_factory=ModelSource)
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    sampling: SamplingSettings = dataclasses.field(default_factory=SamplingSettings)
    grpo: GrpoConfig = dataclasses.field(default_factory=GrpoConfig)
    replay: ReplayConfig = dataclasses.field(default_factory=ReplayConfig)
    reward: RewardSettings = dataclasses.field(default_factory=RewardSettings)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    control: ControlConfig = dataclasses.field(default_factory=ControlConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    sandbox: SandboxSettings = dataclasses.field(default_factory=SandboxSettings)

    @property
    def updates_per_step(self) -> int:
        """Optimiser updates made of one rollout."""
        return 1 if self.method == "sft" else self.grpo.epochs * self.grpo.mini_batches

    @property
    def plays_episodes(self) -> bool:
        """Whether training draws whole episodes and each member of a group goes its own way through one."""
        return self.grpo.returns != "step"

    @property
    def sampled_shape(self) -> tuple[int, int]:
        """Prompts that are sampled together, and completions of each: where ways differ, so do a group's prompts."""
        p, g = self.data.prompts_per_step, self.grpo.group_size
        return (p * g, 1) if self.plays_episodes else (p, g)

    @property
    def batch_shape(self) -> tuple[int, int]:
        """Prompts and completions of each in the batch that updates are made of."""
        p, g = self.sampled_shape
        return (p * self.grpo.episode_steps if self.plays_episodes else p), g

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`; absent fields keep their defaults, unknown ones raise `ConfigError`."""
        return _build(cls, values, "")

    def to_dict(self) -> dict[str, Any]:
        """Nested plain dicts, ready for JSON."""
        return dataclasses.asdict(self)


def validate(config: TrainConfig) -> None:
    """Checks every field and every rule between fields; raises `ConfigError` on the first that fails.

    What depends on the machine or the model (device counts, widths) is checked by `sharding`.
    """
    if not isinstance(config, TrainConfig):
        raise ConfigError("", config, "a recipe's get_config() must return a TrainConfig")
    _validate_fields(config, "")
    if not config.model.source.strip():
        raise ConfigError("model.source", config.model.source, "must name an asset, a directory or a .gguf file")
    for name, weight in config.data.slice_weights.items():
        if not _is_number(weight) or not math.isfinite(weight) or weight <= 0:
            raise ConfigError(
                f"data.slice_weights[{name!r}]",
                weight,
                "must be a number above 0; leave a slice out of the mixture by naming only the others",
            )
    _validate_grpo(config)
    _validate_returns(config)
    _validate_truncation(config)
    _validate_control(config)
    _validate_replay(config)
    reward = config.reward
    if reward.action_weight + reward.state_weight + reward.think_weight == 0:
        raise ConfigError("reward.action_weight", 0, "must be above 0 where state_weight and think_weight are 0")
    if config.sampling.max_think_tokens >= config.sampling.max_new_tokens and config.sampling.constrained:
        # A cap as long as the whole budget would leave the grammar, not the setting, to end the think block.
        raise ConfigError(
            "sampling.max_think_tokens",
            config.sampling.max_think_tokens,
            f"must be below sampling.max_new_tokens = {config.sampling.max_new_tokens}",
        )
    if config.optim.warmup_steps > config.steps:
        raise ConfigError("optim.warmup_steps", config.optim.warmup_steps, f"must be at most steps = {config.steps}")
    mesh = config.mesh
    if mesh.data == 0:
        raise ConfigError("mesh.data", 0, "must be -1 (all remaining devices) or at least 1")
    if mesh.data > 0 and config.grpo.micro_batch % (mesh.data * mesh.fsdp):
        raise ConfigError(
            "grpo.micro_batch",
            config.grpo.micro_batch,
            f"must be a multiple of mesh.data * mesh.fsdp = {mesh.data * mesh.fsdp}, the shards of the batch",
        )


def read_config(workdir: Path) -> TrainConfig:
    """The configuration a run was trained with; raises `NotARun` when `workdir` holds none that can be read."""
    path = workdir / "config.json"
    try:
        return TrainConfig.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise NotARun(f"{workdir} holds no config.json, so it is not a run; give a --workdir of train.py") from None
    except json.JSONDecodeError as error:
        raise NotARun(f"{path} is not JSON ({error}); run launch/train.py again, it writes the file anew") from None
    except ConfigError as error:
        raise NotARun(f"{path} is not that of a run of this version ({error}); give a --workdir of train.py") from None


def config_hash(config: TrainConfig) -> str:
    """SHA-256 hex of the canonical JSON of all fields."""
    text = json.dumps(config.to_dict(), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def check_overrides(argv: Sequence[str], flag: str = "config", section: type = TrainConfig) -> None:
    """Raises `ConfigError` for an override such as `--config.grpo.kl_coeff=1` whose field `section` does not have.

    To be called before absl parses flags: `config_flags` refuses unknown fields too, but names no remedy.
    """
    for argument in argv:
        match = re.match(rf"--?(?:no)?{re.escape(flag)}\.([\w.]+)", argument)
        if not match:
            continue
        part, names = section, match.group(1).split(".")
        for depth, name in enumerate(names):
            fields = {field.name: field.type for field in dataclasses.fields(part)}
            if name not in fields:
                raise _unknown_field(part, name, prefix="".join(f"{parent}." for parent in names[:depth]))
            if not dataclasses.is_dataclass(fields[name]):
                break
            part = fields[name]


def _validate_grpo(config: TrainConfig) -> None:
    grpo, groups = config.grpo, config.data.prompts_per_step
    if grpo.group_size < 2 and (grpo.baseline == "group" or grpo.scale != "none"):
        raise ConfigError(
            "grpo.group_size",
            grpo.group_size,
            "must be at least 2: a group of one is its own baseline, "
            "so every advantage would be 0 (or set grpo.baseline='none' and grpo.scale='none')",
        )
    if grpo.scale == "std" and grpo.baseline != "group":
        raise ConfigError("grpo.scale", "std", "divides by a group's deviation: set grpo.baseline='group'")
    if grpo.clip_epsilon_high < grpo.clip_epsilon_low:
        raise ConfigError(
            "grpo.clip_epsilon_high",
            grpo.clip_epsilon_high,
            f"must be at least grpo.clip_epsilon_low = {grpo.clip_epsilon_low}",
        )
    if groups % grpo.mini_batches:
        raise ConfigError("grpo.mini_batches", grpo.mini_batches, f"must divide data.prompts_per_step = {groups}")
    part = config.sampled_shape[0] // grpo.mini_batches
    if grpo.micro_batch > part or part % grpo.micro_batch:
        divisors = [d for d in range(1, part + 1) if part % d == 0]
        product = "data.prompts_per_step" + (" * grpo.group_size" if config.plays_episodes else "")
        product += " / grpo.mini_batches" if grpo.mini_batches > 1 else ""
        raise ConfigError("grpo.micro_batch", grpo.micro_batch, f"must divide {product} = {part}: one of {divisors}")
    if grpo.negative_ratio_cap and grpo.negative_ratio_cap < 1 + grpo.clip_epsilon_low:
        raise ConfigError(
            "grpo.negative_ratio_cap", grpo.negative_ratio_cap, f"must be 0 or above 1 + {grpo.clip_epsilon_low}"
        )
    if 0 < grpo.importance_cap < 1:
        raise ConfigError(
            "grpo.importance_cap",
            grpo.importance_cap,
            "must be 0 (off) or at least 1: where sampler and trainer agree a weight is 1, which this would cut",
        )
    if grpo.credit == "blocks" or grpo.scale == "components":
        name = "credit" if grpo.credit == "blocks" else "scale"
        value = grpo.__dict__[name]
        if grpo.baseline != "group":
            raise ConfigError(f"grpo.{name}", value, "components are compared within a group: set baseline='group'")
        if config.reward.build().needs_execution:
            raise ConfigError(
                f"grpo.{name}", value,
                "what an action does is no component of a block: set reward.execution=0 and reward.match_gate=0",
            )  # fmt: skip
    if grpo.teacher_in_group and grpo.group_size < 3:
        raise ConfigError("grpo.group_size", grpo.group_size, "must be at least 3 with grpo.teacher_in_group")


def _validate_returns(config: TrainConfig) -> None:
    grpo = config.grpo
    if not config.plays_episodes:
        return
    if config.method != "srl":
        raise ConfigError(
            "grpo.returns", grpo.returns, f"must be 'step' with method {config.method!r}: it plays nothing"
        )
    if config.replay.record:
        raise ConfigError(
            "grpo.returns", grpo.returns, "must be 'step' with replay.record: stored groups share a prompt"
        )
    # Components have no returns of their own, a guess at a step's reward is none at its return, a teacher's row has no
    # files of its own, and a group that teaches nothing at one step may at the next.
    needed = {"baseline": ("group", "none"), "scale": ("none", "std"), "credit": ("trace",)}
    needed |= {"teacher_in_group": (False,), "max_extra_rollouts": (0,)}
    for name, choices in needed.items():
        if grpo.__dict__[name] not in choices:
            remedy = f"must be {' or '.join(map(repr, choices))} with grpo.returns={grpo.returns!r}"
            raise ConfigError(f"grpo.{name}", grpo.__dict__[name], f"{remedy}, or grpo.returns='step'")


def _validate_truncation(config: TrainConfig) -> None:
    sampling = config.sampling
    if sampling.top_k == 1:
        raise ConfigError(
            "sampling.top_k", 1, "must be 0 (off) or at least 2: a token without an alternative has no gradient"
        )
    if sampling.top_p < 1 and not sampling.top_k:
        raise ConfigError(
            "sampling.top_p",
            sampling.top_p,
            "needs sampling.top_k, the most tokens it may keep: they are stored with every token drawn, so that "
            "training renormalises over the same ones (256 holds most nuclei)",
        )
    if sampling.top_k and (config.method == "replay" or config.replay.record):
        raise ConfigError("sampling.top_k", sampling.top_k, "must be 0 with replay: a stored group has no kept tokens")


def _validate_control(config: TrainConfig) -> None:
    control, evaluation = config.control, config.eval
    for name in ("kl_target", "vanishing_spread"):
        value = control.__dict__[name]
        if value and not config.grpo.kl_coef:
            raise ConfigError(f"control.{name}", value, "moves lambda by factors, so grpo.kl_coef must be above 0")
    if control.kl_stop and control.kl_stop <= control.kl_target:
        raise ConfigError("control.kl_stop", control.kl_stop, f"must be above control.kl_target = {control.kl_target}")
    chooses = control.patience or control.keep_best
    if chooses and not evaluation.every:
        raise ConfigError("eval.every", 0, "must be above 0 where control.patience or control.keep_best is set")
    if chooses and evaluation.split != "dev":
        raise ConfigError(
            "eval.split",
            evaluation.split,
            "must be 'dev' where control.patience or control.keep_best choose by it; the test split would then be "
            "spoiled (launch/evaluate.py --split=test evaluates the chosen student)",
        )


def _validate_replay(config: TrainConfig) -> None:
    grpo, replay = config.grpo, config.replay
    if replay.record and config.method != "srl":
        raise ConfigError("replay.record", True, f"method {config.method!r} samples nothing to record")
    if replay.record and grpo.teacher_in_group:
        raise ConfigError("replay.record", True, "a teacher's row has no log-probs; set grpo.teacher_in_group=False")
    if replay.record and config.sampling.cache_dtype != "model":
        raise ConfigError(
            "replay.record", True, "needs sampling.cache_dtype='model': stored log-probs must be the policy's"
        )
    if config.method != "replay":
        return
    if not replay.dir.strip():
        raise ConfigError("replay.dir", "", "method 'replay' needs the replay directory of a run with replay.record")
    # A stored group holds total rewards, and no teacher.
    needed = {"credit": ("trace",), "scale": ("none", "std"), "baseline": ("group", "none")}
    needed |= {"teacher_in_group": (False,), "importance_cap": (0.0,)}
    for name, choices in needed.items():
        if grpo.__dict__[name] not in choices:
            wanted = " or ".join(map(repr, choices))
            raise ConfigError(f"grpo.{name}", grpo.__dict__[name], f"must be {wanted} with method 'replay'")


def _validate_fields(section: Section, prefix: str) -> None:
    for field in dataclasses.fields(section):
        name, value = prefix + field.name, section.__dict__[field.name]
        if dataclasses.is_dataclass(field.type):
            if not isinstance(value, field.type):
                raise ConfigError(name, value, f"must be a {field.type.__name__}, not {type(value).__name__}")
            _validate_fields(value, name + ".")
            continue
        expected = typing.get_origin(field.type) or field.type
        right_type = _is_number(value) if expected is float else type(value) is expected
        if not right_type:
            raise ConfigError(name, value, f"must be {expected.__name__}, not {type(value).__name__}")
        choices = field.metadata.get("choices")
        if choices and value not in choices:
            raise ConfigError(name, value, f"must be one of {', '.join(choices)}{_did_you_mean(value, choices)}")
        if "bounds" in field.metadata:
            _validate_bounds(name, value, field.metadata["bounds"])


def _validate_bounds(name: str, value: float, bounds: Mapping[str, float | None]) -> None:
    if not math.isfinite(value):
        raise ConfigError(name, value, "must be finite")
    holds = {
        "at_least": lambda bound: value >= bound,
        "above": lambda bound: value > bound,
        "at_most": lambda bound: value <= bound,
        "below": lambda bound: value < bound,
    }
    wanted = {kind: bound for kind, bound in bounds.items() if bound is not None}
    if not all(holds[kind](bound) for kind, bound in wanted.items()):
        words = " and ".join(f"{kind.replace('_', ' ')} {bound}" for kind, bound in wanted.items())
        raise ConfigError(name, value, f"must be {words}")


def _build(section: type, values: Mapping[str, Any], prefix: str) -> Any:
    if not isinstance(values, Mapping):
        raise ConfigError(prefix.rstrip("."), values, f"must be a mapping of {section.__name__} fields")
    fields = {field.name: field.type for field in dataclasses.fields(section)}
    arguments = {}
    for name, value in values.items():
        if name not in fields:
            raise _unknown_field(section, name, prefix)
        nested = dataclasses.is_dataclass(fields[name])
        arguments[name] = _build(fields[name], value, f"{prefix}{name}.") if nested else value
    return section(**arguments)


def _unknown_field(section: type, name: str, prefix: str) -> ConfigError:
    names = [field.name for field in dataclasses.fields(section)]
    error = ConfigError(prefix + name, None, "")
    error.args = (
        f"config.{prefix}{name}: no such field{_did_you_mean(name, names)} "
        f"(fields of {section.__name__}: {', '.join(names)})",
    )
    return error


def _did_you_mean(value: str, known: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(value, known, n=1, cutoff=0.4)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
