"""Solvers: compute masks and weights with a small layer error tr(ΔGΔᵀ), Δ = W − Ŵ, from a linear's Gram matrix G.

On the host, matrix products and single-threaded LAPACK calls on panels of 128 rows compute the factors of G. LAPACK's
last digits depend on the number of threads. Products do not if all sizes are multiples of 64, as in most models. For
such models, masks and weights do not depend on the number of threads.

Solvers compute in float32 on the weight's device. Each solves all rows of a linear at once, or slices of rows if rows
do not compete. Peak memory in bytes: 4 · in² for G and for each factor (16 · in² during factorization), 8 · out · in
for the result, and 40 per weight of a slice. A slice has 256 rows (16,384 on an accelerator), or all rows if the linear
is one group.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache, partial

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from wanda_dvc.catalog import parse_pattern
from wanda_dvc.errors import UserError
from wanda_dvc.kernels import add_product, multiply
from wanda_dvc.pruning.gram import PANEL, Square, Weight
from wanda_dvc.pruning.selection import keep_highest, keep_n_of_m, removed, select

Keep = Bool[Tensor, "out in"]  # True stays
Product = Callable[[Weight], Weight]
Sum = Callable[[Weight], Tensor]  # the sum over each independent problem
Solve = Callable[[Weight, slice], tuple[Tensor, Tensor]]  # some rows' weights, and the rows → a mask and weights
ROWS_AT_A_TIME = 256  # a slice fits a core's cache; accelerators take larger slices
RAISE, FIRST_RAISE = 10, 1e-4  # growth factor of damping until G is positive definite, and the first value after 0
MOST_DAMPING = 1e6
PENALTY, ITERATIONS, GROWING = 1.0, 20, 15  # of ADMM; the mask grows in the first iterations


@dataclass(frozen=True)
class Factorization:
    """A factor or inverse of a Gram matrix, and the damping that made it possible."""

    matrix: Square
    scale: Float[Tensor, " in"]
    damping: float  # of the mean of G's diagonal
    raised: bool  # whether it is above the requested damping


class GramFactors:
    """A Gram matrix with its factors, each computed once for all linears that read the input.

    A feature is dead if no token excites it: G_jj = 0. Its diagonal value becomes the mean of the others, and it stays
    uncorrelated with them. Its weights are pruned first; kept ones do not change.
    """

    def __init__(self, gram: Square) -> None:
        """Prepare XᵀX, symmetric and finite."""
        self.gram = gram.float().clone()
        self.dead = self.gram.diagonal() <= 0
        live = self.gram.diagonal()[~self.dead]
        self.mean = live.mean().item() if len(live) else 1.0
        self.gram[self.dead] = 0
        self.gram[:, self.dead] = 0
        self.gram.diagonal()[self.dead] = self.mean
        self.preconditioned = cache(partial(_preconditioned, self.gram, self.mean))
        self.inverse_root = cache(partial(_inverse_root, self.gram, self.mean))
        self.inverse = cache(partial(_inverse, self.gram))


def _preconditioned(gram: Square, mean: float, damping: float) -> Factorization:
    """Return SGS, its diagonal 1, and S: G is damped, and S is the inverse root of its diagonal."""
    _, used = _cholesky(gram, damping, mean)
    scale = (gram.diagonal() + used * mean).rsqrt()
    matrix = gram * scale[:, None] * scale
    matrix.diagonal().fill_(1)
    return Factorization(matrix, scale, used, used > damping)


def _inverse_root(gram: Square, mean: float, damping: float) -> Factorization:
    """Return the upper U with UᵀU = (G + λI)⁻¹, λ = damping · mean diagonal; the scale is U's diagonal."""
    # Reversed, G = VVᵀ with V upper: U is V⁻¹, and G⁻¹ is never formed.
    lower, used = _cholesky(gram.flip(0, 1), damping, mean)
    root = _inverse_of_lower(lower).flip(0, 1)
    return Factorization(root, root.diagonal().clone(), used, used > damping)


def _inverse(gram: Square, damping: float, penalty: float) -> Factorization:
    """Return (SGS + (damping + penalty) I)⁻¹ and S⁻¹; S scales G's diagonal to 1."""
    scale = gram.diagonal().sqrt()
    matrix = gram / scale[:, None] / scale
    matrix.diagonal().add_(penalty)
    inverse, used = factor_inverse(matrix, damping, 1.0)
    return Factorization(inverse, scale, used, used > damping)


