"""Each mistake of the user's is one line, exit code 2, and leaves nothing behind."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from srl_jax import cli
from srl_jax.assets import AssetError
from srl_jax.config import ConfigError
from srl_jax.run import Run
from srl_jax.sharding import BadMesh
from tests.fakes import tiny_config

ROOT = Path(__file__).parents[1]

RECIPE = """
from srl_jax.config import TrainConfig

def get_config():
    config = TrainConfig()
    config.lora.rnak = 4
    return config
"""


def launched(program: str, *flags: str) -> tuple[int, list[str]]:
    """Exit code and standard error of a launch file."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, f"launch/{program}.py", *flags], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    return done.returncode, done.stderr.splitlines()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--config.grpo.kl_coeff=0.1"], "config.grpo.kl_coeff: no such field; did you mean 'kl_coef'?"),
        (["--config.grpo.kl_coef=-1"], "config.grpo.kl_coef = -1.0: must be at least 0"),
        (["--config.grpo.scale=sdt"], "'sdt': must be one of none, std, components; did you mean 'std'?"),
        (["--config.steps=many"], "--config.steps=many: invalid literal for int()"),
        (["--config.data.dir=nowhere"], "nowhere holds no manifest.json, so it is not a data set"),
        (["--config.seed=1", "3"], "unexpected arguments ['3']; overrides look like"),
    ],
)
def test_a_wrong_flag_is_named(tmp_path, flags, words):
    workdir = tmp_path / "run"
    code, lines = launched("train", "--config=configs/tiny.py", f"--workdir={workdir}", *flags)
    assert code == cli.EXIT_USER_ERROR
    assert len(lines) == 1 and lines[0].startswith("error: ") and words in lines[0]
    assert not workdir.exists()


def test_a_wrong_recipe_is_named(tmp_path):
    recipe = tmp_path / "recipe.py"
    recipe.write_text(RECIPE)
    for flags, words in (
        ([f"--config={recipe}"], "rnak: no such field; did you mean 'rank'?"),
        (["--config=configs/nope.py"], "configs/nope.py: no such file"),
        ([], "give either --config, a recipe, or --reproduce, the directory of a run"),
    ):
        code, lines = launched("train", f"--workdir={tmp_path / 'run'}", *flags)
        assert code == cli.EXIT_USER_ERROR
        assert len(lines) == 1 and words in lines[0]
    assert not (tmp_path / "run").exists()


def test_the_other_programs_refuse_alike(tmp_path):
    code, lines = launched("evaluate", f"--workdir={tmp_path}")
    assert code == 2 and len(lines) == 1 and "holds no config.json, so it is not a run" in lines[0]
    (tmp_path / "config.json").write_text("{")
    code, lines = launched("evaluate", f"--workdir={tmp_path}")
    assert code == 2 and len(lines) == 1 and "config.json is not JSON" in lines[0]
    out = tmp_path / "data"
    code, lines = launched("prepare_data", "--config=configs/data_demo.py", f"--out={out}", "--config.trian=3")
    assert code == 2 and len(lines) == 1 and "config.trian: no such field; did you mean 'train'?" in lines[0]
    assert not out.exists()


@pytest.mark.parametrize(
    ("section", "field", "value", "error", "words"),
    [
        ("model", "source", "asset:smollm3", AssetError, "no asset is called 'smollm3'"),
        ("model", "source", "random:huge", ConfigError, "the random models are random:tiny, random:smollm2-135m"),
        ("model", "source", "nowhere/model.gguf", ConfigError, "no such file or directory; give asset:NAME"),
        ("sampling", "max_new_tokens", 30, ConfigError, "max_new_tokens is 30; the shortest trace takes"),
        ("mesh", "fsdp", 3, BadMesh, "8 devices do not divide by 3"),
        ("mesh", "tensor", 16, BadMesh, "8 devices do not divide by 16"),
        ("mesh", "data", 9, ConfigError, "must be a multiple of mesh.data"),
        ("sandbox", "wall_seconds", 0.0, ConfigError, "config.sandbox.wall_seconds = 0.0: must be above 0"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_written(tmp_path, section, field, value, error, words):
    config = tiny_config()
    config.grpo.micro_batch = config.data.prompts_per_step = 8
    config.mesh.data = -1
    setattr(config.__dict__[section], field, value)
    with pytest.raises(error, match=re.escape(words)) as caught, Run(config, tmp_path / "run"):
        pass
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, cli.user_errors())
    assert not (tmp_path / "run").exists()


def test_a_file_where_the_workdir_should_be(tmp_path):
    (tmp_path / "run").write_text("")
    config = tiny_config()
    config.mesh.data = 1
    with pytest.raises(cli.user_errors(), match=str(tmp_path / "run")), Run(config, tmp_path / "run"):
        pass


# What `cli.run` does with an exception, in a process of its own because absl parses flags once.
PROGRAM = """
import sys
from srl_jax import cli
def main():
    raise {error}
cli.run(main, KeyError)
"""


def raised(error: str) -> tuple[int, str]:
    program = PROGRAM.format(error=error)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    return done.returncode, done.stderr


def test_ours_is_a_traceback_and_theirs_is_a_line():
    code, text = raised("ZeroDivisionError('ours')")
    assert code == 1 and "Traceback" in text
    code, text = raised(f"OSError({errno.ENOSPC}, 'No space left on device')")
    assert code == 2 and text.count("\n") == 1 and "No space left" in text and "free space and run the same" in text
    code, text = raised(f"OSError({errno.ECHILD}, 'ours')")
    assert code == 1 and "Traceback" in text
    code, text = raised("KeyError('their\\nown')")
    assert code == 2 and text.count("\n") == 1 and "Traceback" not in text
