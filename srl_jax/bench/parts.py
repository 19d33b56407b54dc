"""The parts of the benchmark, what each writes, and the page they make together."""

import concurrent.futures
import dataclasses
import hashlib
import json
import multiprocessing
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from srl_jax.bench import floor, masking, scoring, tables, tags, worker
from srl_jax.bench.race import SYSTEMS, race
from srl_jax.bench.weights import read_shape
from srl_jax.bench.workload import WORKLOADS, Workload
from srl_jax.config import ConfigError, TrainConfig, validate
from srl_jax.environment import processor
from srl_jax.evaluation import write_bytes
from srl_jax.records import TeacherRecord

PARTS = ("workloads", "reward", "grammar", "tags", "ablation")
# (with, without): how many times as fast the first is as the second is what one thing is worth, alone.
ABLATIONS = {
    ("ours", "unshared"): "prompts shared in sampling (rollout) and in the update",
    ("ours", "unforced"): "tokens that the grammar forces read at once and not scored (rollout, update)",
    ("ragged", "uncompacted"): "a smaller batch for the last rows (rollout), where rows end at random",
    ("speculating", "ours"): "three tokens guessed ahead by prompt look-up (rollout), untrained model",
}
PEERS = ("hf", "trl", "tunix", "unforced")  # the last is ours again, without what the race's shapes favour
FEW_SHOT = 1
_PACKAGES = ("jax", "torch", "transformers", "peft", "trl", "google-tunix")
_VARIABLES = ("GLIBC_TUNABLES", "XLA_FLAGS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")  # that change times


@dataclasses.dataclass(frozen=True)
class Request:
    """What `launch/benchmark.py` was asked for.

    `records`: reads the dev split, for `reward` and `tags`. `config`: the recipe whose steps `reward` takes.
    """

    out: Path
    parts: Sequence[str]
    workloads: Sequence[str]
    compare: Sequence[str]
    rounds: int
    command: str
    records: Callable[[], list[TeacherRecord]]
    config: TrainConfig | None = None

    def check(self) -> None:
        """Raises `ConfigError` for a name that does not exist, and a recipe whose steps have no rewards."""
        for flag, given, known in (
            ("parts", self.parts, PARTS), ("workload", self.workloads, WORKLOADS), ("compare", self.compare, PEERS)
        ):  # fmt: skip
            if not given and flag != "compare":
                raise ConfigError(flag, "", f"must name one or more of {', '.join(sorted(known))}")
            for name in given:
                if name not in known:
                    raise ConfigError(flag, name, f"must be among {', '.join(sorted(known))}")
        if "reward" in self.parts:
            if self.config is None:
                raise ConfigError("config", None, "--parts=reward takes steps: give --config=configs/smollm2_cpu.py")
            validate(self.config)
            if self.config.method != "srl" or self.config.plays_episodes:
                raise ConfigError(
                    "method", self.config.method, "--parts=reward takes steps of method 'srl' with grpo.returns='step'"
                )


def run(request: Request, say: Callable[[str], None] = print) -> None:
    """Measures what is missing; after each part adds to `<out>/results.jsonl` (one object a section) and `results.md`.

    What an earlier call measured at the same commit stays, unless this one measures the same.
    """
    request.check()
    records = request.records() if {"reward", "tags"} & set(request.parts) else []  # before hours of races
    request.out.mkdir(parents=True, exist_ok=True)
    results = Results(request.out, machine(request.command))
    for name in request.workloads:
        workload = WORKLOADS[name]
        if "workloads" in request.parts:
            results.add(_workload(request, workload, say))
        if "grammar" in request.parts:
            meaning = "the mask: a token at a time under it, against the same without it"
            results.add(_race(request, workload, "grammar", ["unforced", "unmasked"], meaning, say))
        if "ablation" in request.parts:
            for systems, meaning in ABLATIONS.items():
                results.add(_race(request, workload, "ablation", systems, meaning, say))
    if "reward" in request.parts:
        results.add(_rewards(request.config, records, request.rounds))
    if "grammar" in request.parts:
        rows = WORKLOADS[request.workloads[0]].rows
        title = f"grammar tables of three vocabularies; mask of one step of {rows} rows"
        results.add([{"section": "figures", "title": title, "figures": _apart(masking.measure, rows)}])
    if "tags" in request.parts:
        title = "chance that the untrained SmolLM2 closes its thought where the teacher does"
        figures = _apart(_compare_tags, records)
        results.add([{"section": "figures", "title": title, "figures": figures}])
    say(page(results.sections))


class Results:
    """The sections of `<out>/results.jsonl` and the page of them, on disk as soon as they are measured."""

    def __init__(self, out: Path, measured_on: Mapping[str, Any]) -> None:
        self._out, self._commit = out, measured_on["commit"]
        path = out / "results.jsonl"
        stored = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
        self.sections = [section for section in stored if section["commit"] == self._commit]
        self.add([{"section": "machine", **measured_on}])

    def add(self, sections: Sequence[Mapping[str, Any]]) -> None:
        """Appends `sections`; one that is there already is replaced where it stands."""
        for section in sections:
            section = {**section, "commit": self._commit}
            places = [n for n, other in enumerate(self.sections) if _identity(other) == _identity(section)]
            if places:
                self.sections[places[0]] = section
            else:
                self.sections.append(section)
        lines = "".join(json.dumps(section, ensure_ascii=False) + "\n" for section in self.sections)
        write_bytes(self._out / "results.jsonl", lines.encode())
        write_bytes(self._out / "results.md", page(self.sections).encode())


