"""The masks of linears, and the choice of units, from weights and statistics."""

import math
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from wanda_dvc.catalog import STRUCTURES, Method, Reconstruction, parse_pattern
from wanda_dvc.errors import UserError
from wanda_dvc.pruning.gram import Gram, Weight, row_slices
from wanda_dvc.pruning.reconstruction import check_new_weight, masked, oriented, reconstruct
from wanda_dvc.pruning.selection import keep_highest, select
from wanda_dvc.pruning.solvers import GramFactors, Mask
from wanda_dvc.pruning.statistics import BlockStats, InputStats, UnitCosts
from wanda_dvc.pruning.units import Units, expand, unit_scores

BlockSparsity = Fraction | Mapping[str, Fraction]  # of all linears of a block, or of each


def linear_sparsity(sparsity: BlockSparsity, linear: str) -> Fraction:
    """Return the sparsity of one linear of a block."""
    return sparsity[linear] if isinstance(sparsity, Mapping) else sparsity


class MaskRule(NamedTuple):
    """How the masks of a block's linears are chosen."""

    method: Method
    sparsity: BlockSparsity  # the fraction that is removed
    pattern: str = "unstructured"
    group: str = "row"  # or `linear`; the group `outputs` is `linear` with `fisher`, of units also with `unit_costs`
    fisher: Mapping[str, Float64[Tensor, " out"]] = {}  # Σ of squared gradients, by linear
    unit_costs: Mapping[str, UnitCosts] = {}  # by linear; an expert without gradients has none
    # The units to remove, by the linear that reads them; a pattern of units keeps all weights of other linears.
    units: Mapping[str, Units] = {}


def choose_linear(
    linear: str, weight: Tensor, x: InputStats | GramFactors | None, stats: BlockStats, rule: MaskRule
) -> Tensor:
    """Return the mask of one linear, oriented as its weight is stored.

    `x` is the input's norms, or for a solver its Gram matrix, None without tokens. UserError if the pattern does not
    fit the linear, or a score is not finite.
    """
    if keeps_all(linear, rule.pattern, rule.units):
        return torch.ones(weight.shape, dtype=torch.bool)
    transposed = linear in stats.transposed
    weight = oriented(weight, transposed)
    features = weight.shape[1]
    n_of_m = parse_pattern(rule.pattern)
    if n_of_m and features % n_of_m[1]:
        mismatch = f"{linear} has {features} inputs, expected a multiple of {n_of_m[1]}"
        raise UserError(f"pattern: got {rule.pattern}, but {mismatch}; choose another m")
    if x is None:  # an expert without tokens
        x = GramFactors(Gram.empty(features).matrix(), linear)
    row_factors = None
    if linear in rule.fisher:
        row_factors = row_factors_of(rule.fisher[linear])
    units = rule.units.get(linear)
    if isinstance(x, GramFactors):
        weight = weight.to(x.gram.device)
        if row_factors is not None:  # a factor changes nothing within its row, only how the rows compete
            weight = weight.float() * row_factors.to(weight.device)[:, None]
        sparsity = linear_sparsity(rule.sparsity, linear)
        mask = rule.method(weight, x, sparsity=sparsity, pattern=rule.pattern, group=rule.group)
    elif units:
        score = unit_scores(scores_of(weight.contiguous(), x, rule.method, None, linear), units)
        # Half of a unit's cost estimates how much the loss rises without it (Molchanov et al. 2019, arXiv 1906.10771).
        # Its root times Wanda's score did better than either alone.
        if linear in rule.unit_costs:
            score *= rule.unit_costs[linear][units.total].sqrt().float().to(score.device)
        mask = expand(keep_highest(score[None], units.kept)[0], units.layout)
    else:
        mask = choose_by_score(weight, x, rule, row_factors, linear)
    return oriented(mask.expand(weight.shape), transposed).contiguous()  # a mask of inputs is that of each row


def keeps_all(linear: str, pattern: str, units: Mapping[str, Units]) -> bool:
    """Whether the pattern removes units, and none that this linear reads."""
    return pattern in STRUCTURES and linear not in units


def row_factors_of(fisher: Float[Tensor, " out"]) -> Float[Tensor, " out"]:
    """Return F^¼ over its mean, float32, or 1 if all F are 0: the factors of each row's scores in group `outputs`.

    `allocation` multiplies by √F: the square of that score estimates the increase of the loss. Here F^¼ did better.
    """
    row_factors = fisher.double() ** 0.25
    return (row_factors / row_factors.mean()).nan_to_num_(nan=1.0).float()


