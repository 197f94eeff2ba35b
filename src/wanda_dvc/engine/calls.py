"""The call arguments of blocks, recorded once a row and cached within a fixed number of bytes."""

from collections.abc import Callable, Iterator, Mapping, MutableSequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from wanda_dvc.engine.rows import Layout

# Cache limit; a row takes 1 to 2 MB. An uncached row is recorded again for each block, in a few milliseconds: 2 % of a
# block of SmolLM2-135M on one CPU core, and about as long as the block itself takes on a GPU (estimated).
CALLS_BYTES = 2**26
CALLS_BYTES_ON_GPU = 2**29


def calls_bytes(device: str) -> int:
    """Return the cache limit in bytes for a kind of device, without the current row's calls."""
    return CALLS_BYTES_ON_GPU if device == "cuda" else CALLS_BYTES


@dataclass(frozen=True)
class Call:
    """The arguments of one block, without the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def held(self) -> list[int]:
        """Return the contents of its containers, by identity, to detect blocks that change a container."""
        return [id(part) for value in (*self.args, *self.kwargs.values()) for part in _held(value)]


class CallCache:
    """The calls of all blocks, by the row's length or layout.

    A walk runs every row once a block, always in the same order. So the first rows stay cached up to the limit, and
    the others are recorded again each time. The last recorded calls are always available, at any size, because
    windows of one length follow one another.
    """

    def __init__(self, budget: int) -> None:
        self.budget, self.nbytes = budget, 0
        self._cached: dict[int | Layout, list[Call]] = {}
        self._last: tuple[int | Layout, list[Call]] | None = None

    def get(self, key: int | Layout, record: Callable[[], list[Call]]) -> list[Call]:
        """Return the calls of a row; `record` makes them if they are not cached."""
        if key in self._cached:
            return self._cached[key]
        if self._last is not None and self._last[0] == key:
            return self._last[1]
        self._last = None  # freed before the next recording
        calls = record()
        size = call_bytes(calls)
        if self.nbytes + size <= self.budget:
            self._cached[key] = calls
            self.nbytes += size
        else:
            self._last = key, calls
        return calls

    def clear(self) -> None:
        """Drop all calls."""
        self._cached.clear()
        self._last, self.nbytes = None, 0


def call_bytes(calls: list[Call]) -> int:
    """Return the bytes of the tensors in calls; shared memory counts once."""
    storages = [value.untyped_storage() for value in _flat(calls)[0] if isinstance(value, Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def equal_calls(one: list[Call], other: list[Call]) -> bool:
    """Whether two recordings pass the same values."""
    (values, shape), (others, other_shape) = _flat(one), _flat(other)
    return shape == other_shape and all(map(_equal, values, others))


def _held(value: Any) -> Iterator[Any]:
    if isinstance(value, (Mapping, MutableSequence)):  # transformers has mappings that are not dicts
        for part in value.values() if isinstance(value, Mapping) else value:
            yield part
            yield from _held(part)


def _flat(calls: list[Call]) -> tuple[list[Any], Any]:
    """Return the values in calls, and their nested structure."""
    return tree_flatten([(call.args, call.kwargs) for call in calls])


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)
