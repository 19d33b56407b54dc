"""What a data set is made of: one plain dataclass, checked once."""

import dataclasses
from pathlib import Path

from data_pipeline.errors import DataError

LANGUAGES = ("python", "javascript", "typescript", "java")


@dataclasses.dataclass
class DataSetConfig:
    """Sizes are records per split. `real_share` of each language's records come from real code, as far as found, and
    `episode_share` are steps of episodes.

    The roots are directories of real code per language; empty means the packages of `corpus` (a corpus of
    `third_party/manifest.toml`) if one is named, else what is installed. `split_repositories` also keeps repositories
    apart: one's files serve one split only. `withheld_language` is one that only the test split holds. A task of dev
    or test whose instruction and code have a Jaccard index over `max_similarity` with one of an earlier split is
    dropped (1.0: never). `user_tasks` is a file of a user's own tasks (`tasks/imported.py`), which come on top,
    split by repository. `max_files` bounds how many real files are read per language, `max_excerpt` the characters of
    code in a prompt, `max_trace` the characters of a teacher's trace.
    """

    tag: str = "demo-1"
    seed: int = 0
    train: int = 400
    dev: int = 64
    test: int = 64
    languages: tuple[str, ...] = ("python", "javascript")
    withheld_language: str = ""
    real_share: float = 0.25
    episode_share: float = 0.0
    corpus: str = ""
    user_tasks: str = ""
    split_repositories: bool = False
    max_similarity: float = 1.0
    python_roots: tuple[str, ...] = ()
    javascript_roots: tuple[str, ...] = ()
    typescript_roots: tuple[str, ...] = ()
    java_roots: tuple[str, ...] = ()
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
    for field in ("real_share", "episode_share", "max_similarity"):
        demand(0.0 <= getattr(config, field) <= 1.0, field, "must lie between 0 and 1")
    demand(
        config.real_share + config.episode_share <= 1.0, "episode_share", "and real_share together must be at most 1"
    )
    unknown = set(config.languages) - set(LANGUAGES)
    demand(not unknown and len(config.languages) > 0, "languages", f"must be one or more of {', '.join(LANGUAGES)}")
    demand(
        config.withheld_language == "" or config.withheld_language in config.languages,
        "withheld_language",
        "must be one of languages, or empty",
    )
    demand(
        set(config.languages) != {config.withheld_language} or config.train + config.dev == 0,
        "withheld_language",
        "leaves train and dev without any language",
    )
    demand(
        config.user_tasks == "" or Path(config.user_tasks).is_file(),
        "user_tasks",
        "must be a file of JSON lines, or empty",
    )
    for language in LANGUAGES:
        field = f"{language}_roots"
        for root in getattr(config, field):
            demand(Path(root).is_dir(), field, f"{root!r} is not a directory")
