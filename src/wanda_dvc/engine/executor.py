"""Runs functions of a device and an input in this process."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


class Executor:
    """Maps units of work, functions of a device and an input, over inputs: in this process.

    `engine.cluster` maps them as tasks of a Ray cluster. Inputs hold files' paths and small values.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def map(self, function: Callable[[torch.device, T], R], inputs: Iterable[T], what: str = "task") -> Iterator[R]:
        """Yield the function's result for each input, in order; a cluster's messages name the inputs by `what`."""
        return (function(self.device, one) for one in inputs)

    def opener(self, decoder: Any) -> Callable[[torch.device], Any]:
        """Return a function that returns the model of a decoder on a device, in the process of a unit of work."""
        return lambda _: decoder
