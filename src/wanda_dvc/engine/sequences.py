"""Rows, the model's input: the tokens of one text, or of several questions one after another; and their hidden states.

The cut into shards depends only on the number of rows, and sums are merged in the shards' order. So sums are
byte-identical for any assignment of shards to processes, and for any order of completion.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Hidden = Sequence[Float[Tensor, "_ width"]]  # the hidden states of several rows
FEWEST, LONGEST = 16, 100  # preferred number of shards; rows of a shard
# Bytes of kept arguments of blocks by kind of device, without those of the current row; a row takes 1 to 2 MB. Other
# rows' arguments are recorded again for each block, in a few milliseconds: 2 % of a block of SmolLM2-135M on one CPU
# core, and about as long as the block itself takes on a GPU (estimated).
ARGUMENTS_BYTES = {"cpu": 2**26, "cuda": 2**29, "mps": 2**26}


@dataclass(frozen=True, eq=False)
class PackedQuestions:
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


@dataclass(frozen=True, eq=False)
class TokenSequence:
    """Tokens that run through the model together."""

    tokens: Int[Tensor, " length"]
    questions: PackedQuestions | None = None  # None: one text


def shards(rows: int) -> list[range]:
    """Return the shards of so many rows: 128 rows make 16 of 8, ten thousand 100 of 100. The last may be shorter."""
    size = min(max(rows // FEWEST, 1), LONGEST)
    return [range(start, min(start + size, rows)) for start in range(0, rows, size)]


class Chunk(NamedTuple):
    """Some neighbouring rows."""

    number: int
    rows: list[TokenSequence]
