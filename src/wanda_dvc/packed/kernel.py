"""Kernels of packed weights for CPUs, in C (`kernel.c`), as torch operators.

The system's C compiler compiles them at first use, into the user's cache, under a digest of source, compiler and flags.
The default is the CPU's fastest path; `WANDA_DVC_KERNEL` names another path, or `off`.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from wanda_dvc.errors import UserError, notice

SOURCE = Path(__file__).with_suffix(".c")
FLAGS = ("-O2", "-fPIC", "-shared")
PATHS = ("generic", "avx2", "avx512")  # as in the source, the slowest first
CHOICE = "WANDA_DVC_KERNEL"
MULTIPLIED = (torch.bfloat16, torch.float32)
WIDTHS = (2, 4)  # bytes a weight, in expandable dtypes

_Pointer, _Long = ctypes.c_void_p, ctypes.c_int64
_COMMON = (ctypes.c_int, ctypes.c_int, _Pointer, _Pointer, _Pointer)  # path, size, values, bits, starts
_THREADS = (ctypes.c_uint, _Pointer)


@dataclass(frozen=True)
class Kernel:
    """The compiled library, its path, and its function to start threads."""

    library: ctypes.CDLL
    path: int
    fork: int | None  # the address of GOMP_parallel: sharing the threads of torch's OpenMP avoids two competing pools


@cache
def kernel() -> Kernel | None:
    """Return the kernels, compiled if needed; None, with a notice, if they are not available.

    UserError if `WANDA_DVC_KERNEL` names a path that this CPU lacks.
    """
    wanted = os.environ.get(CHOICE, "")
    if wanted == "off":
        return None
    try:
        library = _load()
    except (OSError, subprocess.CalledProcessError) as error:
        said = error.stderr.splitlines() if isinstance(error, subprocess.CalledProcessError) else []
        notice(f"packed weights: no kernel for this CPU, they are expanded: {said[0] if said else error}")
        return None
    library.wanda_starts.argtypes = [_Pointer, _Pointer, _Long, _Long]
    library.wanda_expand.argtypes = (*_COMMON, _Pointer, _Long, _Long, *_THREADS)
    library.wanda_multiply.argtypes = (*_COMMON, *[_Pointer] * 3, *[_Long] * 3, *_THREADS)
    library.wanda_starts.restype = library.wanda_expand.restype = None
    able = PATHS[: library.wanda_best() + 1]
    if wanted and wanted not in able:
        raise UserError(f"{CHOICE}: got {wanted}, expected {', '.join(able)} on this CPU, or off")
    parallel = getattr(ctypes.CDLL(None), "GOMP_parallel", None)  # torch loads its OpenMP with global symbols
    fork = ctypes.cast(parallel, _Pointer).value if parallel else None
    return Kernel(library, able.index(wanted) if wanted else len(able) - 1, fork)


def _load() -> ctypes.CDLL:
    """Load the library from the cache, or compile it. OSError or CalledProcessError if that fails."""
    words = shlex.split(os.environ.get("CC", "")) or ["cc"]
    compiler = shutil.which(words[0])
    if compiler is None:
        raise FileNotFoundError(f"{words[0]}: not found, expected a C compiler; install gcc or clang, or set CC")
    command = [compiler, *words[1:], *FLAGS]
    version = subprocess.run([compiler, *words[1:], "--version"], capture_output=True, text=True, check=True).stdout
    parts = (SOURCE.read_text(encoding="utf-8"), shlex.join(command), version, platform.machine())
    name = f"packed-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:32]}.so"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wanda-dvc"
    if (cache / name).is_file():
        return ctypes.CDLL(str(cache / name))
    with suppress(OSError):
        cache.mkdir(parents=True, mode=0o700)
    kept = os.access(cache, os.W_OK | os.X_OK) and cache.is_dir()
    with tempfile.TemporaryDirectory(dir=cache if kept else None) as scratch:
        made = Path(scratch) / name
        subprocess.run([*command, "-o", str(made), str(SOURCE)], capture_output=True, text=True, check=True)
        library = ctypes.CDLL(str(made))
        if kept:
            made.replace(cache / name)  # atomic: other processes may compile or load it now
    return library


def row_starts(bits: Tensor) -> Tensor | None:
    """Return the index of each row's first nonzero, then the total number, int64 [rows + 1].

    None without a kernel, or if the bits are not in this CPU's memory.
    """
    if bits.device.type != "cpu" or (found := kernel()) is None:
        return None
    bits = bits.contiguous()
    starts = torch.empty(len(bits) + 1, dtype=torch.int64)
    found.library.wanda_starts(bits.data_ptr(), starts.data_ptr(), len(bits), 8 * bits.shape[1])
    return starts


@torch.library.custom_op("wanda_dvc::multiply_packed", mutates_args=(), device_types="cpu")
def multiply(x: Tensor, values: Tensor, bits: Tensor, starts: Tensor, bias: Tensor | None) -> Tensor:
    """Return xWᵀ + b, [..., rows], of x [..., columns] and a packed W; all in bfloat16, or all in float32."""
    found = kernel()
    assert found is not None
    rows, columns, x = len(bits), x.shape[-1], x.contiguous()
    out = x.new_empty(*x.shape[:-1], rows)
    at = [tensor.contiguous().data_ptr() for tensor in (values, bits, starts, x)]
    added = None if bias is None else bias.data_ptr()
    vectors = x.numel() // columns
    common = (found.path, x.itemsize, *at, added, out.data_ptr(), rows, columns, vectors)
    if found.library.wanda_multiply(*common, torch.get_num_threads(), found.fork):
        raise MemoryError(f"{4 * columns:,} bytes for each of {vectors} vectors")
    return out


@multiply.register_fake
def _(x: Tensor, values: Tensor, bits: Tensor, starts: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(bits))


@torch.library.custom_op("wanda_dvc::expand_packed", mutates_args={"out"}, device_types="cpu")
def expand(values: Tensor, bits: Tensor, starts: Tensor, out: Tensor) -> None:
    """Write a packed weight of 2 or 4 bytes a number into `out`, contiguous [rows, columns]."""
    found = kernel()
    assert found is not None
    at = [tensor.contiguous().data_ptr() for tensor in (values, bits, starts)]
    common = (found.path, out.itemsize, *at, out.data_ptr(), *out.shape)
    found.library.wanda_expand(*common, torch.get_num_threads(), found.fork)


@expand.register_fake
def _(values: Tensor, bits: Tensor, starts: Tensor, out: Tensor) -> None:
    pass
