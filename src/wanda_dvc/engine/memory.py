"""What becomes of memory that is freed: large tensors that come and go want it kept, weights want it back."""

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
    """Room for a weight. On a CPU in pages of its own, which go back when it does: in the heap, which keeps what is
    freed, weights would lie between what comes and goes with each window."""
    if device.type != "cpu" or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.empty(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, max(1, shape.numel()) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype)[: shape.numel()].view(shape)


def keep_freed_memory() -> None:
    """Have glibc keep the memory of freed tensors for the next ones, instead of giving it back at once.

    What is given back has to be cleared by the system before it is had again, which is a fifth of a small model's time.
    Other allocators, and a threshold that the environment sets, stay as they are.
    """
    if sys.platform == "linux" and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        with contextlib.suppress(OSError, AttributeError):
            set_option = ctypes.CDLL(None).mallopt
            for option in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
                set_option(option, KEPT)
