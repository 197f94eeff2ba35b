"""The interface of a walk: rows run in this process (`engine.walk`) or as tasks (`engine.cluster`)."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from wanda_dvc.engine.decoder import Decoder
from wanda_dvc.engine.jobs import Jobs, R, T
from wanda_dvc.engine.recorder import Gradients, Recorded
from wanda_dvc.engine.rows import Row
from wanda_dvc.errors import notice

Rows = Sequence[Row] | Int[Tensor, "samples length"]
Change = tuple[Mapping[str, Tensor], Mapping[str, Tensor]]  # masks, and weights, of one block
Changes = Callable[[int], Change]  # of a block, by its index
# Arguments, of one shard: the model, rows, their last hidden states, and an input of the function.
Head = Callable[[Decoder, Sequence[Row], Sequence[Float[Tensor, "_ width"]], T], Iterator[R]]


def report_resumed(kept: int, blocks: int, way: str = "") -> None:
    """Report the number of blocks finished by an interrupted run, if any."""
    if kept > 0:
        notice(f"resuming after {kept} of {blocks} blocks{way}")


class Step(ABC):
    """One block of a walk of all rows."""

    index: int

    @abstractmethod
    def advance(self) -> None:
        """Run every row through the block."""

    @abstractmethod
    def record(self, *, gram: bool = False, crosses: bool = False) -> Recorded:
        """Run every row through the block; return the statistics of its linears' inputs.

        `gram` adds Gram matrices, and `crosses` the products with the dense model's inputs.
        """

    @abstractmethod
    def change(self, keeps: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
        """Run every own row through the block once more, with masked weights and the given new weights."""

    @abstractmethod
    def train(self, keeps: Mapping[str, Tensor], weights: Mapping[str, Tensor], **settings: Any) -> dict[str, Tensor]:
        """Train the block on the masks (`engine.training`), from the given weights; return its new weights."""


class Runner(Jobs):
    """Runs the rows of one walk, and jobs between its steps."""

    decoder: Decoder  # in this process: the model's structure, and its weights outside blocks

    @property
    @abstractmethod
    def not_finite(self) -> str | None:
        """The place of the first non-finite hidden states, or None."""

    @abstractmethod
    def walk(
        self, rows: Rows, *, kept: int | None = None, with_dense: bool = False, changes: Changes | None = None
    ) -> Iterator[Step]:
        """Run all rows through all blocks, as `engine.walk.walk`.

        `changes` returns the earlier changes of a block with kept results; None: no block was changed.
        """

    @abstractmethod
    def backward(self, rows: Rows, *, gram: bool = False, kept: int = 0) -> Iterator[tuple[int, Gradients]]:
        """Run all rows forward and backward, as `engine.fisher.backward`; yield each block, the last one first."""

    @abstractmethod
    def head(self, function: Head[T, R], inputs: Callable[[range], T | None]) -> Iterator[R]:
        """Apply a function to the last hidden states of the shards that it has an input for, in the shards' order.

        `inputs` returns the input of a shard, by its rows, or None.
        """
