"""Runs independent jobs, in this process or as tasks of a cluster (`engine.cluster`)."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")
Job = Callable[[torch.device, T], R]  # of a job: the device to compute on, and its input


@dataclass(frozen=True)
class JobInput(Generic[T]):
    """The input of a job."""

    name: str  # in messages
    complete: T  # with all data of the job
    named: T  # the same, where the files that the job reads are on every node


class Jobs(ABC):
    """Runs jobs."""

    @abstractmethod
    def each(self, function: Job[T, R], inputs: Iterable[JobInput[T]]) -> Iterator[R]:
        """Yield a function's result for each input, in order. A few inputs are taken from `inputs` ahead."""


@dataclass(frozen=True)
class LocalJobs(Jobs):
    """Runs jobs in this process."""

    device: torch.device

    def each(self, function: Job[T, R], inputs: Iterable[JobInput[T]]) -> Iterator[R]:
        """Yield a function's result for each input."""
        return (function(self.device, one.complete) for one in inputs)


def solving_device(device: torch.device) -> torch.device:
    """Return the device for masks and solvers: a CUDA GPU or the host; other devices lack float64."""
    return device if device.type == "cuda" else torch.device("cpu")
