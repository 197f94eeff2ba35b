"""Prune language models with Wanda, in a pipeline whose every step is kept, compared and repeated."""

__version__ = "0.1.0"
