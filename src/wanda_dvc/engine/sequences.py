"""Token sequences, the model's input: one text, or several questions one after another; and chunks of sequences.

The cut into chunks depends only on the number of sequences and the kind of device, and sums are merged in the chunks'
order. So sums are byte-identical for any assignment of chunks to processes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Hidden = Sequence[Float[Tensor, "_ width"]]  # the hidden states of several sequences
States = Float[Tensor, "batch length width"]  # of the sequences that run together
PREFERRED_CHUNKS, LARGEST_CHUNK = 16, 100  # number of chunks; sequences of a chunk
SMALLEST_CHUNK = {"cpu": 1, "cuda": 8}  # sequences, if a task has as many: a GPU runs those of a chunk together


@dataclass(frozen=True, eq=False)
class PackedQuestions:
    """The question, the choice and the position of every token in a sequence that holds several questions.

    A token attends to the tokens before it in its question's context and in its own choice.
    """

    positions: Int[Tensor, " length"]  # within the question; every choice starts where the context ends
    question: Int[Tensor, " length"]  # ascending
    choice: Int[Tensor, " length"]  # 0: the context; k: the k-th choice

    @cached_property
    def key(self) -> bytes:
        """Return the content as a key. Each Ray task has its own copy, so identity is no key."""
        return torch.stack([self.positions, self.question, self.choice]).numpy().tobytes()

    @cached_property
    def slices(self) -> list[slice]:
        """Return the tokens of each question."""
        _, counts = torch.unique_consecutive(self.question, return_counts=True)
        return [slice(start, end) for start, end in pairwise([0, *counts.cumsum(0).tolist()])]

    def seen_pairs(self, visible: Bool[Tensor, "positions positions"], tokens: slice) -> Bool[Tensor, "tokens tokens"]:
        """Return the tokens that each of some tokens attends to (True) among them, on the device of `visible`.

        visible[p, q]: whether position p of a text attends to position q in this kind of block (such as sliding).
        """
        columns = (self.positions, self.question, self.choice)
        positions, question, choice = (column[tokens].to(visible.device) for column in columns)
        related = (question == question[:, None]) & ((choice == 0) | (choice == choice[:, None]))
        return visible[positions[:, None], positions] & related


@dataclass(frozen=True, eq=False)
class TokenSequence:
    """Tokens that run through the model together."""

    tokens: Int[Tensor, " length"]
    questions: PackedQuestions | None = None  # None: one text
    task: str = ""  # of the questions; a chunk has the sequences of one task, so no task's results depend on another


Batch = Sequence[TokenSequence]  # that run through a block together: texts of one length, or packed questions alone


class Chunk(NamedTuple):
    """Some neighbouring sequences."""

    number: int
    places: range  # among all sequences
    sequences: Sequence[TokenSequence]


def cut_into_chunks(sequences: Sequence[TokenSequence], kind: str = "cpu") -> list[Chunk]:
    """Return the sequences of each task, cut into chunks: 128 make 16 chunks of 8, ten thousand 100 of 100.

    `kind` of device: 8 sequences make 8 chunks on a CPU, and one on `cuda`.
    """
    smallest = SMALLEST_CHUNK.get(kind, 1)
    places: list[range] = []
    for _, of_task in groupby(range(len(sequences)), key=lambda number: sequences[number].task):
        numbers = list(of_task)
        size, end = min(max(len(numbers) // PREFERRED_CHUNKS, smallest), LARGEST_CHUNK), numbers[-1] + 1
        places += [range(start, min(start + size, end)) for start in range(numbers[0], end, size)]
    return [Chunk(number, each, sequences[each.start : each.stop]) for number, each in enumerate(places)]
