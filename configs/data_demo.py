"""The data set of `make demo`: oracle traces for Python and JavaScript, generated and real code.

Command:  python launch/prepare_data.py --config=configs/data_demo.py --out=data/demo
Hardware: any CPU; 2 cores, 2 GB.
Time:     under two minutes on 2 cores.
Result:   400 training, 64 development and 64 test records; the rules of the three splits are disjoint.
"""

from data_pipeline.config import DataSetConfig


def get_config() -> DataSetConfig:
    return DataSetConfig(tag="demo-1", seed=0, train=400, dev=64, test=64, real_share=0.25, workers=2)