def choose_by_score(
    weight: Weight, x: InputStats, rule: MaskRule, row_factors: Float[Tensor, " out"] | None = None, linear: str = ""
) -> Mask:
    """Return the mask of the highest scores, on the weight's device; `row_factors` multiply the scores of each row.

    Rows that do not compete are scored in slices: memory does not grow with the linear.
    """
    sparsity = linear_sparsity(rule.sparsity, linear)
    by_row = rule.method.selects_by_row(rule.pattern, rule.group)
    mask = torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
    for rows in row_slices(weight, None if by_row else len(weight)):
        factors = None if row_factors is None else row_factors[rows]
        score = scores_of(weight[rows].contiguous(), x, rule.method, factors, linear)
        mask[rows] = select(score, sparsity=sparsity, pattern=rule.pattern, group=rule.group)
    return mask


def scores_of(
    weight: Weight, x: InputStats, method: Method, row_factors: Float[Tensor, " out"] | None, linear: str
) -> Float[Tensor, "out in"]:
    """Return a method's scores times the row factors. UserError if they are not finite, or of another shape."""
    score = method(weight, x.to(weight.device))
    if score.shape != weight.shape:
        problem = f"{method.function} returned {list(score.shape)}, expected the weight's {list(weight.shape)}"
        raise UserError(f"method {method.name}: {problem}; correct it")
    if score.dtype in (torch.bfloat16, torch.float16):  # numpy has no bfloat16
        score = score.float()
    if row_factors is not None:
        score = score * row_factors.to(score)[:, None]
    if not torch.stack(score.aminmax()).isfinite().all():
        problem = f"scores of method {method.name} that are not finite: weights or activations overflow"
        raise UserError(f"{linear}: {problem}; set dtype=float32 or bfloat16")
    return score


def choose_units(
    sets: Mapping[str, Units], blocks: Iterable[BlockStats], method: Method
) -> dict[str, Bool[Tensor, " units"]]:
    """Return the mask of each set's experts by their scores: the highest are kept. UserError if one is not finite."""
    scores: dict[str, list[float]] = {name: [] for name in sets}
    for stats in blocks:
        inputs = stats.by_linear
        for name, units in sets.items():
            for linears in units.members:
                if linears[0] in inputs:  # else they are of another block
                    tokens = max(inputs[linear].count for linear in linears)
                    scores[name].append(_expert_score(linears, tokens, stats, method))
    masks = {}
    for name, units in sets.items():
        groups = torch.tensor(scores[name], dtype=torch.float32).view(units.groups, -1)
        masks[name] = keep_highest(groups, units.kept // units.groups).flatten()
    return masks


def _expert_score(linears: Sequence[str], tokens: int, stats: BlockStats, method: Method) -> float:
    """Return a method's score of an expert that got some tokens. UserError if the model's gates were not recorded."""
    recorded = [stats.outputs[linear] for linear in linears if linear in stats.outputs]
    gates = sum(outputs.count for outputs in recorded)
    if gates != tokens:  # one linear has the gated outputs of all tokens
        raise UserError(
            f"pattern: {linears[0]}: calibration recorded {gates} gates for {tokens} tokens of this expert, expected "
            "as many: experts of this family cannot be scored; set pattern=neurons or heads"
        )
    score = float(method(recorded[0])) if tokens else 0.0
    if not math.isfinite(score):
        problem = "the score of its unit is not finite: weights or activations overflow; set dtype=float32"
        raise UserError(f"{linears[0]}: {problem}")
    return score


@torch.no_grad()
def prune_weight(
    weight: Weight, inputs: Tensor | None, gram: Tensor | None, rule: MaskRule, reconstruction: Reconstruction
) -> tuple[Weight, Mask]:
    """Return a linear's new weight and its mask, from its inputs, [tokens, in], or else from XᵀX of these, [in, in].

    UserError for other shapes, values that are not finite, or a pattern that does not fit.
    """
    stats = None
    if inputs is not None:
        sums = Gram.empty(inputs.shape[-1], inputs.device)
        sums.add(inputs)
        gram, stats = sums.matrix(), InputStats.empty(inputs.shape[-1], inputs.device)
        stats.add(inputs)
    assert gram is not None  # the caller has one of them
    features = weight.shape[1]
    if gram.shape != (features, features) or not gram.isfinite().all():
        raise UserError(
            f"inputs, gram: found shape {list(gram.shape)} of XᵀX, or values that are not finite, expected finite "
            f"inputs [tokens, {features}], or XᵀX of these; remove tokens that are not finite"
        )
    name = "weight"
    if stats is None:  # XᵀX says nothing of the sum of the tokens, nor of their number
        squares = gram.diagonal().double()
        stats = InputStats(squares, torch.zeros_like(squares), count=1)
    factors = GramFactors(gram)
    x = factors if rule.method.is_solver else stats
    mask = choose_linear(name, weight, x, BlockStats({name: stats}, {name: [name]}, []), rule).to(weight.device)
    if reconstruction.function is None:
        return masked(weight, mask), mask
    new = reconstruct(weight, mask, factors, reconstruction=reconstruction)
    return check_new_weight(name, new.to(weight)), mask
