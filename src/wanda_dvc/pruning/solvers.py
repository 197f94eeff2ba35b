"""Solvers: compute masks, or weights on a mask, with a small layer error tr(ΔGΔᵀ), Δ = W − Ŵ, from a Gram matrix G.

Solvers compute in float32 on the weight's device, in slices of rows, or all rows at once if rows compete. Peak memory
in bytes: 4 · in² for G and for each factor (16 · in² during factorization), 8 · out · in for the result, and 40 per
weight of a slice.
"""

import math
from collections.abc import Callable
from fractions import Fraction
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from wanda_dvc.catalog import RECONSTRUCTIONS, parse_pattern
from wanda_dvc.errors import UserError
from wanda_dvc.kernels import multiply
from wanda_dvc.pruning.gram import Square, Weight, row_slices
from wanda_dvc.pruning.selection import count_removed, keep_highest, keep_n_of_m, select

Mask = Bool[Tensor, "out in"]  # True is kept
ROWS_AT_A_TIME = 256  # a slice fits a core's cache
SWEEP_PANEL = 128  # inputs of a panel of SparseGPT's sweep
DAMPING_GROWTH, FIRST_DAMPING = 10, 1e-4  # damping rises until G is positive definite, from 0 to the latter
LARGEST_DAMPING = 1e6
ADMM_PENALTY, ADMM_ITERATIONS, ADMM_DAMPING = 1.0, 15, 0.1  # ρ, updates of the mask, damping
OUTPUT_DAMPING = 1.0  # of Fisher least squares: of the Gram matrix of gradients, whose diagonal is scaled to 1


class GramFactors:
    """A Gram matrix G with its factors, each computed once for all linears that read the input.

    A feature is dead if no token excites it: G_jj = 0. Its diagonal value becomes the mean of the others. Its weights
    are pruned first; kept ones do not change, but SparseGPT's update zeroes them.

    Factors are those of G + λI, λ = damping · mean diagonal of G, with the damping raised until the factor exists.
    UserError if no damping makes it possible.
    """

    def __init__(self, gram: Square, name: str = "a linear", damping: float = 0.01) -> None:
        """Prepare XᵀX, symmetric and finite, of the input of a linear with this name."""
        self.name = f"Gram matrix of the input of {name}"
        self.damping = damping
        self.gram = gram.float().clone()
        self.dead = self.gram.diagonal() <= 0
        live = self.gram.diagonal()[~self.dead]
        self.mean = live.mean().item() if len(live) else 1.0
        self.gram[self.dead] = 0
        self.gram[:, self.dead] = 0
        self.gram.diagonal()[self.dead] = self.mean

    @cached_property
    def preconditioned(self) -> tuple[Square, Float[Tensor, " in"]]:
        """D(G + λI)D with a diagonal of 1, where D is diagonal; and the diagonal of D."""
        _, damping = _cholesky(self.gram, self.damping, self.mean, self.name)  # only its damping counts
        scale = (self.gram.diagonal() + damping * self.mean).rsqrt()
        matrix = self.gram * scale[:, None] * scale
        matrix.diagonal().fill_(1)
        return matrix, scale

    @cached_property
    def inverse_root(self) -> Square:
        """The upper R with RᵀR = (G + λI)⁻¹."""
        # Reversed, G = VVᵀ with V upper: R is V⁻¹, and G⁻¹ is never formed.
        lower, _ = _cholesky(self.gram.flip(0, 1), self.damping, self.mean, self.name)
        identity = torch.eye(len(lower), device=lower.device)
        inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
        return inverse.flip(0, 1).contiguous()  # row by row, as the sweep reads it; LAPACK's are column by column

    @cached_property
    def admm_inverse(self) -> Square:
        """ADMM's K = (DGD + (λ + ρ) I)⁻¹, where D scales G's diagonal to 1; λ starts from ADMM_DAMPING."""
        root_diagonal = self.gram.diagonal().sqrt()
        matrix = self.gram / root_diagonal[:, None] / root_diagonal
        matrix.diagonal().add_(ADMM_PENALTY)
        return factor_inverse(matrix, ADMM_DAMPING, 1.0, self.name)


