"""Three languages and their episodes at the size of the demo: what `sweep_languages.py` and episodes are measured on.

Command:  python launch/prepare_data.py --config=configs/data_languages.py --out=data/languages
Hardware: any CPU; 2 cores, 2 GB. Node and a JDK, or JavaScript or Java are left out.
Time:     213 CPU seconds; under six minutes on 2 busy cores.
Result:   384 training, 60 development and 120 test records asked for; the rules of the three splits are disjoint.
"""

from configs.data_demo import get_config as demo_config
from data_pipeline.config import DataSetConfig


def get_config() -> DataSetConfig:
    config = demo_config()
    config.tag, config.languages = "languages-1", ("python", "javascript", "java")
    config.train, config.dev, config.test = 384, 60, 120
    config.real_share, config.episode_share = 0.0, 0.25
    return config
