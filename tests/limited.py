"""A view of settings that shows those of one stage, and notes which are read."""

from collections.abc import Collection
from typing import Any, cast

from wanda_dvc.params import Params
from wanda_dvc.plan import CHOICES

# Properties of `Params`, and the settings that each follows from; a stage that depends on all of them may read it.
DERIVED = {
    "share": ("sparsity", "pattern"),
    "plan": ("recipe", *CHOICES, "allocation_strength", "sparsity", "pattern"),
}


class Limited:
    """Settings of which only some may be read; reading another one raises AttributeError."""

    def __init__(self, section: Any, allowed: Collection[str], read: set[str], prefix: str = "") -> None:
        self._section, self._allowed, self._prefix, self._read = section, allowed, prefix, read

    def __getattr__(self, name: str) -> Any:
        return self._of(name, getattr(self._section, name))

    def __getitem__(self, name: str) -> Any:
        return self._of(name, self._section[name])

    def _of(self, name: str, value: Any) -> Any:
        dotted = self._prefix + name
        if name in DERIVED and set(DERIVED[name]) <= set(self._allowed):
            self._read.update(DERIVED[name])
            return value
        if dotted in self._allowed or dotted == "runtime":
            self._read.add(dotted)
            return value
        if any(setting.startswith(f"{dotted}.") for setting in self._allowed):
            return Limited(value, self._allowed, self._read, f"{dotted}.")
        raise AttributeError(f"{dotted} is not among this stage's settings: {', '.join(self._allowed)}, runtime")


def limited(params: Params, allowed: Collection[str], read: set[str]) -> Params:
    """Show only some settings, by dotted name, and `runtime`; those that are read are added to `read`."""
    return cast(Params, Limited(params, allowed, read))
