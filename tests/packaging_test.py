"""What a newcomer reads and types is true: README commands, recipes, pins, the Makefile."""

import ast
import configparser
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.version import Version

from srl_jax.config import TrainConfig, validate

ROOT = Path(__file__).parents[1]
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")
LAUNCH = sorted((ROOT / "launch").glob("*.py"))
RECIPES = sorted(path for path in (ROOT / "configs").glob("*.py") if path.name != "__init__.py")


def requirements(text: str) -> dict[str, Requirement]:
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return {normal(r.name): r for r in (Requirement(line) for line in lines if line)}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


RUNTIME = requirements(SETUP["options"]["install_requires"])
EXTRAS = {name: requirements(text) for name, text in SETUP["options.extras_require"].items()}
# Which files alone may import what an extra brings.
EXTRA_FILES = {
    "server": (
        "srl_jax/bounded_http.py",
        "srl_jax/serving.py",
        "srl_jax/sandbox/server.py",
        "srl_jax/sandbox/client.py",
    ),
    "ray": ("srl_jax/sandbox/cluster.py", "data_pipeline/executor.py"),
    "bench": ("srl_jax/bench/peer_*.py",),
}
TEST = EXTRAS["test"]


def constraint_lines() -> list[Requirement]:
    lines = (ROOT / "third_party" / "constraints.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def commands(text: str) -> list[str]:
    """Lines of code blocks (fenced or indented) that call make or a launch file."""
    return re.findall(r"^[ \t]*(?:\$ )?((?:make|(?:\S*/)?python\d?) [^\n#]*)", text, flags=re.MULTILINE)


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_documented_commands_exist(document):
    found = commands((ROOT / document).read_text())
    assert found, f"{document} shows no command"
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for command in found:
        words = command.split()
        if words[0] == "make":
            wanted = {word for word in words[1:] if "=" not in word}
            assert wanted <= targets, f"{document}: {command!r} needs a target that the Makefile lacks"
        for path in re.findall(r"(?:launch|configs|tests|data_pipeline)/[\w/]+\.py", command):
            assert (ROOT / path).is_file(), f"{document}: {command!r} names {path}, which does not exist"
        for override in re.findall(r"--config\.([\w.]+)", command):
            section = TrainConfig()
            for part in override.split("."):
                assert part in section.__dataclass_fields__, f"{document}: --config.{override} is no field"
                section = section.__dict__[part]


def test_readme_tree_has_one_line_for_every_file():
    readme = (ROOT / "README.md").read_text()
    named = set(re.findall(r"[\w]+\.py\b", readme))
    real = {path.name for package in ("srl_jax", "launch", "configs", "data_pipeline", "tests") for path in
            (ROOT / package).rglob("*.py")}  # fmt: skip
    assert named <= real, f"README names files that do not exist: {sorted(named - real)}"
    top = {path.name for path in [*(ROOT / "srl_jax").glob("*.py"), *LAUNCH, *RECIPES]} - {"__init__.py"}
    assert top <= named, f"README's file tree lacks {sorted(top - named)}"


@pytest.mark.parametrize("path", LAUNCH, ids=lambda path: path.name)
def test_launch_files_only_enter(path):
    source = path.read_text()
    assert len(source.splitlines()) < 60
    assert f"launch/{path.name}" in (ast.get_docstring(ast.parse(source)) or ""), "the docstring shows the command"
    assert path.stem not in sys.stdlib_module_names, "launch/ comes first on sys.path and would hide the library"


@pytest.mark.parametrize("path", LAUNCH, ids=lambda path: path.name)
def test_launch_files_show_their_help(path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(path), "--help"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert f"launch/{path.name}" in result.stdout, result.stderr[-2000:]


def test_there_are_recipes_and_entry_points():
    assert {"smollm2_cpu.py", "tiny.py", "qwen2_5_coder_1_5b_2gpu.py"} <= {path.name for path in RECIPES}
    assert {"train.py", "evaluate.py", "prepare_data.py"} <= {path.name for path in LAUNCH}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipes_open_with_command_hardware_time_and_result(path):
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    command = rf"^Command: +python launch/\w+\.py .*--config=configs/{re.escape(path.name)}"
    assert re.search(command, docstring, flags=re.MULTILINE), "no Command line with this file"
    for head in ("Hardware", "Time", "Result"):
        assert re.search(rf"^{head}: +\S", docstring, flags=re.MULTILINE), f"no {head} line"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipes_are_valid(path):
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    if isinstance(config, TrainConfig):
        validate(config)
    assert config == module.get_config(), "a recipe gives the same configuration every time"
    assert config is not module.get_config(), "overrides of one run must not reach the next"


def imported_distributions(folders: tuple[str, ...]) -> dict[str, str]:
    """Third-party distribution -> a file that imports it, by the top-level names in the sources."""
    owners = importlib.metadata.packages_distributions()
    ours = {"srl_jax", "data_pipeline", "launch", "configs", "tests"}
    found = {}
    for folder in folders:
        for path in (ROOT / folder).rglob("*.py"):
            if "golden" in path.parts or "guest" in path.parts:
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and not node.level:
                    names = [node.module]
                for top in {name.split(".")[0] for name in names} - ours - sys.stdlib_module_names:
                    if owners.get(top):
                        found[normal(owners[top][0])] = str(path.relative_to(ROOT))
    return found


def test_every_import_is_a_declared_dependency():
    for distribution, path in imported_distributions(("srl_jax", "data_pipeline", "launch", "configs")).items():
        extras = [EXTRAS[name] for name, files in EXTRA_FILES.items() if any(Path(path).match(file) for file in files)]
        allowed = RUNTIME.keys() | {name for extra in extras for name in extra}
        assert distribution in allowed, f"{path} imports {distribution}, which setup.cfg does not require"


def test_what_the_server_needs_is_tested():
    assert EXTRAS["server"].keys() <= TEST.keys()


def test_every_test_import_is_a_declared_dependency():
    for distribution, path in imported_distributions(("tests",)).items():
        # Ray's tests run where it is installed: 80 MB to fetch, 240 MB on disk.
        named = RUNTIME.keys() | TEST.keys() | EXTRAS["ray"].keys()
        assert distribution in named, f"{path} imports {distribution}, which no extra names"


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.14"])
def test_every_dependency_is_pinned_once_for_every_python(python):
    environment = {"python_version": python, "python_full_version": python + ".0", "sys_platform": "linux"}
    pinned: dict[str, str] = {}
    for requirement in constraint_lines():
        marker: Marker | None = requirement.marker
        if marker is None or marker.evaluate(environment):
            assert normal(requirement.name) not in pinned, f"{requirement.name} is pinned twice for {python}"
            assert re.fullmatch(r"==[\w.]+", str(requirement.specifier)), f"{requirement} is no exact pin"
            pinned[normal(requirement.name)] = str(requirement.specifier)[2:]
    for name, requirement in (RUNTIME | TEST | EXTRAS["bench"] | EXTRAS["ray"]).items():
        assert name in pinned, f"third_party/constraints.txt lacks {name}"
        assert requirement.specifier.contains(pinned[name]), f"{name}: {pinned[name]} against {requirement}"
    assert pinned["jax"] == pinned["jaxlib"]
    assert (Version(pinned["jax"]) >= Version("0.11")) == (python != "3.11")


def test_packages_list_covers_every_package():
    includes = SETUP["options.packages.find"]["include"].split()
    packages = {path.parent for folder in ("srl_jax", "data_pipeline", "configs") for path in
                (ROOT / folder).rglob("*.py")}  # fmt: skip
    for package in packages:
        dotted = ".".join(package.relative_to(ROOT).parts)
        assert (package / "__init__.py").is_file(), f"{dotted} has no __init__.py and would not be installed"
        assert any(re.fullmatch(pattern.replace("*", ".*"), dotted) for pattern in includes), dotted


def test_version_is_in_the_changelog():
    assert SETUP["metadata"]["version"] in (ROOT / "CHANGELOG.md").read_text()
    assert "Apache License" in (ROOT / "LICENSE").read_text()[:200]


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
@pytest.mark.parametrize(("target", "wanted"), [("test", "pytest"), ("demo", "launch/train.py"), ("setup", "pip")])
def test_make_targets(tmp_path, target, wanted):
    command = ["make", "--dry-run", f"VENV={tmp_path / 'venv'}", target]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert wanted in result.stdout
    for path in re.findall(r"(?:launch|configs)/\w+\.py", result.stdout):
        assert (ROOT / path).is_file()


def test_ci_runs_what_everyone_runs():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make test" in script.read_text()


def test_nothing_needs_the_place_it_was_written_in():
    outside = "/" + "work/"
    here = {".py", ".md", ".cfg", ".toml", ".txt", ".yaml", ""}
    folders = ("srl_jax", "launch", "configs", "data_pipeline", "tests", "third_party", "docs", "reports", ".ci")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    for path in [*paths, *ROOT.glob("*.*"), ROOT / "Makefile"]:
        if path.is_file() and path.suffix in here and path.name != ".git":  # a worktree's names its repository
            assert outside not in path.read_text(encoding="utf-8", errors="replace"), path
