"""The default data set: oracle traces in four languages, generated repositories, real code and episodes.

Command:  python launch/prepare_data.py --config=configs/data_default.py --out=data/default
Hardware: any CPU; 2 cores, 4 GB. Node and a JDK, or JavaScript or Java are left out. The first run fetches 40 MB of
          pinned packages (`third_party/manifest.toml`).
Time:     68 minutes of processor time, 73 of clock on a busy machine (reports/data.md); an interrupted run goes on
          where it stopped.
Result:   10,502 records of 11,600 asked for; rules and repositories of the three splits are disjoint.
"""

from data_pipeline.config import DataSetConfig


def get_config() -> DataSetConfig:
    config = DataSetConfig(tag="default-1", seed=0, train=10800, dev=400, test=400, workers=2)
    config.languages = ("python", "javascript", "typescript", "java")
    config.real_share, config.episode_share = 0.12, 0.3
    config.corpus, config.split_repositories, config.max_files = "default", True, 4000
    config.max_similarity = 0.8
    config.max_excerpt, config.max_trace = 600, 1200
    return config
