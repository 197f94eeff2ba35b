"""A cluster without Ray: tasks run in this process, on pickled copies of what they are given."""

import itertools
import pickle
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from wanda_dvc.engine.decoder import Decoder

CPU = torch.device("cpu")
NUMBERS = itertools.count()


@dataclass
class Inline:
    """Maps as a cluster does. `ran` has the name and the input of each task."""

    ran: list[tuple[str, Any]] = field(default_factory=list)
    numbers: dict[Decoder, int] = field(default_factory=dict)  # of the driver's models

    workers, device = 1, CPU

    def map(self, function: Callable[..., Any], inputs: Iterable[Any], what: str = "task") -> Iterator[Any]:
        sent = pickle.dumps(function)
        for number, value in enumerate(inputs):
            self.ran.append((f"{what} {number}", value))
            result = pickle.loads(sent)(CPU, copied(value))
            yield copied(list(result) if isinstance(result, Iterator) else result)

    def with_model(self, decoder: Decoder, function: Callable[..., Any], job: Any) -> Callable[..., Any]:
        number = self.numbers.setdefault(decoder, next(NUMBERS))
        return partial(with_model_of, (decoder.checkpoint.folder, decoder.dtype, number), function, job)

    def merge(self, function: Callable[..., Any], inputs: Iterable[Any], what: str) -> Any:
        total = None
        for sums in self.map(function, inputs, what):
            if total is None:
                total = sums
            else:
                total.merge(sums)
        return copied(total)


@lru_cache(maxsize=1)
def open_model(folder: Path, dtype: torch.dtype, _number: int) -> Decoder:
    return Decoder(folder, dtype=dtype, device=CPU)


def with_model_of(key: tuple[Path, torch.dtype, int], function: Any, job: Any, _: torch.device, value: Any) -> Any:
    return function(open_model(*key), job, value)


def copied(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))