def least_squares(
    weight: Weight, mask: Mask, factors: GramFactors, *, steps: int = RECONSTRUCTIONS["least-squares"].steps
) -> Weight:
    """Return weights V on a mask with a small tr((W−V)(G+λI)(W−V)ᵀ).

    Conjugate gradients with Jacobi's preconditioner, from the masked dense weights. A row keeps its dense values if its
    tr(ΔGΔᵀ) does not fall.
    """
    matrix, scale = factors.preconditioned

    def product(x: Tensor) -> Tensor:
        return multiply(x, matrix)

    new = torch.empty(weight.shape, device=weight.device)
    for rows in row_slices(weight, ROWS_AT_A_TIME):
        w = weight[rows].float()
        start = w * mask[rows]
        v = _conjugate_gradients(w / scale, mask[rows], start / scale, product, rows_are_coupled=False, steps=steps)
        new[rows] = better_rows(w, start, v.mul_(scale), factors)
    return new


def fisher_least_squares(
    weight: Weight, mask: Mask, factors: GramFactors, gradient_gram: Float[Tensor, "out out"] | None, *, steps: int
) -> Weight:
    """Return weights V on a mask with a small tr(F(W−V)(G+λI)(W−V)ᵀ), F the Gram matrix of the output's gradients.

    The trace estimates the increase of the loss (K-FAC, Martens and Grosse 2015, arXiv 1503.05671; for pruned LLMs
    van der Ouderaa et al. 2024, arXiv 2312.17244). `least_squares` treats outputs as equal and independent; here rows
    compensate for one another. F is scaled to a diagonal of 1, plus OUTPUT_DAMPING, because few windows measure F.

    Conjugate gradients for all rows together, from the weights of `least_squares`, which are the result without
    gradients. The step is shortened if tr(ΔGΔᵀ) would exceed the masked dense weights' error. Peak memory in bytes, in
    addition to the module's: 8 · out² for F, and 40 for each weight of the linear.
    """
    plain = least_squares(weight, mask, factors)
    if gradient_gram is None:
        return plain
    matrix, input_scale = factors.preconditioned
    # Scales F to a diagonal of 1; a row without gradients keeps its scale.
    row_scale = gradient_gram.diagonal().float().rsqrt().nan_to_num_(posinf=1.0)[:, None]
    coupled = gradient_gram * row_scale * row_scale.T
    coupled.diagonal().fill_(1 + OUTPUT_DAMPING)
    scale = row_scale * input_scale
    start = plain / scale

    def product(x: Tensor) -> Tensor:
        return multiply(coupled, multiply(x, matrix))

    solvable = mask & ~factors.dead  # weights of a dead feature compensate for nothing
    v = _conjugate_gradients(weight.float() / scale, solvable, start, product, rows_are_coupled=True, steps=steps)
    change = v.sub_(start).mul_(scale)
    step_size = _largest_step(weight.float(), weight * mask, plain, change, factors)
    if not step_size:  # the change may not be finite
        return plain
    return plain + step_size * change


def _largest_step(dense: Weight, masked: Weight, start: Weight, change: Weight, factors: GramFactors) -> float:
    """Return the largest step, up to 1, from `start` along a change; tr(ΔGΔᵀ) does not exceed `masked`'s.

    A step s changes the error by s² · square − 2s · along, with square = tr(CGCᵀ), along = tr(CG(W−start)ᵀ).
    """
    product = multiply(change, factors.gram)
    square = _sum_of_all(product * change).item()
    along = _sum_of_all(product * (dense - start)).item()
    if not 0 < square < math.inf:  # nor where sums overflow
        return 0.0
    margin = max(0.0, -_error_change(dense, masked, start, factors).double().sum().item())
    return min(1.0, (along + math.sqrt(along**2 + square * margin)) / square)


