"""Units that are removed completely: the choice of those that stay, and the best values of the weights that stay.

A unit is some inputs of one linear, its reader: a neuron is one input of the MLP's last linear, a group of heads some
neighbouring inputs of attention's last linear. Without its inputs a unit has no effect, so the weights that compute it
can go too.
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from wanda_dvc.kernels import multiply
from wanda_dvc.pruning.gram import Square, Weight
from wanda_dvc.pruning.solvers import GramFactors, Keep, SolverResult, factor_inverse, keep_better_rows

TOGETHER = 16  # inputs of units that go at once, before the costs of the others are computed again
SIXTEENTH = 16  # a rounded width differs from the exact one by at most half of a 16th of the width


class Units(NamedTuple):
    """A set of units, and how many stay: inputs of the linear that reads them, or complete linears."""

    total: int
    stay: int
    layout: tuple[int, ...] = (1,)  # inputs of a unit in each section of the inputs: units follow one another in it
    members: Sequence[Sequence[str]] = ()  # the linears of each unit: a block's, or an expert's; (): units are inputs
    groups: int = 1  # of neighbouring units: the same number stays in each


def stay_of(width: int, sparsity: Fraction, multiple: int) -> int:
    """Return the number of units that stay: the multiple nearest to width · (1 − share), at least one multiple.

    The multiple is `multiple`, a power of four, or for small widths the largest power of four that is at most a 16th of
    the width. All units stay at share 0.
    """
    if not sparsity:
        return width
    while multiple > max(1, width // SIXTEENTH):
        multiple //= 4
    return min(width, multiple * max(1, round(width * (1 - sparsity) / multiple)))


def unit_index(total: int, layout: Sequence[int]) -> Int[Tensor, " in"]:
    """Return the unit of each input."""
    return torch.cat([torch.arange(total).repeat_interleave(size) for size in layout])


def expand(stay: Bool[Tensor, " units"], layout: Sequence[int]) -> Bool[Tensor, " in"]:
    """Return which inputs stay."""
    return stay[unit_index(len(stay), layout).to(stay.device)]


def unit_scores(score: Float[Tensor, "out in"], units: Units) -> Float[Tensor, " units"]:
    """Return each unit's score: the sum of the scores of all weights that read it.

    Inputs are added one after another: the order of `index_add_` is not fixed on CUDA.
    """
    total, found = score.sum(dim=0, dtype=torch.float32), torch.zeros(units.total, device=score.device)
    for section in total.split([units.total * size for size in units.layout]):
        for inputs in section.view(units.total, -1).T:
            found += inputs
    return found


def neighbours(score: Float[Tensor, " units"], stay: int) -> Bool[Tensor, " units"]:
    """Keep `stay` units: the others follow one another, after the first unit, with the least sum of scores."""
    keep, gone = torch.ones_like(score, dtype=torch.bool), len(score) - stay
    first = 1 + int(score[1:].unfold(0, gone, 1).sum(dim=1).argmin()) if gone else 0
    keep[first : first + gone] = False
    return keep


def greedy_obs(weight: Weight, prepared: GramFactors, units: Units, *, damping: float = 0.01) -> Bool[Tensor, " units"]:
    """Remove the units that cost least if the weights that stay make up for them; return those that stay.

    With H = (G + λI)⁻¹, λ = damping · mean diagonal of G, and the unit's inputs J, the cost is tr(W_J (H_JJ)⁻¹ W_Jᵀ),
    for one input Σ_o w_oj² / H_jj: the rise of tr(ΔGΔᵀ) after least squares, as in OBS (Hassibi and Stork 1993). About
    16 inputs go at a time; then W −= W_J (H_JJ)⁻¹ H_J and H −= H_J (H_JJ)⁻¹ H_Jᵀ, and costs are computed again. Dead
    inputs cost nothing.

    Memory in bytes: 12 · in² and 8 · out · in.
    """
    root = prepared.inverse_root(damping).matrix
    inverse = multiply(root.T, root)
    w = weight.float().masked_fill(prepared.dead, 0)
    inputs = unit_index(units.total, units.layout).to(w.device).sort(stable=True).indices.view(units.total, -1)
    stay = torch.ones(units.total, dtype=torch.bool, device=w.device)
    at_a_time = max(1, TOGETHER // inputs.shape[1])
    while (left := int(stay.sum()) - units.stay) > 0:
        cost = _costs(w, inverse, inputs).masked_fill(~stay, torch.inf)
        lowest = cost.sort(stable=True).indices[: min(at_a_time, left)]
        stay[lowest] = False
        columns = inputs[lowest].flatten()
        rows = inverse[columns]
        solved = torch.linalg.solve(rows[:, columns], rows)
        w -= multiply(w[:, columns].contiguous(), solved)
        inverse -= multiply(rows.T.contiguous(), solved)
        w[:, columns] = 0
        inverse[columns] = 0
        inverse[:, columns] = 0
        inverse[columns, columns] = 1
    return stay


def _costs(weight: Weight, inverse: Square, inputs: Int[Tensor, "units size"]) -> Float[Tensor, " units"]:
    """Return tr(W_J (H_JJ)⁻¹ W_Jᵀ) of each unit's inputs J."""
    if inputs.shape[1] == 1:
        return (weight.square().sum(dim=0) / inverse.diagonal())[inputs[:, 0]]
    own = inverse[inputs[:, :, None], inputs[:, None, :]]  # [units, size, size]
    read = weight.T[inputs]  # [units, size, out]
    return (torch.linalg.solve(own, read) * read).sum(dim=(1, 2))


def least_squares(weight: Weight, keep: Keep, prepared: GramFactors, *, damping: float = 0.01) -> SolverResult:
    """Return the weights V with the least tr((W−V)(G+λI)(W−V)ᵀ) on a mask that keeps the same inputs in all rows.

    With r the removed inputs, k the others and λ = damping · mean diagonal of G: V_k = W_k + W_r G_rk (G_kk + λI)⁻¹.
    Rows without a kept weight stay 0. A row keeps its dense values if its tr(ΔGΔᵀ) does not fall.
    """
    stays, row = keep.any(dim=0), keep.any(dim=1)
    w = weight.float()
    start, dead = w * keep, int(prepared.dead.sum())
    if stays.all():
        return SolverResult(keep, start, len(w), dead, damping, False)
    inverse, used = factor_inverse(prepared.gram[stays][:, stays], damping, prepared.mean)
    across = multiply(w[:, ~stays].contiguous(), prepared.gram[~stays][:, stays].contiguous())
    found = start.clone()
    found[:, stays] += multiply(across, inverse)
    found[~row] = 0
    unchanged = keep_better_rows(w, start, found, prepared, into := torch.empty_like(start))
    return SolverResult(keep, into, unchanged, dead, used, used > damping)
