"""What `launch/benchmark.py` measures: each part beside its floor and beside what a user would otherwise run."""
