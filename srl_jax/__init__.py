"""Supervised Reinforcement Learning of small code-rewriting language models, in JAX."""

__version__ = "0.1.0"
