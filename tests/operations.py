"""The torch operations that a piece of code starts."""

from collections import Counter
from typing import Any

from simulated_gpu import OnDevice
from torch.utils._python_dispatch import TorchDispatchMode


class Operations(TorchDispatchMode):
    """Counts the operations inside, by name: all, or those of the simulated GPU."""

    def __init__(self, *, of_gpu: bool = False) -> None:
        super().__init__()
        self.of_gpu = of_gpu
        self.counts = Counter[str]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.of_gpu or OnDevice in types:
            self.counts[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))
