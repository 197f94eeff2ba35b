"""One linear alone: its weight and its inputs in, a new weight and a mask out."""

import torch
from jaxtyping import Float
from torch import Tensor

from wanda_dvc.catalog import Reconstruction
from wanda_dvc.pruning.gram import Gram, Square, Weight
from wanda_dvc.pruning.masks import MaskRule, choose_linear
from wanda_dvc.pruning.reconstruction import check_new_weight, masked, reconstruct
from wanda_dvc.pruning.solvers import GramFactors, Mask
from wanda_dvc.pruning.statistics import BlockStats, InputStats


@torch.no_grad()
def prune_weight(
    weight: Weight,
    rule: MaskRule,
    reconstruction: Reconstruction,
    *,
    inputs: Float[Tensor, "tokens in"] | None,
    gram: Square | None,
) -> tuple[Weight, Mask]:
    """Return a linear's new weight and its mask, from its inputs, or else from XᵀX of these.

    UserError for values that are not finite, or a pattern that does not fit.
    """
    name, features = "weight", weight.shape[1]
    if inputs is not None:
        stats, sums = InputStats.empty(features, inputs.device), Gram.empty(features, inputs.device)
        stats.add(inputs)
        sums.add(inputs)
        gram = sums.matrix()
    else:
        assert gram is not None
        squares = gram.diagonal().double()
        stats = InputStats(squares, torch.zeros_like(squares), count=1)
    factors = GramFactors(gram)
    x = factors if rule.method.needs == "gram" else stats
    mask = choose_linear(name, weight, x, BlockStats({name: stats}, {name: [name]}, []), rule).to(weight.device)
    if reconstruction.function is None:
        return masked(weight, mask), mask
    result = reconstruct(weight, mask, factors, reconstruction=reconstruction)
    return check_new_weight(name, result.weight.to(weight)), mask
