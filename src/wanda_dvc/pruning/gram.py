"""Gram matrices: XᵀX of a linear's input."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Float64, Shaped
from torch import Tensor

from wanda_dvc import kernels

Weight = Float[Tensor, "out in"]
Square = Float[Tensor, "in in"]
PANEL = 128  # rows of a Gram matrix that a CPU computes at a time
TRIANGLE_PANELS = 32  # parts in which a triangle is packed and unpacked, at most
PANEL_NUMBERS = 2**22  # of a triangle's part, at least, on a GPU: an expert's triangle is one part
# Scores take rows in slices of about so many weights, which bounds memory. With smaller slices the threads wait for the
# interpreter.
WEIGHTS_AT_A_TIME = 2**20


@dataclass
class Gram:
    """XᵀX over all tokens of one distinct input. Sums of several chunks merge.

    `add` multiplies the tokens of one call in float32 and sums calls in float64. Memory in bytes: 8 · in² for the sum.
    While tokens are added, on a CPU 12 · 128 · in, or 4 · tokens · in more with oneDNN; on a GPU 4 · in².
    """

    upper: Float64[Tensor, "in in"]  # on and above the diagonal; values below it are undefined
    count: int

    @classmethod
    def empty(cls, features: int, device: torch.device | str = "cpu") -> "Gram":
        """Return the statistics of no tokens."""
        return cls(torch.zeros(features, features, dtype=torch.float64, device=device), 0)

    def add(self, x: Float[Tensor, "tokens in"]) -> None:
        """Add the tokens of one or more windows."""
        features = (x if kernels.sums_in_float32(x) else x.float()).T
        if kernels.uses_onednn(features, features):  # the products below, of its row slices, are then faster
            features = features.contiguous()
        for begin, end in panels(self.upper):
            panel = kernels.multiply_in_float32(features[begin:end], features[begin:].T)
            self.upper[begin:end, begin:] += panel.to(self.upper.device)
        self.count += len(x)

    def merge(self, gram: "Gram") -> None:
        """Add another chunk's sums."""
        self.upper += gram.upper.to(self.upper)
        self.count += gram.count

    def matrix(self) -> Square:
        """Return XᵀX, symmetric, float32. It is the identity if no token was seen: every feature then counts alike."""
        if not self.count:
            return torch.eye(len(self.upper), device=self.upper.device)
        matrix = self.upper.float().triu_()
        return matrix.add_(matrix.triu(1).T)

    def triangle(self, norm: Float64[Tensor, " in"] | None = None) -> Float[Tensor, " packed"]:
        """Return G's upper triangle by row, float32, or of G_ij / (norm_i · norm_j): 2 · in² bytes, in² for a panel."""
        features = len(self.upper)
        packed = torch.empty(features * (features + 1) // 2, device=self.upper.device)
        for rows, numbers, mask in _panels_of_triangle(self.upper):
            panel = self.upper[rows, rows.start :]
            if norm is not None:
                panel = (panel / norm[rows.start :]).div_(norm[rows, None])
            _numpy_on_cpu(packed)[numbers] = _numpy_on_cpu(panel)[_numpy_on_cpu(mask)]
        return packed

    @classmethod
    def from_triangle(
        cls, packed: Shaped[Tensor, " packed"], count: int, norm: Float[Tensor, " in"] | None = None
    ) -> "Gram":
        """Return the statistics of a triangle; `norm` undoes the division by it. 8 · in² bytes, ½ · in² for a panel."""
        features = round((2 * len(packed) + 0.25) ** 0.5 - 0.5)
        upper = torch.zeros(features, features, dtype=torch.float64, device=packed.device)
        for rows, numbers, mask in _panels_of_triangle(upper):
            panel = torch.zeros(mask.shape, device=packed.device)
            _numpy_on_cpu(panel)[_numpy_on_cpu(mask)] = _numpy_on_cpu(packed[numbers].float())
            if norm is not None:
                panel.mul_(norm[rows.start :]).mul_(norm[rows, None])
            upper[rows, rows.start :] = panel
        return cls(upper, count)

    def scaled_triangle(self) -> tuple[Float[Tensor, " in"], Float[Tensor, " packed"]]:
        """Return ‖X_j‖₂, and the triangle with every feature divided by it: cosines, at most 1; 0 where dead."""
        norm = self.upper.diagonal().sqrt()
        return norm.float(), self.triangle(norm.where(norm > 0, 1))


def panels(matrix: Square) -> Iterator[tuple[int, int]]:
    """Yield the rows in which a square matrix is computed: 128 at a time on a CPU, whose caches hold them, else all."""
    size = PANEL if matrix.device.type == "cpu" else len(matrix)
    return ((begin, min(begin + size, len(matrix))) for begin in range(0, len(matrix), size))


def row_slices(weight: Weight, cpu_rows: int | None = None) -> list[slice]:
    """Return slices of rows, by default of about 2²⁰ weights; of 64 times as many on a GPU. It bounds memory."""
    size = cpu_rows or max(1, WEIGHTS_AT_A_TIME // weight.shape[1])
    if weight.device.type != "cpu":
        size *= 64
    return [slice(begin, begin + size) for begin in range(0, len(weight), size)]


def _panels_of_triangle(matrix: Square) -> Iterator[tuple[slice, slice, Bool[Tensor, "rows columns"]]]:
    """Yield for panels of rows, from the diagonal on: the rows, their numbers in the triangle, and their mask."""
    end = 0
    size = -(-len(matrix) // TRIANGLE_PANELS)
    if matrix.device.type != "cpu":
        size = max(size, PANEL_NUMBERS // len(matrix))
    for row in range(0, len(matrix), size):
        columns = len(matrix) - row
        mask = torch.ones(min(size, columns), columns, dtype=torch.bool, device=matrix.device).triu_()
        begin, end = end, end + len(mask) * (2 * columns - len(mask) + 1) // 2
        yield slice(row, row + len(mask)), slice(begin, end), mask


def _numpy_on_cpu(x: Tensor) -> Any:
    """Return a CPU's tensor as numpy's, which copies runs of a boolean index several times as fast as torch."""
    return x.numpy() if x.device.type == "cpu" else x
