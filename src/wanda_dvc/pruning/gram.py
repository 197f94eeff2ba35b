"""Gram matrices: XᵀX of a linear's input, and the layer error computed from it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64, Shaped
from torch import Tensor

from wanda_dvc import kernels
from wanda_dvc.pruning.statistics import cast_like

Weight = Float[Tensor, "out in"]
Square = Float[Tensor, "in in"]
PANEL = 128  # rows of a Gram matrix computed at a time, or factored by LAPACK
# Scores and layer errors take rows in slices of about so many weights, which bounds memory. With smaller slices the
# threads wait for the interpreter.
WEIGHTS_AT_A_TIME = 2**20


@dataclass
class Gram:
    """XᵀX over all tokens of one distinct input. Sums of several chunks merge.

    `add` multiplies one window in float32 and sums windows in float64, in panels of 128 rows. Memory in bytes: 8 · in²
    for the sum, and while a window is added 12 · 128 · in, or 4 · tokens · in more where products go through oneDNN.
    """

    upper: Float64[Tensor, "in in"]  # on and above the diagonal; values below it are undefined
    count: int

    @classmethod
    def empty(cls, features: int, device: torch.device | str = "cpu") -> "Gram":
        """Return the statistics of no tokens."""
        return cls(torch.zeros(features, features, dtype=torch.float64, device=device), 0)

    def add(self, x: Float[Tensor, "tokens in"]) -> None:
        """Add one window."""
        features = x.float().T
        if kernels.uses_onednn(features, features):  # its row slices multiply faster so
            features = features.contiguous()
        for start in range(0, x.shape[1], PANEL):
            panel = kernels.multiply(features[start : start + PANEL], features[start:].T)
            self.upper[start : start + PANEL, start:] += cast_like(panel, self.upper)
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
        """Return the upper triangle by row, float32, every feature divided by `norm`; no second matrix is in memory."""
        features = len(self.upper)
        packed = torch.empty(features * (features + 1) // 2, device=self.upper.device)
        scale = torch.ones_like(self.upper[0]) if norm is None else norm
        for row, packed_row, row_scale in _rows_of_triangle(self.upper, packed, scale):
            packed_row[:] = row / row_scale / row_scale[0]
        return packed

    @classmethod
    def from_triangle(
        cls, packed: Shaped[Tensor, " packed"], count: int, norm: Float[Tensor, " in"] | None = None
    ) -> "Gram":
        """Return the statistics whose triangle this is, scaled if there is a norm, as exact as its dtype held them."""
        features = round((2 * len(packed) + 0.25) ** 0.5 - 0.5)
        upper = torch.zeros(features, features, dtype=torch.float64, device=packed.device)
        scale = torch.ones(features, device=packed.device) if norm is None else norm
        for row, packed_row, row_scale in _rows_of_triangle(upper, packed.float(), scale):
            row[:] = packed_row * row_scale * row_scale[0]
        return cls(upper, count)

    def scaled_triangle(self) -> tuple[Float[Tensor, " in"], Float[Tensor, " packed"]]:
        """Return ‖X_j‖₂, and the triangle with every feature divided by it: cosines, at most 1; 0 where dead."""
        norm = self.upper.diagonal().sqrt()
        return norm.float(), self.triangle(norm.where(norm > 0, 1))


def layer_errors(
    dense: Weight, pruned: Sequence[Weight], gram: Square, dead: Bool[Tensor, " in"] | None = None
) -> list[float]:
    """Return ‖(W−Ŵ)X‖² / ‖WX‖² = tr(ΔGΔᵀ) / tr(WGWᵀ) of each Ŵ.

    If all outputs of W are 0, it is 1 by convention, or 0 without error. G is zero at the `dead` features; solvers put
    other values there in `gram`.

    Products and sums are in float64, because ΔGΔᵀ is small where Δ lies in directions of low variance of X. Memory in
    bytes: 8 · in² for G and about 24 MiB for a slice of rows.
    """
    exact = gram.to(torch.float64, copy=True)
    if dead is not None:
        exact.diagonal()[dead] = 0
    rows_at_a_time = max(1, WEIGHTS_AT_A_TIME // gram.shape[0])
    errors = [0.0] * len(pruned)
    output = 0.0
    for begin in range(0, len(dense), rows_at_a_time):
        rows = slice(begin, begin + rows_at_a_time)
        w = dense[rows].double()
        output += _energy(w, exact)
        for index, weight in enumerate(pruned):
            errors[index] += _energy(w - weight[rows].double(), exact)
    errors = [max(error, 0.0) for error in errors]  # rounding gives negative errors
    return [error / output if output else float(error > 0) for error in errors]


def _energy(weight: Float64[Tensor, "out in"], gram: Float64[Tensor, "in in"]) -> float:
    return (weight @ gram).mul_(weight).sum().item()


def _rows_of_triangle(matrix: Tensor, packed: Tensor, scale: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield for each row, from the diagonal on, views of the matrix, of the packed triangle, and of a vector [in]."""
    begin = 0
    for row in range(len(matrix)):
        end = begin + len(matrix) - row
        yield matrix[row, row:], packed[begin:end], scale[row:]
        begin = end
