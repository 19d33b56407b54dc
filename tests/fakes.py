"""Small stand-ins shared by tests; each is used beside a test of the real part."""

import jax
import numpy as np

from srl_jax import sharding
from srl_jax.config import TrainConfig
from srl_jax.records import SCHEMA_VERSION, SourceFile, Task, TeacherRecord, TestSpec, Versions
from srl_jax.rewards import REWARD_VERSION
from srl_jax.student import Student, load_student
from srl_jax.trace import Action, StateUpdate, Trace, render_trace


def tiny_config(**model) -> TrainConfig:
    """The random two-layer model with the real tokenizer and grammar."""
    config = TrainConfig(steps=2)
    config.model.source = "random:tiny"
    config.lora.rank, config.lora.alpha = 4, 8.0
    config.data.prompts_per_step, config.data.max_prompt_tokens, config.data.few_shot = 4, 192, 0
    config.sampling.max_new_tokens, config.sampling.max_think_tokens = 72, 8
    config.grpo.group_size, config.grpo.micro_batch = 4, 4
    config.mesh.data = 1  # a micro-batch of 4 does not divide by the eight virtual devices
    config.optim.learning_rate = 1e-2
    config.eval.max_tasks, config.eval.batch_size, config.eval.execute = 4, 4, False
    for name, value in model.items():
        setattr(config.model, name, value)
    return config


def tiny_student(config: TrainConfig | None = None, devices: int = 1) -> Student:
    mesh = sharding.make_mesh(devices=jax.devices()[:devices])
    return load_student(config or tiny_config(), mesh)


def perturbed(lora: dict, scale: float = 0.05, seed: int = 9) -> dict:
    """Adapters with B away from zero, so that using or forgetting them shows."""
    noise = lambda path, x: x + scale * jax.random.normal(jax.random.fold_in(jax.random.key(seed), x.size), x.shape)
    return jax.tree_util.tree_map_with_path(noise, lora)


def teacher_record(number: int = 0, slice_name: str = "python/generated", tests: str | None = None) -> TeacherRecord:
    """A complete record of a renaming task; `number` makes it a task of its own, `tests` names a runner it needs."""
    old, new = f"fetch_{number}", f"load_{number}"
    before, after = f"rows = {old}(table)\n", f"rows = {new}(table)\n"
    trace = Trace(
        f"Calls of {old} take one argument; keep it.",
        Action("python", f"{old}($X)", f"{new}($X)", (f"src/m{number}.py",)),
        StateUpdate((f"{old} -> {new}",), ("keep arguments",), (), ("run tests",)),
    )
    task = Task(
        f"task-{number}",
        f"Replace {old} by {new}.",
        "python",
        slice_name,
        "rename-call",
        1,
        "generated",
        (SourceFile(f"src/m{number}.py", before),),
        (SourceFile(f"src/m{number}.py", before),),
        StateUpdate.empty(),
        TestSpec(tests, ("a",), ("test_a.py",)) if tests else None,
        (SourceFile(f"src/m{number}.py", after),),
    )
    direction = np.random.default_rng(number).standard_normal(384).astype(np.float32)
    embedding = direction / np.linalg.norm(direction)
    versions = Versions(SCHEMA_VERSION, "test", REWARD_VERSION)
    return TeacherRecord(task, render_trace(trace), embedding, 1.0, {}, versions, "oracle")


class CountingStream:
    """Teacher records for ever, with a position."""

    def __init__(self, slices: tuple[str, ...] = ("python/generated",)) -> None:
        self.position = 0
        self.slices = slices

    def __iter__(self):
        return self

    def __next__(self) -> TeacherRecord:
        number, self.position = self.position, self.position + 1
        return teacher_record(number % 16, self.slices[number % len(self.slices)])

    def get_state(self) -> dict:
        return {"position": self.position}

    def set_state(self, state: dict) -> None:
        self.position = state["position"]


class HashEmbedder:
    """Unit vectors from the first bytes of a text; `embedding_test` tests the real one."""

    def embed(self, texts):
        rows = [
            np.random.default_rng(int.from_bytes(text.encode()[:7], "little")).standard_normal(384) for text in texts
        ]
        rows = np.asarray(rows, np.float32).reshape(len(texts), 384)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)
