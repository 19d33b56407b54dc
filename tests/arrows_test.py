"""The imports are the architecture; this reads them and holds the arrows.

launch -> train -> {rollout, evaluate} -> everything else; the host side knows no JAX; `srl_jax` knows neither
`data_pipeline` nor `launch`; losses know arrays only.
"""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("srl_jax", "data_pipeline", "launch", "configs")
ACCELERATOR_STACK = {"jax", "jaxlib", "flax", "optax", "orbax", "qwix"}
# Data machines and sandbox workers run these; `srl_jax.sandbox` and `data_pipeline` stand for all their modules.
HOST_SIDE = (
    "srl_jax.trace", "srl_jax.records", "srl_jax.rewards", "srl_jax.embedding", "srl_jax.tokenizer",
    "srl_jax.assets", "srl_jax.config", "srl_jax.control", "srl_jax.replay", "srl_jax.metrics", "srl_jax.intervals",
    "srl_jax.report", "srl_jax.measures", "srl_jax.episodes", "srl_jax.proposals", "srl_jax.rewrite_step",
    "srl_jax.sweep", "srl_jax.sweep_report", "srl_jax.sandbox", "data_pipeline",
)  # fmt: skip
# How launch files end; it knows every module's errors.
ENTRY = {"launch", "srl_jax.cli"}
# The loop and its two halves -> who may import each besides the entry points.
UPPER = {
    "srl_jax.train": set(),
    "srl_jax.evaluate_run": set(),
    "srl_jax.passes": {"srl_jax.evaluate_run"},
    "srl_jax.evaluate": {"srl_jax.train", "srl_jax.passes", "srl_jax.evaluate_run"},
    "srl_jax.steps": {"srl_jax.train", "srl_jax.step_profile", "srl_jax.bench.scoring"},
    "srl_jax.chains": {"srl_jax.steps"},
    "srl_jax.rollout": {
        "srl_jax.train",
        "srl_jax.steps",
        "srl_jax.chains",
        "srl_jax.evaluate",
        "srl_jax.rewrite",
        "srl_jax.sft",
        "srl_jax.replay_step",
        "srl_jax.bench.ours",
        "srl_jax.bench.scoring",
        "srl_jax.evaluate_run",
        "srl_jax.step_profile",
    },
}
# Programs that run inside the sandbox: they act when imported.
GUESTS = "srl_jax.sandbox.guest"


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}


def imports_of(source: str, module: str, is_package: bool, known: frozenset[str] = frozenset(MODULES)) -> set[str]:
    """Every module that `source` imports anywhere, functions included; `from a import b` is a.b where that is one."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".") if is_package else module.split(".")[:-1]
                above = parents[: len(parents) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add(inner if inner in known else base)
    return found


IMPORTS = {
    name: imports_of(path.read_text(encoding="utf-8"), name, path.name == "__init__.py")
    for name, path in MODULES.items()
}


def within(module: str, packages: tuple[str, ...] | set[str]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def reachable(module: str) -> dict[str, str]:
    """Everything imported from `module` on, through our own modules: name -> the module that imports it."""
    found: dict[str, str] = {}
    waiting = [module]
    while waiting:
        importer = waiting.pop()
        for name in IMPORTS.get(importer, ()):
            if name not in found:
                found[name] = importer
                waiting.append(name)
    return found


HOST_MODULES = sorted(name for name in MODULES if within(name, HOST_SIDE))


def test_the_reader_reads_imports():
    source = "import a.b\nfrom . import c\nfrom ..d import e\nfrom srl_jax import trace, x\ndef f():\n    import late"
    known = frozenset({"srl_jax.trace", "srl_jax.sub.c"})
    assert imports_of(source, "srl_jax.sub.m", False, known) == {
        "a.b", "srl_jax.sub.c", "srl_jax.d", "srl_jax.trace", "srl_jax", "late",
    }  # fmt: skip
    assert "srl_jax.sub" in imports_of("from .x import y", "srl_jax.sub", True, known) | {"srl_jax.sub"}
    assert imports_of("from .x import y", "srl_jax.sub", True, known) == {"srl_jax.sub.x"}


def test_there_is_something_to_hold():
    for name in HOST_SIDE:
        assert any(within(module, {name}) for module in MODULES), f"{name} does not exist; was it renamed?"
    assert "srl_jax.trace" in IMPORTS["srl_jax.records"] | IMPORTS["srl_jax.rewards"]


@pytest.mark.parametrize("module", HOST_MODULES)
def test_host_side_reaches_no_accelerator_stack(module):
    for name, importer in reachable(module).items():
        assert name.split(".")[0] not in ACCELERATOR_STACK, f"{module} reaches {name} through {importer}"


def test_host_side_runs_where_jax_is_not_installed():
    """Imports all of it with the accelerator stack made unimportable: what a data machine would do."""
    # Ray is an extra, and only its own module needs it.
    left_out = {GUESTS} if importlib.util.find_spec("ray") else {GUESTS, "srl_jax.sandbox.cluster"}
    importable = [module for module in HOST_MODULES if not within(module, left_out)]
    program = f"""
import importlib, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {ACCELERATOR_STACK!r}:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Absent())
for module in {importable!r}:
    importlib.import_module(module)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=240)
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.parametrize("module", [name for name in MODULES if within(name, {"srl_jax"})])
def test_library_knows_nothing_above_it(module):
    above = {name for name in IMPORTS[module] if within(name, {"data_pipeline", "launch", "configs", "tests"})}
    assert not above, f"{module} imports {above}"


@pytest.mark.parametrize("module", [name for name in MODULES if within(name, {"data_pipeline", "configs"})])
def test_pipeline_and_recipes_are_not_entry_points(module):
    assert not {name for name in IMPORTS[module] if within(name, {"launch", "tests"})}


def test_only_entry_points_import_entry_points():
    for module, names in IMPORTS.items():
        assert not any(within(name, {"launch"}) for name in names), module
        assert "srl_jax.cli" not in names or within(module, {"launch"}), module


@pytest.mark.parametrize("upper", UPPER)
def test_upper_layers_are_entered_from_above_only(upper):
    importers = {module for module, names in IMPORTS.items() if upper in names and not within(module, ENTRY)}
    assert importers <= UPPER[upper]


def test_losses_are_functions_of_arrays():
    assert not {name for name in IMPORTS["srl_jax.grpo"] if within(name, set(PACKAGES))}
    forbidden = {"srl_jax.config", "srl_jax.rewards", "srl_jax.sandbox", "absl.flags", "ml_collections"}
    for module in ("srl_jax.logprobs", "srl_jax.sampling", "srl_jax.train_step"):
        assert not {name for name in reachable(module) if within(name, forbidden)}, module


def test_no_import_cycles():
    for module in MODULES:
        assert module not in reachable(module), f"{module} imports itself through {reachable(module)[module]}"
