"""One packed matrix times a vector, against torch's dense product and an equally good dense kernel.

    python benchmarks/kernels.py [--size 4096] [--model DIR]

The matrices are more than a cache holds. With --model: tokens a second of a dense bfloat16 directory, by torch and by
the dense kernel; `wanda-dvc speed DIR` measures the packed form. The dense kernel needs AVX-512.
"""

import argparse
import ctypes
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from wanda_dvc.packed.kernel import CHOICE, FLAGS, PATHS, kernel
from wanda_dvc.packed.linear import PackedLinear

CACHE = 1 << 29  # bytes that the matrices take together, at least
BUDGET = 8.0  # seconds for each dtype and sparsity


def dense_kernel() -> Callable[..., Tensor]:
    """Compile the dense kernel; return x [1, columns] and W [rows, columns] → [1, rows] float32."""
    source = Path(__file__).with_name("dense_kernel.c")
    with tempfile.TemporaryDirectory() as scratch:
        library = ctypes.CDLL(str(_compile(source, Path(scratch) / "dense.so")))
    pointers, sizes = [ctypes.c_void_p] * 3, [ctypes.c_int64] * 2
    library.dense_multiply.argtypes = [*pointers, *sizes, ctypes.c_uint, ctypes.c_void_p]
    fork = ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p)

    def multiply(x: Tensor, *, weight: Tensor) -> Tensor:
        rows, columns = weight.shape
        ready, out = x.view(-1, 16, 2).transpose(1, 2).reshape(-1).float(), torch.empty(1, rows)
        at = (weight.data_ptr(), ready.data_ptr(), out.data_ptr())
        library.dense_multiply(*at, rows, columns, torch.get_num_threads(), fork)
        return out

    return multiply


def _compile(source: Path, target: Path) -> Path:
    subprocess.run(["cc", *FLAGS, "-o", str(target), str(source)], check=True)
    return target


@torch.inference_mode()
def matrices(size: int) -> None:
    """Print milliseconds a product."""
    found = kernel()
    print(f"path {PATHS[found.path] if found else 'none'} ({CHOICE} chooses), {torch.get_num_threads()} threads")
    by_hand = dense_kernel()
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.randn(1, size).to(dtype)
        for sparsity in (0.5, 0.7):
            linears = []
            for _ in range(-(-CACHE // (size * size * dtype.itemsize))):
                linear = nn.Linear(size, size, bias=False, dtype=dtype)
                linear.weight[torch.rand(size, size) < sparsity] = 0
                linears.append(linear)
            ways: dict[str, list[Callable[[Tensor], Tensor]]] = {
                "torch": [*linears],
                "packed": [PackedLinear.of(linear) for linear in linears],
            }
            if dtype is torch.bfloat16:
                ways["dense kernel"] = [partial(by_hand, weight=linear.weight) for linear in linears]
            times: dict[str, list[float]] = {name: [] for name in ways}
            while sum(map(sum, times.values())) < BUDGET:  # by turns: all see the same disturbances
                for name, multiply in ways.items():
                    times[name] += [_seconds(one, x) for one in multiply]
            told = (f"{name} {1e3 * statistics.median(found):.3f} ms" for name, found in times.items())
            print(f"{dtype}, {sparsity:.0%}: {', '.join(told)}", flush=True)


def _seconds(multiply: Callable[[Tensor], Tensor], x: Tensor) -> float:
    began = time.perf_counter()
    multiply(x)
    return time.perf_counter() - began


class ByHand(nn.Module):
    """A linear whose product with one token is the dense kernel's."""

    def __init__(self, linear: nn.Linear, multiply: Callable[..., Tensor]) -> None:
        """Take the weight over."""
        super().__init__()
        self.linear, self.multiply = linear, multiply

    def forward(self, x: Tensor) -> Tensor:
        """Return xWᵀ."""
        if x.numel() != self.linear.in_features:
            return self.linear(x)
        return self.multiply(x.view(1, -1), weight=self.linear.weight).to(x.dtype).view(*x.shape[:-1], -1)


@torch.inference_mode()
def model(folder: Path, tokens: int = 40) -> None:
    """Print tokens a second, by torch and by the dense kernel in the linears of the blocks."""
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    print(f"torch: {_rate(loaded, tokens):.2f} tokens a second")
    by_hand, head = dense_kernel(), loaded.get_output_embeddings()
    for name, module in [*loaded.named_modules()]:
        if isinstance(module, nn.Linear) and module is not head and module.bias is None:
            loaded.set_submodule(name, ByHand(module, by_hand))
    print(f"dense kernel: {_rate(loaded, tokens):.2f} tokens a second")


def _rate(loaded: nn.Module, tokens: int) -> float:
    out, times = loaded(torch.arange(1, 17)[None], use_cache=True), []
    for _ in range(tokens):
        began = time.perf_counter()
        out = loaded(out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True)
        times.append(time.perf_counter() - began)
    return 1 / statistics.median(times)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--model", type=Path)
    given = parser.parse_args()
    if given.model:
        model(given.model)
    else:
        matrices(given.size)
