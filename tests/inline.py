"""A cluster without Ray: units of work run in this process, on pickled copies of what they are given."""

import pickle
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from uuid import uuid4

import torch

from wanda_dvc.engine.decoder import Decoder
from wanda_dvc.engine.executor import Executor

CPU = torch.device("cpu")


@dataclass
class Inline(Executor):
    """Maps as a cluster does. `ran` has the name and the input of each unit of work."""

    ran: list[tuple[str, Any]] = field(default_factory=list)
    models: dict[str, Decoder] = field(default_factory=dict)

    workers = 1

    def map(self, function: Callable[..., Any], inputs: Iterable[Any], what: str = "task") -> Iterator[Any]:
        _opened[id(self)] = self
        sent = pickle.dumps(function)
        for number, one in enumerate(inputs):
            self.ran.append((f"{what} {number}", one))
            found = pickle.loads(sent)(CPU, pickle.loads(pickle.dumps(one)))
            yield pickle.loads(pickle.dumps(list(found) if isinstance(found, Iterator) else found))

    def opener(self, decoder: Decoder) -> Callable[[torch.device], Decoder]:
        return partial(opened, id(self), uuid4().hex, decoder.checkpoint.folder, decoder.dtype)


_opened: dict[int, Inline] = {}


def opened(cluster: int, opening: str, folder: Any, dtype: torch.dtype, device: torch.device) -> Decoder:
    """The worker's own model, and not the driver's."""
    models = _opened[cluster].models
    if opening not in models:
        models[opening] = Decoder(folder, dtype=dtype, device=device)
    return models[opening]
