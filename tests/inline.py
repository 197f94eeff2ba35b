"""A cluster without Ray: tasks run in this process, on pickled copies of what they are given."""

import pickle
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from wanda_dvc.engine.decoder import Decoder

CPU = torch.device("cpu")


@dataclass
class Inline:
    """Maps as a cluster does. `ran` has the name and the input of each task."""

    ran: list[tuple[str, Any]] = field(default_factory=list)
    models: dict[Decoder, Decoder] = field(default_factory=dict)  # the worker's, by the driver's

    workers, device = 1, CPU

    def map(self, function: Callable[..., Any], inputs: Iterable[Any], what: str = "task") -> Iterator[Any]:
        sent = pickle.dumps(function)
        for number, value in enumerate(inputs):
            self.ran.append((f"{what} {number}", value))
            result = pickle.loads(sent)(CPU, copied(value))
            yield copied(list(result) if isinstance(result, Iterator) else result)

    def map_model(
        self, decoder: Decoder, function: Callable[..., Any], job: Any, inputs: Iterable[Any], what: str
    ) -> Iterator[Any]:
        if decoder not in self.models:
            self.models[decoder] = Decoder(decoder.checkpoint.folder, dtype=decoder.dtype, device=CPU)
        model = self.models[decoder]
        sent = pickle.dumps((function, job))
        for number, value in enumerate(inputs):
            self.ran.append((f"{what} {number}", value))
            called, its_job = pickle.loads(sent)
            result = called(model, its_job, copied(value))
            yield copied(list(result) if isinstance(result, Iterator) else result)

    def merge_model(self, *args: Any) -> Any:
        total = None
        for sums in self.map_model(*args):
            if total is None:
                total = sums
            else:
                total.merge(sums)
        return copied(total)


def copied(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))
