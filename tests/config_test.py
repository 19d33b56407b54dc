"""A wrong value stops a run before any work, with the field, the value and what would be right."""

import dataclasses
import json
import math
import subprocess
import sys
import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srl_jax import config as config_lib
from srl_jax.config import ConfigError, RewardSettings, Section, TrainConfig, check_overrides, config_hash, validate
from srl_jax.rewards import RewardConfig


def changed(path: str, value: object) -> TrainConfig:
    config = TrainConfig()
    *sections, name = path.split(".")
    section = config
    for part in sections:
        section = section.__dict__[part]
    setattr(section, name, value)
    return config


def leaves(section: Section, prefix: str = "") -> list[tuple[str, dataclasses.Field]]:
    found = []
    for field in dataclasses.fields(section):
        if dataclasses.is_dataclass(field.type):
            found += leaves(section.__dict__[field.name], f"{prefix}{field.name}.")
        else:
            found.append((prefix + field.name, field))
    return found


LEAVES = leaves(TrainConfig())


def test_defaults_are_valid_and_carry_the_notes_numbers():
    config = TrainConfig()
    validate(config)
    assert (config.lora.rank, config.lora.alpha, config.sampling.max_think_tokens) == (32, 32.0, 512)
    assert (config.grpo.kl_coef, config.grpo.clip_epsilon_low, config.grpo.dynamic_sampling_min_std) == (
        0.05,
        0.2,
        0.02,
    )
    assert (config.optim.learning_rate, config.optim.max_grad_norm) == (5e-6, 1.0)


@pytest.mark.parametrize(
    ("path", "value", "remedy"),
    [
        ("grpo.group_size", 1, "at least 2"),
        ("grpo.group_size", 0, "at least 1"),
        ("grpo.micro_batch", 0, "at least 1"),
        ("grpo.micro_batch", 3, r"must divide data.prompts_per_step = 8: one of \[1, 2, 4, 8\]"),
        ("grpo.micro_batch", 16, "must divide data.prompts_per_step"),
        ("grpo.mini_batches", 3, "must divide data.prompts_per_step = 8"),
        ("grpo.mini_batches", 2, r"must divide data.prompts_per_step / grpo.mini_batches = 4: one of \[1, 2, 4\]"),
        ("grpo.negative_ratio_cap", 1.1, r"must be 0 or above 1 \+ 0.2"),
        ("grpo.importance_cap", 0.5, r"must be 0 \(off\) or at least 1"),
        ("control.patience", 2, "eval.every = 0: must be above 0"),
        ("control.kl_factor", 1.0, "above 1"),
        ("grpo.kl_coef", -0.1, "at least 0"),
        ("grpo.kl_coef", math.nan, "finite"),
        ("grpo.kl_estimator", "k4", "one of k1, k2, k3"),
        ("grpo.scale", "sdt", "did you mean 'std'"),
        ("grpo.clip_epsilon_high", 0.1, "at least grpo.clip_epsilon_low = 0.2"),
        ("sampling.temperature", 0.0, "above 0"),
        ("sampling.max_new_tokens", 512, "must be below sampling.max_new_tokens = 512"),
        ("optim.learning_rate", math.inf, "finite"),
        ("optim.b2", 1.0, "at least 0 and below 1"),
        ("optim.warmup_steps", 101, "at most steps = 100"),
        ("steps", 10.0, "must be int, not float"),
        ("steps", True, "must be int, not bool"),
        ("lora.alpha", "32", "must be float, not str"),
        ("eval.execute", 1, "must be bool, not int"),
        ("model.source", "  ", "must name an asset"),
        ("model", None, "must be a ModelSource"),
        ("data.slice_weights", {"python": 0}, "above 0"),
        ("data.slice_weights", {"python": True}, "above 0"),
        ("mesh.data", 0, "-1 .* or at least 1"),
        ("mesh.data", 3, "multiple of mesh.data"),
        ("reward.malformed", 0.1, "at most 0"),
        ("reward.state_match", "fuzzy", "one of exact, soft"),
        ("seed", -1, "at least 0"),
    ],
)
def test_wrong_value_is_named_with_its_remedy(path, value, remedy):
    with pytest.raises(ConfigError, match=remedy) as caught:
        validate(changed(path, value))
    # A pair of fields that disagree is reported under either name, and the remedy names the other.
    assert path in str(caught.value)
    assert "\n" not in str(caught.value)


def test_all_reward_weights_zero_is_refused():
    config = TrainConfig(reward=RewardSettings(action_weight=0, state_weight=0, think_weight=0))
    with pytest.raises(ConfigError, match=r"reward\.action_weight"):
        validate(config)


def test_single_completion_is_allowed_where_nothing_compares_a_group():
    config = changed("grpo.group_size", 1)
    config.grpo.baseline = "none"
    validate(config)


@pytest.mark.parametrize("path", [path for path, field in LEAVES if "bounds" in field.metadata])
def test_every_bound_is_enforced(path):
    bounds = next(field for name, field in LEAVES if name == path).metadata["bounds"]
    outside = {"at_least": -1, "above": 0, "at_most": 1, "below": 0}
    wanted = {kind: bound for kind, bound in bounds.items() if bound is not None}
    assert wanted, f"{path} is a number without any bound"
    for kind, bound in wanted.items():
        default = next(field for name, field in LEAVES if name == path).default
        with pytest.raises(ConfigError, match=path):
            validate(changed(path, type(default)(bound + outside[kind])))


