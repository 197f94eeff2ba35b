"""Maps functions over inputs, in order: in this process, or as tasks of a Ray cluster (`engine.cluster`)."""

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Protocol, TypeVar, runtime_checkable

import torch

if TYPE_CHECKING:
    from wanda_dvc.engine.decoder import Decoder

T = TypeVar("T")
R = TypeVar("R")


@runtime_checkable
class Executor(Protocol):
    """Runs units of work: functions of a device and an input that holds files' paths and small values."""

    def map(self, function: Callable[[torch.device, T], R], inputs: Iterable[T], what: str = "task") -> Iterator[R]:
        """Yield the function's result for each input, in order. A few inputs are taken from `inputs` ahead.

        `what` names the inputs in messages, with their numbers.
        """

    def opener(self, decoder: "Decoder") -> Callable[[torch.device], "Decoder"]:
        """Return a function that returns the model of a decoder on a device, in the process of a unit of work."""


class Here:
    """Calls functions in this process."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def map(self, function: Callable[[torch.device, T], R], inputs: Iterable[T], what: str = "task") -> Iterator[R]:
        """Yield the function's result for each input."""
        return (function(self.device, one) for one in inputs)

    def opener(self, decoder: "Decoder") -> Callable[[torch.device], "Decoder"]:
        """Return a function that returns the decoder."""
        return lambda _: decoder
