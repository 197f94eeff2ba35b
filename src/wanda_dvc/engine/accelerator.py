"""GPU-only features: the devices of this machine, their memory, pinned memory, streams, sparse cores.

No other module calls `torch.cuda` or `torch.backends.mps`; a test checks it.
"""

import contextlib
from collections.abc import Iterable

import torch
from torch import Tensor


def gpus() -> list[str]:
    """Return the CUDA devices of this machine, by name."""
    return [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []


def has_mps() -> bool:
    """Whether this machine has Apple's GPU."""
    return torch.backends.mps.is_available()


def full_name(device: torch.device | str) -> str:
    """Return the name of a CUDA device's model."""
    return torch.cuda.get_device_name(device)


def free_memory(device: torch.device | str) -> int:
    """Return the free bytes of a CUDA device. RuntimeError or AssertionError where there is no such device.

    Memory that torch keeps for this process's next tensors is free.
    """
    free = int(torch.cuda.mem_get_info(device)[0])
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def peak_memory(device: torch.device | str) -> int:
    """Return the peak bytes of this process's tensors on a CUDA device."""
    return torch.cuda.max_memory_allocated(device)


def multiply_exactly() -> None:
    """Turn off TF32, which some containers and notebooks turn on: it keeps 10 bits of each factor."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def solving_device(device: torch.device) -> torch.device:
    """Return the device for masks and solvers: a CUDA GPU or the host; other devices lack float64."""
    return device if device.type == "cuda" else torch.device("cpu")


def wait() -> None:
    """Wait until the CUDA devices of this process have finished, if there are any."""
    for device in gpus():
        torch.cuda.synchronize(device)


class Copies:
    """Copies weights to a device: on CUDA through a separate stream, parallel to computation."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def running(self) -> contextlib.AbstractContextManager[object]:
        """Route this thread's copies through the stream."""
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def copy(self, tensor: Tensor, into: Tensor) -> Tensor:
        """Copy a tensor into another, which is returned: from the host to CUDA through pinned memory, without waiting.

        From other memory a copy has to end before its source is freed.
        """
        pinned = self._stream is not None and tensor.device.type == "cpu"
        return into.copy_(tensor.pin_memory() if pinned else tensor, non_blocking=pinned)

    def finish(self, tensors: Iterable[Tensor]) -> None:
        """Make this thread's next computations wait for the started copies of these tensors."""
        if self._stream is None:
            return
        computing = torch.cuda.current_stream(self.device)
        computing.wait_stream(self._stream)
        for tensor in tensors:
            tensor.record_stream(computing)  # its memory must not be reused meanwhile


def has_sparse_cores() -> bool:
    """Whether this machine's first CUDA device multiplies 2:4 matrices."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def semi_structured(weight: Tensor) -> Tensor:
    """Return a 2:4 weight in the layout of the sparse cores.

    RuntimeError for an unsupported shape or dtype.
    """
    sparse: Tensor = torch.sparse.to_sparse_semi_structured(weight)
    return sparse