@pytest.mark.parametrize("path", [path for path, field in LEAVES if "choices" in field.metadata])
def test_every_choice_is_accepted_and_nothing_else(path):
    for choice in next(field for name, field in LEAVES if name == path).metadata["choices"]:
        validate(changed(path, choice))
    with pytest.raises(ConfigError, match=rf"{path} = 'other'"):
        validate(changed(path, "other"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"grpo": {"kl_coef": 0.0}, "control": {"kl_target": 0.1}}, "control.kl_target = 0.1: moves lambda by factors"),
        ({"control": {"kl_target": 0.1, "kl_stop": 0.1}}, "control.kl_stop = 0.1: must be above control.kl_target"),
        ({"control": {"keep_best": True}, "eval": {"every": 5}}, "eval.split = 'test': must be 'dev'"),
        ({"grpo": {"credit": "blocks", "baseline": "none"}}, "grpo.credit = 'blocks': components are compared"),
        ({"grpo": {"scale": "components"}, "reward": {"execution": 0.1}}, "grpo.scale = 'components': what an action"),
        ({"grpo": {"scale": "std", "baseline": "none"}}, "grpo.scale = 'std': divides by a group's deviation"),
        ({"grpo": {"teacher_in_group": True, "group_size": 2}}, "grpo.group_size = 2: must be at least 3"),
        ({"method": "sft", "replay": {"record": True}}, "replay.record = True: method 'sft' samples nothing"),
        ({"grpo": {"teacher_in_group": True}, "replay": {"record": True}}, "replay.record = True: a teacher's row"),
        (
            {"sampling": {"cache_dtype": "int8"}, "replay": {"record": True}},
            "replay.record = True: needs sampling.cache_dtype",
        ),
        ({"method": "replay", "grpo": {"baseline": "value"}}, "grpo.baseline = 'value': must be 'group' or 'none'"),
        ({"method": "replay", "replay": {"dir": " "}}, "replay.dir = '': method 'replay' needs"),
    ],
)
def test_settings_that_exclude_each_other_are_named(values, message):
    with pytest.raises(ConfigError, match=message):
        validate(TrainConfig.from_dict(values))


def test_several_updates_a_rollout_are_counted_but_not_in_fine_tuning():
    config = TrainConfig.from_dict({"grpo": {"epochs": 2, "mini_batches": 4, "micro_batch": 2}})
    validate(config)
    assert config.updates_per_step == 8
    config.method = "sft"
    assert config.updates_per_step == 1


def test_assigning_an_unknown_field_names_the_nearest():
    with pytest.raises(ConfigError, match="kl_coeff: no such field; did you mean 'kl_coef'"):
        TrainConfig().grpo.kl_coeff = 0.1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"grpo": {"kl_coeff": 1}}, "config.grpo.kl_coeff: no such field; did you mean 'kl_coef'"),
        ({"optimizer": {}}, "config.optimizer: no such field; did you mean 'optim'"),
        ({"grpo": 3}, "config.grpo = 3: must be a mapping of GrpoConfig fields"),
    ],
)
def test_from_dict_refuses_what_it_does_not_know(values, message):
    with pytest.raises(ConfigError) as caught:
        TrainConfig.from_dict(values)
    assert message in str(caught.value)


def test_dict_round_trip_through_json():
    config = changed("grpo.kl_coef", 0.1)
    config.data.slice_weights = {"python": 2.0}
    restored = TrainConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert restored == config
    assert config_hash(restored) == config_hash(config)


@given(st.sampled_from([path for path, field in LEAVES if field.type is float]), st.floats(0.01, 0.5))
def test_hash_sees_every_change(path, value):
    config = changed(path, value)
    assert (config_hash(config) == config_hash(TrainConfig())) == (config == TrainConfig())


def test_reward_section_mirrors_the_reward_config():
    assert RewardSettings().build() == RewardConfig()
    ours = {field.name: field.type for field in dataclasses.fields(RewardSettings)}
    theirs = typing.get_type_hints(RewardConfig)
    assert ours == theirs
    assert RewardSettings(execution=0.5).build().execution == 0.5


_PROGRAM = """
import sys
from absl import app
from ml_collections import config_flags
from srl_jax.config import check_overrides, validate
check_overrides(sys.argv[1:])
CONFIG = config_flags.DEFINE_config_file("config")
def main(_):
    validate(CONFIG.value)
    print(CONFIG.value.grpo.kl_coef, CONFIG.value.data.slice_weights, CONFIG.value.eval.execute)
app.run(main)
"""


def run_program(tmp_path, *overrides: str) -> subprocess.CompletedProcess[str]:
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "from srl_jax.config import DataConfig, TrainConfig\n"
        "def get_config():\n"
        "    return TrainConfig(data=DataConfig(slice_weights={'python': 1.0}))\n"
    )
    command = [sys.executable, "-c", _PROGRAM, f"--config={recipe}", *overrides]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_command_line_overrides_are_coerced(tmp_path):
    result = run_program(
        tmp_path, "--config.grpo.kl_coef=1", "--config.data.slice_weights.python=2", "--noconfig.eval.execute"
    )
    assert result.stdout == "1.0 {'python': 2.0} False\n", result.stderr


def test_unknown_override_names_the_nearest(tmp_path):
    result = run_program(tmp_path, "--config.grpo.kl_coeff=1")
    assert result.returncode == 1
    assert "config.grpo.kl_coeff: no such field; did you mean 'kl_coef'?" in result.stderr.splitlines()[-1]


def test_overrides_of_known_fields_pass():
    check_overrides(["--workdir=x", "--config=y.py", "-config.seed", "3", "--config.data.slice_weights.python=2"])
    with pytest.raises(ConfigError, match=r"config\.sead: no such field; did you mean 'seed'"):
        check_overrides(["--config.sead=3"])


def test_recipe_that_returns_something_else_is_refused():
    with pytest.raises(ConfigError, match="must return a TrainConfig"):
        validate({"seed": 1})


def test_importing_the_configuration_does_not_import_jax():
    program = f"import sys, {config_lib.__name__}; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
