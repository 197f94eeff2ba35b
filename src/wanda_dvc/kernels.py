"""Matrix products in float32 through oneDNN, for CPUs on which MKL (torch's default) runs at half speed.

MKL has its fastest kernels only for Intel's CPUs. On two cores of an AMD Zen 5 with AVX-512, MKL multiplies matrices of
a thousand rows at 220 GFLOP/s, oneDNN at 500. torch ships oneDNN for other dtypes. Only the last digits differ.
"""

import contextlib
import mmap
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

LEAST = 2**16  # elements of a weight; for smaller weights the call costs more than the product saves


@lru_cache(maxsize=1)
def is_faster() -> bool:
    """Whether oneDNN is faster on this CPU model. No timing decides, so that results are reproducible."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    with contextlib.suppress(OSError):
        return torch.cpu._is_avx512_supported() and "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    return False


def takes(a: Tensor, b: Tensor) -> bool:
    """Whether oneDNN is faster for this product."""
    return is_faster() and _fits(a, b)


def onednn(a: Tensor, b: Tensor) -> Tensor:
    """Return a · b of two matrices in float32; autograd works."""
    if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
        return _Differentiable.apply(a, b.T)
    return _linear(a, b.T)


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """Return a · b of two matrices through the faster library."""
    return onednn(a, b) if takes(a, b) else a @ b


def add_product(total: Tensor, a: Tensor, b: Tensor, *, alpha: float) -> Tensor:
    """Add α · a · b to a matrix, in place."""
    return total.add_(onednn(a, b), alpha=alpha) if takes(a, b) else total.addmm_(a, b, alpha=alpha)


class OneDnnLinear(nn.Linear):
    """A `torch.nn.Linear` that multiplies through oneDNN."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x Wᵀ + b."""
        weight, bias = self.weight, self.bias
        if not _fits(x, weight):
            return nn.functional.linear(x, weight, bias)
        if torch.is_grad_enabled():
            made = onednn(x, weight.T)
            return made if bias is None else made + bias
        return _linear(x, weight, bias)


def install(model: nn.Module) -> bool:
    """Replace a model's large linears by oneDNN ones, if those are faster. Return whether any was replaced."""
    linears = [module for module in model.modules() if type(module) is nn.Linear and module.weight.numel() >= LEAST]
    for linear in linears if is_faster() else ():
        linear.__class__ = OneDnnLinear
    return bool(linears) and is_faster()


def _fits(x: Tensor, weight: Tensor) -> bool:
    floats = x.dtype is weight.dtype is torch.float32 and x.device.type == weight.device.type == "cpu"
    return floats and weight.numel() >= LEAST and x.numel() > 0


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not (weight.is_contiguous() or weight.T.is_contiguous()):  # a thousand times slower
        weight = weight.contiguous()
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Differentiable(torch.autograd.Function):
    """x Wᵀ with gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _linear(x, weight)

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x = _linear(given, weight.T) if ctx.needs_input_grad[0] else None
        rows = (y.reshape(-1, y.shape[-1]).T for y in (given, x))
        of_weight = _linear(*rows) if ctx.needs_input_grad[1] else None
        return of_x, of_weight


def empty(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return an uninitialized tensor for a mask or a weight. On a CPU it has its own pages, freed with the tensor.

    On the heap, which keeps freed memory, it would fragment the memory of short-lived tensors.
    """
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, max(1, shape.numel()) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype)[: shape.numel()].view(shape)
