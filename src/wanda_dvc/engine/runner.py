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
# Of one shard: the model, rows, their last hidden states, and what is asked.
Head = Callable[[Decoder, Sequence[Row], Sequence[Float[Tensor, "_ width"]], T], Iterator[R]]


def report_resumed(kept: int, blocks: int, way: str = "") -> None:
    """Say how many blocks an interrupted run has finished, if any."""
    if kept > 0:
        notice(f"resuming after {kept} of {blocks} blocks{way}")


class Step(ABC):
    """One block of a walk of all rows."""

    index: int

    @abstractmethod
    def advance(self) -> None:
        """Every row through the block."""

    @abstractmethod
    def record(self, *, gram: bool = False, crosses: bool = False) -> Recorded:
        """Every row through the block; what its linears read.

        `gram` asks for Gram matrices too, and `crosses` for the products with what the dense model reads.
        """

    @abstractmethod
    def change(self, keeps: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
        """Every own row through the block once more, with the weights that masks keep, and then with others."""

    @abstractmethod
    def train(self, keeps: Mapping[str, Tensor], weights: Mapping[str, Tensor], **settings: Any) -> dict[str, Tensor]:
        """The block's weights after a training (`engine.training`) on the masks that begins with other weights."""


class Runner(Jobs):
    """Runs the rows of one walk, and jobs between its steps."""

    decoder: Decoder  # in this process: the model's structure, and what is in no block

    @property
    @abstractmethod
    def not_finite(self) -> str | None:
        """Where the hidden states first were not finite; None where they all are."""

    @abstractmethod
    def walk(
        self, rows: Rows, *, kept: int | None = None, with_dense: bool = False, changes: Changes | None = None
    ) -> Iterator[Step]:
        """All rows through all blocks, as `engine.walk.walk`.

        `changes` says how a block was changed whose results are kept; None: no block was.
        """

    @abstractmethod
    def backward(self, rows: Rows, *, gram: bool = False, kept: int = 0) -> Iterator[tuple[int, Gradients]]:
        """All rows through all blocks and back, as `engine.fisher.backward`: each block, the last one first."""

    @abstractmethod
    def head(self, function: Head[T, R], asked: Mapping[int, T]) -> Iterator[R]:
        """What a function makes of some shards' last hidden states, in the shards' order."""
