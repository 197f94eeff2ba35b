"""Registers the packed format with transformers as soon as somebody imports it. Importing this loads nothing heavy."""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

AFTER = "transformers.modeling_utils"  # no model loads without it, and all that we need is there once it has run


class _Finder(MetaPathFinder):
    """Finds `AFTER` as Python does, and registers the format once it has run."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != AFTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    def __init__(self, inner: Loader) -> None:
        self.inner = inner

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.inner.exec_module(module)
        register()


def register() -> None:
    """Make transformers load packed directories."""
    importlib.import_module("wanda_dvc.engine.packed_linear")  # by name: no light module depends on torch for it


def register_later() -> None:
    """Register now if transformers' models are loaded, else when they are."""
    if AFTER in sys.modules:
        register()
    else:
        sys.meta_path.insert(0, _Finder())