def _identity(section: Mapping[str, Any]) -> tuple[Any, ...]:
    """What makes a section the same measurement as another: what it is of, not what it found."""
    systems = list(section.get("figures", ())) if section["section"] == "race" else ()
    workload = section.get("workload", "")
    name = workload["name"] if isinstance(workload, Mapping) else workload
    return section["section"], section.get("title", ""), section.get("command", ""), name, *systems


def _rewards(config: TrainConfig, records: list[TeacherRecord], rounds: int) -> list[dict[str, Any]]:
    steps, batches = _apart(scoring.measure, config, records, rounds)
    shown = {
        "rollout, reward and update together, in steps as they train": steps,
        "rewards apart: completions scored by a service to which all is new": batches,
    }
    note = f"median (least..greatest) of {rounds} rounds"
    return [{"section": "figures", "title": f"{title}; {note}", "figures": rows} for title, rows in shown.items()]


def _compare_tags(records: list[TeacherRecord]) -> list[dict[str, Any]]:
    return tags.compare(records, few_shot=FEW_SHOT)


def _race(
    request: Request, workload: Workload, name: str, names: Sequence[str], title: str, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """The section of a race of the systems `names`, the first of which is compared with each other."""
    systems = {system: SYSTEMS[system] for system in names}
    # Who is compared belongs to the name, so that another comparison does not continue this one's rounds.
    stored = race(
        "-".join([name, *names]), workload, systems, request.out, rounds=request.rounds, commit=commit(), say=say
    )
    section = {"section": "race", "title": title, "workload": dataclasses.asdict(workload), "first": names[0]}
    return [{**section, "figures": tables.summary(stored, names[0]), "rounds": stored}]


def _workload(request: Request, workload: Workload, say: Callable[[str], None]) -> list[dict[str, Any]]:
    title = "ours, grammar on, beside what users would otherwise run, grammar off"
    sections = _race(request, workload, "workloads", ["ours", *request.compare], title, say)
    config = read_shape(request.out / "models" / f"{workload.model}-{workload.dtype}")
    rates = _apart(floor.measure, config, workload.dtype, floor.rows_needed(workload))
    say(f"{workload.name}: reads {rates.bandwidth / 1e9:.1f} GB/s, products by rows: {_rates(rates.gemm)} GFLOP/s")
    if "failed" not in sections[0]["figures"]["ours"]:
        scored = sections[0]["figures"]["ours"]["scored_tokens"]
        floors = {part: value.to_dict() for part, value in floor.floors(config, workload, rates, scored).items()}
        sections.append(
            {
                "section": "floor",
                "workload": workload.name,
                "bandwidth": rates.bandwidth,
                "gemm": rates.gemm,
                "floors": floors,
                "ours": sections[0]["figures"]["ours"],
            }
        )
    return sections


def _rates(gemm: Mapping[int, float]) -> str:
    return ", ".join(f"{rows}: {rate / 1e9:.0f}" for rows, rate in gemm.items())


def _apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's value from a process of its own, which leaves no accelerator memory taken."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(worker.carried, function, *arguments).result()


def commit() -> str:
    """The commit that is measured; where files differ from it with a mark of these changes; "unknown" elsewhere."""
    git = lambda *arguments: (
        subprocess.run(["git", *arguments], cwd=Path(__file__).parents[2], capture_output=True, check=False).stdout
    )
    head, changes = git("describe", "--always").decode().strip(), git("diff", "HEAD")
    return head + (f"-changed-{hashlib.sha256(changes).hexdigest()[:8]}" if changes else "") if head else "unknown"


def machine(command: str) -> dict[str, Any]:
    return {
        "command": command,
        "commit": commit(),
        "at": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "cores": floor.cores(),
        "load": [round(value, 1) for value in os.getloadavg()],
        "processor": processor(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _sentence(title: str) -> str:
    return title[0].upper() + title[1:]


def page(sections: Sequence[Mapping[str, Any]]) -> str:
    """The markdown of all sections."""
    parts = []
    for section in sections:
        if section["section"] == "machine":
            load = ", ".join(map(str, section["load"]))
            packages = ", ".join(f"{name} {version}" for name, version in section["packages"].items() if version)
            variables = "".join(f"; {name}={value}" for name, value in section["variables"].items())
            parts.append(
                f"`{section['command']}` at {section['commit']}, {section['at']}; {section['cores']} cores of "
                f"{section['processor'] or section['platform']}, load {load} (1, 5, 15 min) at the start; "
                f"Python {section['python']}, {packages}{variables}."
            )
        elif section["section"] == "race":
            w = section["workload"]
            first = (
                f"### {w['name'].upper()}: {w['prompts']} prompts x {w['group_size']} completions, prompt "
                f"{w['prompt_tokens']}, {w['new_tokens']} new, {w['model']}, {w['dtype']}"
            )
            count = len(section["rounds"]["rounds"])
            note = f"{_sentence(section['title'])}; median (least..greatest) of {count} rounds."
            parts.append(f"{first}\n\n{note}\n\n{tables.race_table(section['figures'], section['first'])}")
        elif section["section"] == "floor":
            rates = f"Reads {section['bandwidth'] / 1e9:.1f} GB/s; products by rows: {_rates(section['gemm'])} GFLOP/s."
            parts.append(f"{rates}\n\n{tables.floor_table(section['floors'], section['ours'])}")
        else:
            parts.append(f"### {_sentence(section['title'])}\n\n{tables.figures_table(section['figures'])}")
    return "\n\n".join(parts) + "\n"
