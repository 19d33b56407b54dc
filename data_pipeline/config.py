"""What a data set is made of: one plain dataclass, checked once."""

import dataclasses
from pathlib import Path

from data_pipeline.errors import DataError

LANGUAGES = ("python", "javascript")


@dataclasses.dataclass
class DataSetConfig:
    """Sizes are records per split. `real_share` of each language's records come from real code, as far as found.

    `python_roots` and `javascript_roots` are directories of real code; empty means the installed packages.
    `max_files` bounds how many real files are read per language, `max_excerpt` the characters of code in a prompt,
    `max_trace` the characters of a teacher's trace.
    """

    tag: str = "demo-1"
    seed: int = 0
    train: int = 400
    dev: int = 64
    test: int = 64
    languages: tuple[str, ...] = LANGUAGES
    real_share: float = 0.25
    python_roots: tuple[str, ...] = ()
    javascript_roots: tuple[str, ...] = ()
    max_files: int = 2000
    max_excerpt: int = 400
    max_trace: int = 1200
    workers: int = 2
    records_per_shard: int = 1000


def validate(config: DataSetConfig) -> None:
    """Raises `DataError` naming the field, its value and what would be right."""

    def demand(condition: bool, field: str, rule: str) -> None:
        if not condition:
            raise DataError(f"{field} is {getattr(config, field)!r}; {rule}")

    for field in ("train", "dev", "test", "max_files"):
        value = getattr(config, field)
        demand(type(value) is int and value >= 0, field, "must be a whole number of at least 0")
    for field in ("workers", "records_per_shard"):
        value = getattr(config, field)
        demand(type(value) is int and value >= 1, field, "must be a whole number of at least 1")
    demand(
        type(config.max_excerpt) is int and config.max_excerpt >= 80, "max_excerpt", "must be at least 80 characters"
    )
    demand(type(config.max_trace) is int and config.max_trace >= 300, "max_trace", "must be at least 300 characters")
    demand(type(config.seed) is int, "seed", "must be a whole number")
    demand(config.train + config.dev + config.test > 0, "train", "at least one split must hold records")
    demand(isinstance(config.tag, str) and config.tag.strip() != "", "tag", "must name the data set, such as 'demo-1'")
    demand(0.0 <= config.real_share <= 1.0, "real_share", "must lie between 0 and 1")
    unknown = set(config.languages) - set(LANGUAGES)
    demand(not unknown and len(config.languages) > 0, "languages", f"must be one or more of {', '.join(LANGUAGES)}")
    for field in ("python_roots", "javascript_roots"):
        for root in getattr(config, field):
            demand(Path(root).is_dir(), field, f"{root!r} is not a directory")
