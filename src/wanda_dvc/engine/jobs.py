"""Jobs that stand for themselves: none needs what another one makes. Done here, or by workers (`engine.pool`)."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")
Job = Callable[[torch.device, T], R]  # of a job: the device to compute on, and what is asked


@dataclass(frozen=True)
class Ask(Generic[T]):
    """What a job is asked."""

    name: str  # in messages
    whole: T  # with all that it reads
    named: T  # the same for those who have the files and read them


class Jobs(ABC):
    """Does jobs."""

    @abstractmethod
    def each(self, function: Job[T, R], asked: Iterable[Ask[T]]) -> Iterator[R]:
        """What a function makes of each thing asked, in order. A few are taken from `asked` ahead."""


@dataclass(frozen=True)
class LocalJobs(Jobs):
    """Does jobs in this process."""

    device: torch.device

    def each(self, function: Job[T, R], asked: Iterable[Ask[T]]) -> Iterator[R]:
        """What a function makes of each thing asked."""
        return (function(self.device, one.whole) for one in asked)


def solving_device(device: torch.device) -> torch.device:
    """Return where masks are chosen and solvers run: on a card, or on the host, which alone has float64."""
    return device if device.type == "cuda" else torch.device("cpu")
