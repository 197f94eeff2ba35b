"""Matrix products in float32 through oneDNN, for CPUs on which MKL (torch's default) runs at half speed.

MKL has its fastest kernels only for Intel's CPUs. On two cores of an AMD Zen 5 with AVX-512, MKL multiplies matrices of
a thousand rows at 220 GFLOP/s, oneDNN at 500; on a Zen 4, a stage is about 5 % faster. Only the last digits differ.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SMALLEST_WEIGHT = 2**16  # elements of a weight; for smaller weights the call costs more than the product saves


@lru_cache(maxsize=1)
def is_faster() -> bool:
    """Whether oneDNN is faster on this CPU model. No timing decides, so that results are reproducible."""
    cpu = Path("/proc/cpuinfo")
    has_libraries = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    has_avx512 = has_libraries and cpu.exists() and torch.cpu._is_avx512_supported()
    return has_avx512 and "AuthenticAMD" in cpu.read_text(encoding="utf-8")


def uses_onednn(a: Tensor, b: Tensor) -> bool:
    """Whether `multiply` computes this product through oneDNN: in float32, of a large matrix."""
    on_cpu = a.dtype is b.dtype is torch.float32 and a.device.type == b.device.type == "cpu"
    return on_cpu and b.numel() >= SMALLEST_WEIGHT and a.numel() > 0 and is_faster()


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """Return a · b of two matrices through the faster library."""
    return _OneDnnProduct.apply(a, b.T) if uses_onednn(a, b) else a @ b


def multiply_in_float32(a: Tensor, b: Tensor) -> Tensor:
    """Return a · b of two matrices of any dtypes in float32; 16-bit ones are not converted if `sums_in_float32`."""
    if a.dtype is b.dtype and sums_in_float32(a):
        return torch.mm(a, b, out_dtype=torch.float32)
    return multiply(a.float(), b.float())


def sums_in_float32(x: Tensor) -> bool:
    """Whether the device multiplies 16-bit matrices like this one exactly, and sums in float32: CUDA's tensor cores."""
    is_half = x.dtype in (torch.bfloat16, torch.float16)
    # `dtype`: this torch has `mm(out_dtype=)`. Some for ROCm, whose devices are named `cuda` too, raise an error.
    return is_half and x.is_cuda and torch.version.hip is None and "dtype" in torch.ops.aten.mm.overloads()


class OneDnnLinear(nn.Linear):
    """A `torch.nn.Linear` that multiplies through oneDNN."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x Wᵀ + b."""
        if not uses_onednn(x, self.weight):
            return nn.functional.linear(x, self.weight, self.bias)
        outputs = _OneDnnProduct.apply(x, self.weight)
        return outputs if self.bias is None else outputs + self.bias


def install(model: nn.Module) -> None:
    """Replace a model's large linears by oneDNN ones, if those are faster."""
    if not is_faster():
        return
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.numel() >= SMALLEST_WEIGHT:
            module.__class__ = OneDnnLinear


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    if not (weight.is_contiguous() or weight.T.is_contiguous()):  # a thousand times slower
        weight = weight.contiguous()
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


class _OneDnnProduct(torch.autograd.Function):
    """x Wᵀ in float32, also where x is not a matrix."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _linear(x, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        x_gradient = weight_gradient = None
        if ctx.needs_input_grad[0]:
            x_gradient = _linear(gradient, weight.T)
        if ctx.needs_input_grad[1]:
            by_token = gradient.reshape(-1, gradient.shape[-1])
            weight_gradient = _linear(by_token.T, x.reshape(-1, x.shape[-1]).T)
        return x_gradient, weight_gradient
