"""The data set of `make demo`: oracle traces for Python and JavaScript, generated and real code.

Command:  python launch/prepare_data.py --config=configs/data_demo.py --out=data/demo
Hardware: any CPU; 2 cores, 2 GB.
Time:     under two minutes on 2 cores.
Result:   256 training, 48 development and 64 test records; the rules of the three splits are disjoint.
"""

from data_pipeline.config import DataSetConfig


def get_config() -> DataSetConfig:
    config = DataSetConfig(tag="demo-1", seed=0, train=256, dev=48, test=64, real_share=0.25, workers=2)
    # Short enough for a 135M model on a CPU: prompts of about 350 tokens with one worked example, traces below 128.
    config.max_excerpt, config.max_trace = 180, 440
    return config