def sparsegpt(
    weight: Weight, factors: GramFactors, *, sparsity: Fraction, pattern: str = "unstructured", group: str = "row"
) -> Mask:
    """Return SparseGPT's mask. Frantar and Alistarh 2023, arXiv 2301.00774, algorithm 1.

    In panels of 128 inputs, the weights with the lowest W²/R_jj² are pruned, with RᵀR = (G + λI)⁻¹. Then, input by
    input, the inputs to the right compensate for the error. Weights compete within the panel's columns of a row, or in
    all rows of the panel if `group` is `linear`, as in the paper; the count up to each panel's end is exact. With n:m
    they compete within m neighbours, when the sweep reaches the first; a panel is then the largest multiple of m up to
    128, at least m.

    Deviation: exact counts instead of a threshold with its ties.
    """
    root = factors.inverse_root
    n_of_m = parse_pattern(pattern)

    def choose(score: Weight, begin: int) -> Mask:
        if n_of_m:
            return keep_n_of_m(score, *n_of_m)
        end = begin + score.shape[1]
        groups = score if group == "row" else score.reshape(1, -1)
        size = groups.shape[1]
        per_input = size // (end - begin)  # weights of a group at one input
        pruned = count_removed(per_input * end, sparsity) - count_removed(per_input * begin, sparsity)
        return keep_highest(groups, size - pruned).view(score.shape)

    mask = torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
    rows_compete = not n_of_m and group != "row"
    for rows in row_slices(weight, len(weight) if rows_compete else ROWS_AT_A_TIME):
        w = weight[rows].float().masked_fill(factors.dead, 0)
        _sweep(w, mask[rows], root, choose, n_of_m[1] if n_of_m else SWEEP_PANEL)
    return mask


def sparsegpt_update(weight: Weight, mask: Mask, factors: GramFactors) -> Weight:
    """Return the weights of SparseGPT's sweep on a fixed mask, as its authors do: dead features get zeros.

    A row's layer error can rise.
    """
    root = factors.inverse_root
    new = torch.empty(weight.shape, device=weight.device)
    for rows in row_slices(weight, ROWS_AT_A_TIME):
        w = weight[rows].float().masked_fill(factors.dead, 0)
        new[rows] = _sweep(w, mask[rows], root) * mask[rows]
    return new


