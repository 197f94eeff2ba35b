"""Prune language models with Wanda, in a pipeline whose every step is kept, compared and repeated.

The functions below run the pipeline's stages in a study of their own. Importing this package loads no library; the
first call does.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wanda_dvc.errors import UserError
    from wanda_dvc.interface import Study, calibrate, mask, perplexity, prune, prune_linear

__version__ = "0.1.0"
__all__ = ["Study", "UserError", "calibrate", "mask", "perplexity", "prune", "prune_linear"]


def __getattr__(name: str) -> Any:
    """Load a public function on first access. AttributeError for any other name."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("wanda_dvc.interface"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