@dataclass(frozen=True)
class SolverResult:
    """A linear's mask and weights, and solver diagnostics."""

    keep: Keep
    weight: Weight  # zero off the mask
    unchanged: int  # rows that keep their start, because the solver's error is not lower
    dead: int  # features that no token excites
    damping: float  # that was used
    raised: bool  # whether G needed more than the requested damping to be positive definite
    part: float | None = None  # step from least squares to Fisher least squares, 0 to 1; None: another solver

    @property
    def diagnostics(self) -> dict[str, float]:
        """The diagnostics that apply to the solver; no tensors."""
        return {name: x for name, x in vars(self).items() if name not in ("keep", "weight") and x is not None}


def least_squares(
    weight: Weight, keep: Keep, prepared: GramFactors, *, steps: int = 10, damping: float = 0.01
) -> SolverResult:
    """Return weights V on a mask with a small tr((W−V)(G+λI)(W−V)ᵀ), λ = damping · mean diagonal of G.

    Conjugate gradients for all rows at once with Jacobi's preconditioner, from the masked dense weights.
    Damping pulls weights towards the dense ones. A row keeps its start if its tr(ΔGΔᵀ) does not fall.
    """
    factor = prepared.preconditioned(damping)
    solved, unchanged = torch.empty(weight.shape, device=weight.device), 0
    for rows in _slices(weight):
        w, mask = weight[rows].float(), keep[rows]
        first = w * mask
        scaled = w / factor.scale, mask, first / factor.scale
        v = _conjugate_gradients(*scaled, lambda x: multiply(x, factor.matrix), _by_row, steps)
        unchanged += keep_better_rows(w, first, v.mul_(factor.scale), prepared, solved[rows])
    return SolverResult(keep, solved, unchanged, int(prepared.dead.sum()), factor.damping, factor.raised)


def fisher_least_squares(
    weight: Weight,
    keep: Keep,
    prepared: GramFactors,
    gradients: Float[Tensor, "out out"] | None,
    *,
    steps: int,
    damping: float = 0.01,
    output_damping: float = 1.0,
) -> SolverResult:
    """Return weights V on a mask with a small tr(S(W−V)(G+λI)(W−V)ᵀ), S the Gram matrix of the output's gradients.

    The trace estimates the increase of the loss (K-FAC, Martens and Grosse 2015, arXiv 1503.05671; for pruned LLMs
    van der Ouderaa et al. 2024, arXiv 2312.17244). `least_squares` treats outputs as equal and independent; here rows
    compensate for one another. S is scaled to a diagonal of 1, plus `output_damping`, because few windows measure S.

    Conjugate gradients for all rows together, from the weights of `least_squares`. The step is shortened if tr(ΔGΔᵀ)
    would exceed the masked dense weights' error. Without gradients, as in an expert without tokens, the weights do not
    change. Peak memory in bytes, in addition to the module's figures: 8 · out² for S, and 40 for each weight of the
    linear, which has no slices.
    """
    plain = least_squares(weight, keep, prepared, damping=damping)
    if gradients is None:
        return replace(plain, part=0.0)
    factor = prepared.preconditioned(damping)
    root = gradients.diagonal().float().rsqrt().nan_to_num_(posinf=1.0)[:, None]  # a row without gradients counts as 1
    coupled = gradients * root * root.T
    coupled.diagonal().fill_(1 + output_damping)
    scale = root * factor.scale
    start = plain.weight / scale

    def across(x: Tensor) -> Tensor:
        return multiply(coupled, multiply(x, factor.matrix))

    alive = keep & ~prepared.dead  # weights of a dead feature compensate for nothing
    v = _conjugate_gradients(weight.float() / scale, alive, start, across, _of_all, steps)
    change = torch.where(prepared.dead, 0, v.sub_(start).mul_(scale))
    part = _part_of_the_way(weight.float(), weight * keep, plain.weight, change, prepared)
    if not part:  # nor where sums overflow
        return replace(plain, part=0.0)
    found = plain.weight + part * change
    unchanged = int((found == weight * keep).all(dim=1).sum())
    return replace(plain, weight=found, unchanged=unchanged, part=part)