def _sweep(
    weight: Weight, mask: Mask, root: Square, choose: Callable[[Weight, int], Mask] | None = None, at_a_time: int = 1
) -> Weight:
    """Return the weights of SparseGPT's sweep, which are valid on the mask.

    The mask is given, or written for some inputs `at_a_time`: `choose` returns it for the scores of these inputs and
    the number of the first one.
    """
    w = weight.T.contiguous()  # [in, out]: an input's weights lie together
    size = max(1, SWEEP_PANEL // at_a_time) * at_a_time
    for begin in range(0, len(w), size):
        end = min(begin + size, len(w))
        panel = w[begin:end]
        panel_mask = mask[:, begin:end].T.contiguous()
        diagonal = root.diagonal()[begin:end, None]
        errors = torch.empty_like(panel)
        for j in range(end - begin):
            if choose and j % at_a_time == 0:
                score = (panel[j : j + at_a_time] / diagonal[j : j + at_a_time]).square_().T.contiguous()
                panel_mask[j : j + at_a_time] = choose(score, begin + j).T
            torch.div(panel[j].masked_fill(panel_mask[j], 0), diagonal[j], out=errors[j])
            panel[j:].addr_(root[begin + j, begin + j : end], errors[j], alpha=-1)
        w[end:].addmm_(root[begin:end, end:].T, errors, alpha=-1)
        if choose:
            mask[:, begin:end] = panel_mask.T
    return w.T


def admm(
    weight: Weight, factors: GramFactors, *, sparsity: Fraction, pattern: str = "unstructured", group: str = "row"
) -> Mask:
    """Return the mask of ADMM with a growing mask. Boža 2024, arXiv 2401.02938.

    Inputs are scaled so that G's diagonal is 1, and damped. With K = (G+ρI)⁻¹, ρ the penalty: Z = (W+U) on the mask,
    U ← W + U − Z, W ← K(GW₀ + ρ(Z − U)), which is W₀ + ρK(Z − U − W₀). For 15 iterations the mask keeps the highest
    |W+U| at sparsity s − s(1 − t/15)³. The paper's further iterations change only weights. With n:m the n highest of m
    neighbours are always kept; the iteration's sparsity determines how many of the rest are pruned.
    """
    inverse = factors.admm_inverse
    root_diagonal = factors.gram.diagonal().sqrt()
    n_of_m = parse_pattern(pattern)
    if n_of_m:
        sparsity, group = 1 - Fraction(*n_of_m), "row"
    mask = torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
    for rows in row_slices(weight, ROWS_AT_A_TIME if group == "row" else len(weight)):
        dense = weight[rows].float().masked_fill(factors.dead, 0) * root_diagonal
        total = dense.clone()  # W + U
        step = torch.empty_like(dense)  # Z − U − W₀
        pruned = torch.zeros_like(dense)  # 1 where pruned, else 0
        sign = torch.ones_like(dense)  # −1 where pruned, else 1
        for iteration in range(1, ADMM_ITERATIONS + 1):
            growth = 1 - (1 - Fraction(iteration, ADMM_ITERATIONS)) ** 3
            score = total.abs()
            if n_of_m:
                score.masked_fill_(keep_n_of_m(score, *n_of_m), torch.inf)
            mask[rows] = select(score, sparsity=growth * sparsity, group=group)
            if iteration == ADMM_ITERATIONS:
                break
            # Masks as numbers: on a CPU, torch multiplies 50 times as fast as it selects by a boolean.
            pruned.copy_(~mask[rows])
            torch.sub(1, pruned, alpha=2, out=sign)
            # Z is the total on the mask, and U the total off it.
            torch.mul(total, sign, out=step).sub_(dense)
            total.mul_(pruned).add_(dense).add_(multiply(step, inverse), alpha=ADMM_PENALTY)
    return mask


def _cholesky(matrix: Square, damping: float, mean: float, name: str) -> tuple[Square, float]:
    """Return the lower factor of matrix + damping · mean · I, and the damping, raised until the factor exists."""
    while damping <= LARGEST_DAMPING:
        damped = matrix.clone()
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            return lower, damping
        damping = max(DAMPING_GROWTH * damping, FIRST_DAMPING)
    raise UserError(f"{name}: it cannot be factored with any damping; calibrate on more or other text")


def _conjugate_gradients(
    dense: Weight, mask: Mask, start: Weight, product: Callable[[Weight], Weight], *, rows_are_coupled: bool, steps: int
) -> Weight:
    """Minimize Σ (W−V) · A(W−V) on the mask, from `start`, and return V; `product` multiplies by the symmetric A.

    Each row is a problem of its own, with its own step lengths, unless A couples the rows.
    """

    def inner(a: Weight, b: Weight) -> Tensor:
        products = a * b
        return _sum_of_all(products) if rows_are_coupled else products.sum(dim=1, keepdim=True)

    kept = mask.float()
    v = start.clone()
    residual = product(dense - v).mul_(kept)
    direction = residual.clone()
    residual_square = inner(residual, residual)
    for _ in range(steps):
        image = product(direction)  # A · direction
        curvature = inner(direction, image)
        step = torch.where(curvature > 0, residual_square / curvature, 0)
        v.addcmul_(step, direction)
        residual.addcmul_(image.mul_(kept), step, value=-1)
        before = residual_square
        residual_square = inner(residual, residual)
        direction.mul_(torch.where(before > 0, residual_square / before, 0)).add_(residual)
    return v


def factor_inverse(matrix: Square, damping: float, mean: float, name: str) -> Square:
    """Return (matrix + damping · mean · I)⁻¹, with the damping raised until the matrix is positive definite."""
    lower, _ = _cholesky(matrix, damping, mean, name)
    return torch.cholesky_inverse(lower)


def better_rows(dense: Weight, start: Weight, new: Weight, factors: GramFactors) -> Weight:
    """Return the new rows, or those of `start` where the error is not lower."""
    return torch.where(_error_change(dense, start, new, factors) < 0, new, start)


def _error_change(dense: Weight, before: Weight, after: Weight, factors: GramFactors) -> Float[Tensor, "out 1"]:
    """Return by how much each row's tr(ΔGΔᵀ) grows from the weights `before` to those `after`."""
    # In one product, so that no digits cancel: aGaᵀ − bGbᵀ = (a − b)G(a + b)ᵀ, a = dense − after, b = dense − before.
    return multiply(before - after, factors.gram).mul_(2 * dense - before - after).sum(dim=1, keepdim=True)


def _sum_of_all(x: Weight) -> Float64[Tensor, ""]:
    """Return the sum, row by row, in an order independent of the number of threads."""
    return x.sum(dim=1).double().sum()
