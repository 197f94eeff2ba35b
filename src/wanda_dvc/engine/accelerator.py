"""The devices of this machine, their memory and streams: no other module calls `torch.cuda` or `torch.backends.mps`."""

import contextlib
import ctypes
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
Copied = TypeVar("Copied")


def gpus() -> list[str]:
    """Return the CUDA devices of this machine, by name."""
    return [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []


def has_mps() -> bool:
    """Whether this machine has Apple's GPU."""
    return torch.backends.mps.is_available()


def has_bfloat16(kind: str) -> bool:
    """Whether a kind of device has instructions for bfloat16; which CPUs torch uses them on: `multiplies_natively`."""
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return kind == "cpu" and torch.cpu._is_avx512_bf16_supported()


def multiplies_natively(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of the dtype natively; emulation is many times slower."""
    checks = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    if dtype not in checks:
        return True
    return torch.backends.mkldnn.is_available() and bool(getattr(torch.ops.mkldnn, checks[dtype])())


def gpu_name(device: torch.device | str) -> str:
    """Return the name of a CUDA device's model."""
    return torch.cuda.get_device_name(device)


def free_device_memory(device: torch.device | str) -> int:
    """Return the free bytes of a CUDA device. RuntimeError or AssertionError where there is no such device."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # for this process's next tensors
    return int(torch.cuda.mem_get_info(device)[0]) + kept


def disable_tf32() -> None:
    """Turn off TF32, which some containers and notebooks turn on: it keeps 10 bits of each factor."""
    backends: Any = torch.backends  # mypy does not know the newer name
    backends.fp32_precision = "ieee"  # of convolutions too, with the older name below
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def float64_device(device: torch.device) -> torch.device:
    """Return the device for masks, solvers and sums, which need float64: this one if it is CUDA, else the host."""
    return device if device.type == "cuda" else torch.device("cpu")


class Copies:
    """Copies between main memory and a device: with CUDA through a separate stream, parallel to computation."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def on_stream(self) -> contextlib.AbstractContextManager[object]:
        """Route this thread's copies through the stream."""
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def copy(self, tensor: Tensor, into: Tensor) -> None:
        """Copy a tensor into another. Only from the host to CUDA, through pinned memory, the call does not wait."""
        pinned = self._stream is not None and tensor.device.type == "cpu"
        into.copy_(tensor.pin_memory() if pinned else tensor, non_blocking=pinned)

    def finish(self, tensors: Iterable[Tensor]) -> None:
        """Make this thread's next computations wait for the started copies of these tensors."""
        if self._stream is None:
            return
        computing = torch.cuda.current_stream(self.device)
        computing.wait_stream(self._stream)
        for tensor in tensors:
            tensor.record_stream(computing)  # its memory must not be reused meanwhile

    def to_device(self, tensors: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield each tensor on the device. For CUDA a thread copies the next one while the caller computes."""

        def copy(tensor: Tensor) -> Tensor:
            with self.on_stream():
                on_device = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device)
                self.copy(tensor, on_device)
            return on_device

        if self._stream is None:
            yield from (tensor.to(self.device) for tensor in tensors)
            return
        for tensor in one_ahead(copy, tensors):
            self.finish([tensor])
            yield tensor


def use_on_host(tensors: Iterable[Tensor], use: Callable[[Tensor], object]) -> None:
    """Call a function with each tensor in main memory. From CUDA a thread does, while the next tensor is computed."""

    def copy(tensor: Tensor, stream: Any) -> None:
        with torch.cuda.stream(stream):
            host = tensor.to("cpu", non_blocking=True)  # into pinned memory
        stream.synchronize()
        use(host)

    with ThreadPoolExecutor(max_workers=1) as thread:
        copying: Future[None] | None = None
        for tensor in tensors:
            if copying:
                copying.result()
            if tensor.is_cuda:
                stream = torch.cuda.Stream(tensor.device)
                stream.wait_stream(torch.cuda.current_stream(tensor.device))
                copying = thread.submit(copy, tensor, stream)
            else:
                use(tensor.cpu())
        if copying:
            copying.result()


def one_ahead(function: Callable[[Any], Copied], values: Iterable[Any]) -> Iterator[Copied]:
    """Yield function(value) of each value, in order; a thread computes the next one meanwhile."""
    remaining = iter(values)
    with ThreadPoolExecutor(max_workers=1) as thread:
        started = deque(thread.submit(function, value) for value in islice(remaining, 2))
        while started:
            yield started.popleft().result()
            started.extend(thread.submit(function, value) for value in islice(remaining, 1))


def keep_freed_memory(largest: int = 2**30) -> None:
    """Make glibc keep the memory of freed tensors of up to `largest` bytes: else the system clears it before reuse."""
    if sys.platform != "linux" or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return
    with contextlib.suppress(OSError, AttributeError):  # another allocator
        library = ctypes.CDLL(None)
        library.malloc_trim(0)  # of what is free already
        # Older versions of glibc accept 2²⁵ at most. A trim threshold alone would keep the other one at 128 KiB.
        if library.mallopt(M_MMAP_THRESHOLD, largest) or library.mallopt(M_MMAP_THRESHOLD, 2**25):
            library.mallopt(M_TRIM_THRESHOLD, -1)  # no memory is returned, however much is free