def _part_of_the_way(dense: Weight, masked: Weight, start: Weight, change: Weight, prepared: GramFactors) -> float:
    """Return the largest step, up to 1, from `start` along a change; tr(ΔGΔᵀ) does not exceed `masked`'s."""
    toward = multiply(change, prepared.gram)
    square, along = _of_all(toward * change).item(), _of_all(toward * (dense - start)).item()
    room = max(0.0, -_gain(dense, masked, start, prepared).double().sum().item())
    return min(1.0, (along + math.sqrt(along**2 + square * room)) / square) if square > 0 else 0.0


def sparsegpt(
    weight: Weight,
    prepared: GramFactors,
    *,
    sparsity: Fraction = Fraction(0),
    pattern: str = "unstructured",
    group: str = "row",
    damping: float = 0.01,
    block: int = 128,
    given: Keep | None = None,
) -> SolverResult:
    """Return SparseGPT's mask and weights. Frantar and Alistarh 2023, arXiv 2301.00774, algorithm 1.

    In blocks of 128 inputs, the weights with the lowest W²/U_jj² are pruned. Then, input by input, the inputs to the
    right compensate for the error. Weights compete within the block's part of a row, or in all rows of the block where
    `group` is `linear`, as in the paper; the count up to each block's end is exact. With n:m they compete within m
    neighbours, when the sweep reaches the first; a block is then the largest multiple of m up to 128, at least m. A
    `given` mask is used as it is.

    Deviations: exact counts instead of a threshold with its ties; kept weights of dead features are not zeroed.
    """
    factor = prepared.inverse_root(damping)
    n_of_m = parse_pattern(pattern)
    block = max(1, block // n_of_m[1]) * n_of_m[1] if n_of_m else block

    def solve(w: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        w = w.T.contiguous()  # [in, out]: an input's weights lie together
        keep = torch.empty_like(w, dtype=torch.bool) if given is None else given[rows].T.contiguous()
        for begin in range(0, len(w), block):
            end = min(begin + block, len(w))
            some, diagonal = w[begin:end], factor.scale[begin:end, None]
            if given is None and not n_of_m:
                score = (some / diagonal).square_().T.contiguous()
                keep[begin:end] = _keep_in_block(score, begin, end, sparsity, group).T
            errors = torch.empty_like(some)
            for j in range(end - begin):
                if n_of_m and j % n_of_m[1] == 0:
                    near = slice(j, j + n_of_m[1])
                    score = (some[near] / diagonal[near]).square_().T.contiguous()
                    keep[begin:end][near] = keep_n_of_m(score, *n_of_m).T
                torch.div(some[j].masked_fill(keep[begin + j], 0), diagonal[j], out=errors[j])
                some[j:].addr_(factor.matrix[begin + j, begin + j : end], errors[j], alpha=-1)
            w[end:].addmm_(factor.matrix[begin:end, end:].T, errors, alpha=-1)
        return keep.T, w.T

    return _choose(weight, prepared, factor, solve, together=not n_of_m and group != "row")


def sparsegpt_update(weight: Weight, keep: Keep, prepared: GramFactors) -> SolverResult:
    """Return the weights of SparseGPT's sweep on a given mask; on SparseGPT's own mask, SparseGPT's weights."""
    return sparsegpt(weight, prepared, given=keep)


def _keep_in_block(score: Weight, begin: int, end: int, sparsity: Fraction, group: str) -> Keep:
    """Keep the highest scores of a block; with the blocks before it, ⌊size · share⌋ of each group are pruned."""
    rows = score if group == "row" else score.reshape(1, -1)
    each = rows.shape[1] // (end - begin)  # weights of a group at one input
    go = removed(each * end, sparsity) - removed(each * begin, sparsity)
    return keep_highest(rows, rows.shape[1] - go).view(score.shape)


def admm(
    weight: Weight,
    prepared: GramFactors,
    *,
    sparsity: Fraction,
    pattern: str = "unstructured",
    group: str = "row",
    damping: float = 0.1,
) -> SolverResult:
    """Return the mask and weights of ADMM with a growing mask. Boža 2024, arXiv 2401.02938.

    Inputs are scaled so that G's diagonal is 1, and damped. With K = (G+ρI)⁻¹, ρ the penalty: Z = (W+U) on the mask,
    U ← W + U − Z, W ← K(GW₀ + ρ(Z − U)), which is W₀ + ρK(Z − U − W₀). For the first 15 iterations the mask keeps the
    highest |W+U| at sparsity s − s(1 − (t+1)/15)³, then it is fixed. The result is Z. With n:m the n highest of m
    neighbours always stay; the iteration's sparsity determines how many others are pruned.
    """
    factor = prepared.inverse(damping, PENALTY)
    if n_of_m := parse_pattern(pattern):
        sparsity, group = 1 - Fraction(*n_of_m), "row"

    def solve(w: Tensor, _: slice) -> tuple[Tensor, Tensor]:
        dense, keep = w * factor.scale, torch.ones_like(w, dtype=torch.bool)
        total, towards = dense.clone(), torch.empty_like(dense)  # W + U, and Z − U − W₀
        off, sign = torch.zeros_like(dense), torch.ones_like(dense)
        for iteration in range(ITERATIONS):
            if iteration < GROWING:
                part = 1 - (1 - Fraction(iteration + 1, GROWING)) ** 3
                score = total.abs()
                if n_of_m:
                    score.masked_fill_(keep_n_of_m(score, *n_of_m), torch.inf)
                keep = select(score, sparsity=part * sparsity, group=group)
                # Masks as numbers: on a CPU, torch multiplies 50 times as fast as it selects by a boolean.
                off.copy_(~keep)
                torch.sub(1, off, alpha=2, out=sign)
            # Z is the total on the mask, and U the total off it.
            torch.mul(total, sign, out=towards).sub_(dense)
            add_product(total.mul_(off).add_(dense), towards, factor.matrix, alpha=PENALTY)
        return keep, total.div_(factor.scale)

    return _choose(weight, prepared, factor, solve, together=group != "row")


def corrected_target(
    weight: Weight, prepared: GramFactors, cross: Square, *, strength: float = 1.0, damping: float = 0.01
) -> Weight:
    """Return target weights for a solver: with them, pruned inputs give the dense outputs.

    W̃ = W + αW(C − G)(G + λI)⁻¹, with G of the pruned inputs, C = X_denseᵀ X_pruned over the same tokens, α the
    strength and λ = damping · mean diagonal of G. At α = 1 it minimizes ‖WX_dense − W̃X_pruned‖² + λ‖W̃ − W‖². For λ = 0
    this is GPTAQ's W(I + α(CG⁻¹ − I)). Li et al. 2025, arXiv 2504.02692. Weights of dead features keep their value.
    The damping in effect is reported by `prepared.inverse_root(damping)`.
    """
    factor = prepared.inverse_root(damping)
    off = weight.float() @ (cross.float() - prepared.gram).masked_fill_(prepared.dead, 0)
    return weight + strength * (off @ factor.matrix.T @ factor.matrix)


def _cholesky(matrix: Square, damping: float, unit: float) -> tuple[Square, float]:
    """Return the lower factor of matrix + damping · unit · I, and the damping, raised until the factor exists.

    UserError where damping a million times the diagonal does not help.
    """
    while damping <= MOST_DAMPING:
        damped = matrix.clone()
        damped.diagonal().add_(damping * unit)
        lower = _lower(damped)
        if lower is not None:
            return lower, damping
        damping = max(RAISE * damping, FIRST_RAISE)
    raise UserError("Gram matrix: it cannot be factored with any damping; calibrate on more or other text")


def _lower(matrix: Square) -> Square | None:
    """Return L with LLᵀ = matrix, which is overwritten; None where it is not positive definite."""
    for begin, end in _panels(matrix):
        panel, before = matrix[begin:, begin:end], matrix[begin:, :begin]
        if begin:
            panel -= multiply(before, before[: end - begin].T)
        with _one_thread():
            corner, failed = torch.linalg.cholesky_ex(panel[: end - begin])
        if failed:
            return None
        if end < len(matrix):
            panel[end - begin :] = multiply(panel[end - begin :], _inverse_of_lower(corner).T)
        panel[: end - begin] = corner
    return matrix.tril_()


def _inverse_of_lower(lower: Square) -> Square:
    inverse = torch.zeros_like(lower)
    for begin, end in _panels(lower):
        own = lower[begin:end, begin:end]
        with _one_thread():
            own = torch.linalg.solve_triangular(own, torch.eye(len(own), device=own.device), upper=False)
        inverse[begin:end, begin:end] = own
        if begin:
            left = multiply(lower[begin:end, :begin], inverse[:begin, :begin])
            inverse[begin:end, :begin] = multiply(own, left).neg_()
    return inverse


def _panels(matrix: Square) -> Iterator[tuple[int, int]]:
    """Yield the bounds of each panel; on an accelerator one panel covers all."""
    size = PANEL if matrix.device.type == "cpu" else len(matrix)
    return ((begin, min(begin + size, len(matrix))) for begin in range(0, len(matrix), size))


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _conjugate_gradients(dense: Weight, keep: Keep, start: Weight, product: Product, total: Sum, steps: int) -> Weight:
    """Minimize Σ (W−V) · A(W−V) on the mask, from `start`, and return V; `product` is the symmetric A.

    `total` sums over each independent problem: `_by_row` over each row, `_of_all` over the linear.
    """
    mask, v = keep.float(), start.clone()
    residual = product(dense - v).mul_(mask)
    direction, size = residual.clone(), total(residual.square())
    for _ in range(steps):
        change = product(direction)
        curvature = total(direction * change)
        step = torch.where(curvature > 0, size / curvature, 0)
        v.addcmul_(step, direction)
        residual.addcmul_(change.mul_(mask), step, value=-1)
        before, size = size, total(residual.square())
        direction.mul_(torch.where(before > 0, size / before, 0)).add_(residual)
    return v


def factor_inverse(matrix: Square, damping: float, unit: float) -> tuple[Square, float]:
    """Return (matrix + damping · unit · I)⁻¹, and the damping, raised until the matrix is positive definite."""
    lower, used = _cholesky(matrix, damping, unit)
    root = _inverse_of_lower(lower)
    inverse = torch.empty_like(root)
    for begin, end in _panels(root):
        part = multiply(root[begin:, begin:end].T, root[begin:, begin:])
        inverse[begin:end, begin:] = part
        inverse[begin:, begin:end] = part.T
    return inverse, used


def _choose(
    weight: Weight, prepared: GramFactors, factor: Factorization, solve: Solve, *, together: bool
) -> SolverResult:
    """Solve slices of rows, or all rows if `together`: `solve` returns a mask and weights, read on the mask only."""
    keep = torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
    solved, unchanged = torch.empty(weight.shape, device=weight.device), 0
    for rows in _slices(weight, together):
        w = weight[rows].float()
        keep[rows], v = solve(w.masked_fill(prepared.dead, 0), rows)
        v = torch.where(prepared.dead, w, v) * keep[rows]
        unchanged += keep_better_rows(w, w * keep[rows], v, prepared, solved[rows])
    return SolverResult(keep, solved, unchanged, int(prepared.dead.sum()), factor.damping, factor.raised)


def keep_better_rows(dense: Weight, start: Weight, found: Weight, prepared: GramFactors, into: Weight) -> int:
    """Write the solved rows, or `start` where their error is not lower; return the number of rows at `start`."""
    lower = _gain(dense, start, found, prepared) < 0
    into.copy_(torch.where(lower, found, start))
    return int((~lower).sum())


def _gain(dense: Weight, start: Weight, found: Weight, prepared: GramFactors) -> Float[Tensor, "out 1"]:
    """Return each row's tr(ΔGΔᵀ) minus the tr(ΔGΔᵀ) of `start`."""
    # The difference of two errors in one product, so that no digits cancel: dGdᵀ − eGeᵀ = (d − e)G(d + e)ᵀ.
    return multiply(start - found, prepared.gram).mul_(2 * dense - start - found).sum(dim=1, keepdim=True)


def _by_row(x: Weight) -> Float[Tensor, "out 1"]:
    return x.sum(dim=1, keepdim=True)


def _of_all(x: Weight) -> Float64[Tensor, ""]:
    """Return the sum, row by row, in an order independent of the number of threads."""
    return x.sum(dim=1).double().sum()


def _slices(weight: Weight, together: bool = False) -> Iterator[slice]:
    rows = len(weight)
    size = rows if together else ROWS_AT_A_TIME * (1 if weight.device.type == "cpu" else 64)
    return (slice(begin, begin + size) for begin in range(0, rows, size))
