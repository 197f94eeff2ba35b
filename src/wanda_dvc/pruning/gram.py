"""Gram matrices: XᵀX of a linear's input."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Shaped
from torch import Tensor

from wanda_dvc import kernels

Weight = Float[Tensor, "out in"]
Square = Float[Tensor, "in in"]
PANEL = 128  # rows of a Gram matrix that a CPU computes at a time
# Scores take rows in slices of about so many weights, which bounds memory. With fewer, threads wait for Python.
WEIGHTS_AT_A_TIME = 2**20


@dataclass
class Gram:
    """XᵀX over all tokens of one distinct input. Sums of several chunks merge.

    `add` multiplies the tokens of one call in float32 and sums calls in float64. Memory in bytes: 8 · in² for the sum.
    While tokens are added, on a CPU 12 · 128 · in, or 4 · tokens · in more with oneDNN; on a GPU 4 · in².
    """

    upper: Float64[Tensor, "in in"]  # on and above the diagonal; values below it are undefined

    @classmethod
    def empty(cls, features: int, device: torch.device | str = "cpu") -> "Gram":
        """Return the statistics of no tokens."""
        return cls(torch.zeros(features, features, dtype=torch.float64, device=device))

    def add(self, x: Float[Tensor, "tokens in"]) -> None:
        """Add the tokens of one or more windows."""
        features = (x if kernels.sums_in_float32(x) else x.float()).T
        if kernels.uses_onednn(features, features):  # the products below, of its row slices, are then faster
            features = features.contiguous()
        for begin, end in panels(self.upper):
            panel = kernels.multiply_in_float32(features[begin:end], features[begin:].T)
            self.upper[begin:end, begin:] += panel.to(self.upper.device)

    def merge(self, gram: "Gram") -> None:
        """Add another chunk's sums."""
        self.upper += gram.upper.to(self.upper)

    def matrix(self) -> Square:
        """Return XᵀX, symmetric, float32."""
        matrix = self.upper.float().triu_()
        return matrix.add_(matrix.triu(1).T)

    def triangle(self, norm: Float64[Tensor, " in"] | None = None) -> Float[Tensor, "rows columns"]:
        """Return G's upper triangle, float32, or of G_ij / (norm_i · norm_j), as a rectangle; 8 · in² bytes.

        The rectangle has the upper half of the triangle's rows. The other rows, transposed, fill the place below the
        diagonal; with an even number of features, the diagonal needs a further column.
        """
        features = len(self.upper)
        odd, half = features % 2, (features + 1) // 2
        packed = torch.zeros(half, features + 1 - odd, device=self.upper.device)
        packed[:, 1 - odd :] = self._scaled(slice(half), norm)
        packed[odd:, : features - half] += self._scaled(slice(half, features), norm).T
        return packed

    def _scaled(self, rows: slice, norm: Float64[Tensor, " in"] | None) -> Float[Tensor, "rows columns"]:
        """Return rows of the upper triangle from their first diagonal element on, float32, over both norms."""
        columns = slice(rows.start or 0, None)
        values = self.upper[rows, columns]
        if norm is not None:
            values = (values / norm[columns]).div_(norm[rows, None])
        return values.float().triu_()

    @classmethod
    def from_triangle(cls, packed: Shaped[Tensor, "rows columns"], norm: Float[Tensor, " in"] | None = None) -> "Gram":
        """Return the statistics of a triangle; `norm` undoes the division by it. 12 · in² bytes."""
        half, columns = packed.shape
        odd = int(2 * half > columns)
        features = 2 * half - odd
        upper = torch.zeros(features, features, device=packed.device)
        upper[:half] = packed[:, 1 - odd :].triu()
        upper[half:, half:] = packed[odd:, : features - half].tril().T
        if norm is not None:
            upper.mul_(norm).mul_(norm[:, None])
        return cls(upper.double())

    def scaled_triangle(self) -> tuple[Float[Tensor, " in"], Float[Tensor, "rows columns"]]:
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
