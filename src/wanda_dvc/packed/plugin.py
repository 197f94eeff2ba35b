"""Registers the packed format with transformers, as soon as a process that imports wanda_dvc has transformers' models.

transformers has a registry of quantizers, but using it imports torch and transformers, which takes seconds;
`import wanda_dvc` must be instant. transformers does not search for plug-ins, so an import finder waits for its models.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MODELS = "transformers.modeling_utils"  # no model loads without it, and it imports the registry, not the reverse


class _Finder(MetaPathFinder):
    """Registers the format just before the models are imported. It finds no module."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name == MODELS:
            sys.meta_path.remove(self)
            register()
        return None


def register() -> None:
    """Register the packed format with transformers."""
    importlib.import_module("wanda_dvc.packed.linear")  # by name: the root package imports no heavy module


def register_later() -> None:
    """Register now if transformers' models are imported, else at their import."""
    if MODELS in sys.modules:
        register()
    else:
        sys.meta_path.insert(0, _Finder())
