"""What `launch/prepare_data.py` does besides building: migrate, rescore, verify, bench."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.load import benchmark, verify
from data_pipeline.migrate import migrate
from data_pipeline.quality import QualityConfig
from data_pipeline.rescore import rescore

COMMANDS = ("build", "migrate", "rescore", "verify", "bench")


def run(command: str, data_dir: Path, weights: str) -> str:
    """Runs a command other than "build" on the data set in `data_dir` and says what it did; raises DataError."""
    if command == "migrate":
        old, new = migrate(data_dir)
        return f"{data_dir}: schema {old} is current" if old == new else f"{data_dir}: migrated from {old} to {new}"
    if command == "rescore":
        quality = quality_of(weights)
        manifest = rescore(data_dir, quality)
        return f"{data_dir}: {records_in(manifest)} records score {quality.threshold:g} or more"
    if command == "verify":
        verify(data_dir)
        return f"{data_dir}: every file is as the manifest says"
    measured = benchmark(data_dir)
    return (
        f"{measured['records_per_second']:,.0f} records/s ({measured['records_per_cpu_second']:,.0f} per CPU second): "
        f"{measured['records']:,} read in training order, {measured['distinct']:,} different ones of "
        f"{measured['bytes'] / 2**20:,.1f} MiB of shards, each read and decoded anew"
    )


def records_in(manifest: Mapping[str, Any]) -> int:
    """Records of a data set over all splits and slices."""
    return sum(entry["records"] for split in manifest["splits"].values() for entry in split["slices"].values())


def quality_of(text: str) -> QualityConfig:
    """The weights in "execution=0.5,threshold=0.7"; what is not named keeps its default."""
    values = {}
    known = {field.name for field in dataclasses.fields(QualityConfig)}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        if name not in known:
            raise DataError(f"--quality has no weight {name!r}; it has {', '.join(sorted(known))}")
        try:
            values[name] = float(value)
        except ValueError:
            raise DataError(f"--quality: {name} is {value!r}; must be a number") from None
    return QualityConfig(**values)
