"""Settings of the allocator: reuse the memory of activations, return the memory of weights to the system."""

import contextlib
import ctypes
import mmap
import os
import sys

import torch
from torch import Tensor

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
KEPT = 2**30


def empty_weight(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return an uninitialized tensor for a weight. On a CPU it has its own pages, freed with the tensor.

    On the heap, which keeps freed memory, weights would fragment the memory of the activations.
    """
    if device.type != "cpu" or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.empty(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, max(1, shape.numel()) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype)[: shape.numel()].view(shape)


def keep_freed_memory() -> None:
    """Make glibc keep the memory of freed tensors for the next ones, instead of returning it at once.

    The system clears returned memory before reuse, which takes a fifth of a small model's time. Other allocators, and
    a threshold set in the environment, do not change.
    """
    if sys.platform == "linux" and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        with contextlib.suppress(OSError, AttributeError):
            set_option = ctypes.CDLL(None).mallopt
            for option in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
                set_option(option, KEPT)
