"""Rows, the model's input: the tokens of one text, or of several questions one after another. Shards of rows.

The cut into shards depends only on the number of rows, and sums are merged in the shards' order. So sums are
byte-identical for any assignment of shards to processes, and for any order of completion.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

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
