"""Three languages at the size of the demo, what `sweep_languages.py` is measured on, and a few steps of episodes.

Command:  python launch/prepare_data.py --config=configs/data_languages.py --out=data/languages
Hardware: any CPU; 2 cores, 2 GB. Node and a JDK, or JavaScript or Java are left out.
Time:     213 CPU seconds; under six minutes on 2 busy cores.
Result:   302 training, 47 development and 90 test records of 384, 60 and 120 asked for; the rules of the three splits
          are disjoint. A trace of an episode is long, since its state tells all files: 14 training steps fit into
          `max_trace` and no test step; with --config.max_trace=800 they do.
"""

from configs.data_demo import get_config as demo_config
from data_pipeline.config import DataSetConfig


def get_config() -> DataSetConfig:
    config = demo_config()
    config.tag, config.languages = "languages-1", ("python", "javascript", "java")
    config.train, config.dev, config.test = 384, 60, 120
    config.real_share, config.episode_share = 0.0, 0.25
    return config
