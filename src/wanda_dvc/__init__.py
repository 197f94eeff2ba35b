"""Prune language models with Wanda, in a pipeline whose every step is kept, compared and repeated."""

from wanda_dvc.plugin import register_later

__version__ = "0.1.0"

register_later()
