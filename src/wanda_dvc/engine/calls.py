"""The arguments that blocks are called with, recorded once a row and cached within a fixed number of bytes."""

from collections.abc import Callable, Iterator, Mapping, MutableSequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from wanda_dvc.engine.rows import Layout

# Cached at most; a row takes 1 to 2 MB. A row that is not cached is recorded again for each block. That takes a few
# milliseconds: 2 % of a block of SmolLM2-135M on one CPU core. A GPU needs no longer for the block itself (estimated).
CALLS_BYTES = 2**26
CALLS_BYTES_ON_GPU = 2**29


def calls_bytes(device: str) -> int:
    """The bytes of recorded calls that are cached on a kind of device. The current row's calls may come on top."""
    return CALLS_BYTES_ON_GPU if device == "cuda" else CALLS_BYTES


@dataclass(frozen=True)
class Call:
    """The arguments of one block, without the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def held(self) -> list[int]:
        """What its containers hold, by identity: a block that changes one has more results than hidden states."""
        return [id(part) for value in (*self.args, *self.kwargs.values()) for part in _held(value)]


class CallCache:
    """The calls of all blocks, by the row's length or layout.

    A walk runs every row once a block, always in the same order. So rows stay cached from the first on
    until the budget is used up; the others are recorded again each time. The last ones recorded are available
    whatever their size, because windows of one length follow one another.
    """

    def __init__(self, budget: int) -> None:
        self.budget, self.nbytes = budget, 0
        self._cached: dict[int | Layout, list[Call]] = {}
        self._last: tuple[int | Layout, list[Call]] | None = None

    def get(self, key: int | Layout, record: Callable[[], list[Call]]) -> list[Call]:
        """The calls of a row; `record` makes them where they are not cached."""
        if key in self._cached:
            return self._cached[key]
        if self._last is not None and self._last[0] == key:
            return self._last[1]
        self._last = None  # freed before the next are recorded
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
    """Bytes of the tensors in calls; memory that several tensors share counts once."""
    storages = [value.untyped_storage() for value in _flat(calls)[0] if isinstance(value, Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def equal_calls(one: list[Call], other: list[Call]) -> bool:
    """Whether two recordings pass the same values."""
    (values, shape), (others, other_shape) = _flat(one), _flat(other)
    return shape == other_shape and all(map(_equal, values, others))


def _held(value: Any) -> Iterator[Any]:
    if isinstance(value, (Mapping, MutableSequence)):  # transformers has dicts that are none
        for part in value.values() if isinstance(value, Mapping) else value:
            yield part
            yield from _held(part)


def _flat(calls: list[Call]) -> tuple[list[Any], Any]:
    """The values in calls, and the structure that holds them."""
    return tree_flatten([(call.args, call.kwargs) for call in calls])


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)
