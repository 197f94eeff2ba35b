"""Units that are removed completely: the choice of the kept ones, and the best values of the kept weights.

A unit is some inputs of one linear, its consumer: a neuron is one input of the MLP's last linear, a group of heads some
neighbouring inputs of attention's last linear. The weights that compute these inputs are then removed too.
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from wanda_dvc.kernels import multiply
from wanda_dvc.pruning.gram import Weight
from wanda_dvc.pruning.solvers import GramFactors, Mask, better_rows, factor_inverse

MULTIPLES_OF_A_WIDTH = 16  # at least: a rounded width differs from the exact one by at most half of a 16th of the width


class Units(NamedTuple):
    """A set of units, and how many are kept: inputs of the linear that reads them, or complete linears."""

    total: int
    kept: int
    # A unit's number of inputs in each section of the inputs. With (2,) unit 0 is inputs 0 and 1; with (1, 1) it is the
    # first input of each half, as where gate and up are one matrix.
    layout: tuple[int, ...] = (1,)
    members: Sequence[Sequence[str]] = ()  # the linears of each unit: a block's, or an expert's; (): units are inputs
    groups: int = 1  # only with members: of neighbouring units; the same number is kept in each
    step: int = 1  # the number of kept units is a multiple of it, or the total


def step_of(width: int, multiple: int) -> int:
    """Return a multiple, divided by 4 until it is at most a 16th of the width."""
    while multiple > max(1, width // MULTIPLES_OF_A_WIDTH):
        multiple = max(1, multiple // 4)
    return multiple


def count_kept(total: int, sparsity: Fraction, step: int = 1) -> int:
    """Return the number of kept units: the multiple of the step nearest to total · (1 − sparsity), at least one step.

    Sparsity 0 keeps all.
    """
    return min(total, step * max(1, round(total * (1 - sparsity) / step))) if sparsity else total


def unit_index(total: int, layout: Sequence[int]) -> Int[Tensor, " in"]:
    """Return the unit of each input."""
    return torch.cat([torch.arange(total).repeat_interleave(size) for size in layout])


def expand(kept: Bool[Tensor, " units"], layout: Sequence[int]) -> Bool[Tensor, " in"]:
    """Return the mask of the inputs, given that of the units."""
    return kept[unit_index(len(kept), layout).to(kept.device)]


def unit_scores(score: Float[Tensor, "out in"], units: Units) -> Float[Tensor, " units"]:
    """Return each unit's score: the sum of the scores of all weights that read it.

    Inputs are added one after another: the order of `index_add_` is not fixed on CUDA.
    """
    input_scores = score.sum(dim=0, dtype=torch.float32)
    totals = torch.zeros(units.total, device=score.device)
    for section in input_scores.split([units.total * size for size in units.layout]):
        for scores in section.view(units.total, -1).T:
            totals += scores
    return totals


def least_squares_of_units(weight: Weight, mask: Mask, factors: GramFactors) -> Weight:
    """Return the weights V with the least tr((W−V)(G+λI)(W−V)ᵀ) on a mask of complete rows and complete inputs.

    With r the removed inputs and k the kept ones: V_k = W_k + W_r G_rk (G_kk + λI)⁻¹. A row keeps its dense values if
    its tr(ΔGΔᵀ) does not fall.
    """
    kept, kept_rows = mask.any(dim=0), mask.any(dim=1)
    w = weight.float()
    start = w * mask
    if kept.all():  # it reads no removed unit
        return start
    inverse = factor_inverse(factors.gram[kept][:, kept], factors.damping, factors.mean, factors.name)
    cross = multiply(w[:, ~kept].contiguous(), factors.gram[~kept][:, kept].contiguous())  # W_r G_rk
    solved = start.clone()
    solved[:, kept] += multiply(cross, inverse)
    solved[~kept_rows] = 0  # a row that computes a removed unit, of another set
    return better_rows(w, start, solved, factors)
