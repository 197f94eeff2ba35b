"""Rows, the model's input: the tokens of one text, or of several questions one after another. Shards and calls.

The cut into shards depends only on the number of rows, and sums are merged in the shards' order. So sums are
byte-identical for any assignment of shards to processes, and for any order of completion.
"""

from collections.abc import Callable, Iterator, Mapping, MutableSequence, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.utils._pytree import tree_flatten

# Tokens of several windows in one pass through a block, by kind of device: they fill a GPU. A pass depends on the data
# alone, because last digits depend on its size; it never mixes two shards.
TOKENS_TOGETHER = {"cuda": 8192}
FEWEST, LONGEST = 16, 100  # preferred number of shards; rows of a shard


@dataclass(frozen=True, eq=False)
class Layout:
    """The question, the choice and the position of every token in a row that holds several questions.

    A token attends to the tokens before it in its question's context and in its own choice.
    """

    positions: Int[Tensor, " length"]  # within the question; every choice starts where the context ends
    question: Int[Tensor, " length"]  # ascending
    choice: Int[Tensor, " length"]  # 0: the context; k: the k-th choice

    @cached_property
    def places(self) -> list[slice]:
        """Return the tokens of each question."""
        _, counts = torch.unique_consecutive(self.question, return_counts=True)
        return [slice(start, end) for start, end in pairwise([0, *counts.cumsum(0).tolist()])]

    def hidden(self, sees: Bool[Tensor, "positions positions"]) -> Bool[Tensor, " pairs"]:
        """Return the masked pairs of tokens: [tokens, tokens] of each question, flat, one after another.

        `sees` is the mask by position of the kind of block (causal, sliding, chunked).
        """
        pairs, visible = [], sees.numpy()  # numpy indexes five times as fast as torch
        for place in self.places:
            choice, at = self.choice[place].numpy(), self.positions[place].numpy()
            related = (choice == 0) | (choice == choice[:, None])
            pairs.append(~(visible[at][:, at] & related).ravel())
        return torch.from_numpy(np.concatenate(pairs))

    def by_question(self, hidden: Bool[Tensor, " pairs"]) -> Iterator[tuple[slice, Bool[Tensor, "tokens tokens"]]]:
        """Yield each question's tokens, and its part of the result of `hidden`."""
        sizes = [place.stop - place.start for place in self.places]
        for place, size, part in zip(self.places, sizes, hidden.split([size**2 for size in sizes]), strict=True):
            yield place, part.view(size, size)


@dataclass(frozen=True, eq=False)
class Row:
    """Tokens that run through the model together."""

    tokens: Int[Tensor, " length"]
    layout: Layout | None = None  # None: one text


def as_rows(rows: Sequence[Row] | Int[Tensor, "samples length"]) -> list[Row]:
    """Return windows, or rows, as a list of rows."""
    return [Row(tokens) for tokens in rows] if isinstance(rows, Tensor) else list(rows)


def shards(rows: int) -> list[range]:
    """Return the shards of so many rows: 128 rows make 16 of 8, ten thousand 100 of 100. The last may be shorter."""
    size = min(max(rows // FEWEST, 1), LONGEST)
    return [range(start, min(start + size, rows)) for start in range(0, rows, size)]


# --- the call arguments of blocks, recorded once a row ---

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
