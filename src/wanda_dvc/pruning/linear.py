"""One linear alone: its weight and its inputs in, a new weight and a mask out."""

import torch
from torch import Tensor

from wanda_dvc.catalog import Reconstruction
from wanda_dvc.errors import UserError
from wanda_dvc.pruning.gram import Gram, Weight
from wanda_dvc.pruning.masks import MaskRule, choose_linear
from wanda_dvc.pruning.reconstruction import check_new_weight, masked, reconstruct
from wanda_dvc.pruning.solvers import GramFactors, Mask
from wanda_dvc.pruning.statistics import BlockStats, InputStats


@torch.no_grad()
def prune_weight(
    weight: Weight, inputs: Tensor | None, gram: Tensor | None, rule: MaskRule, reconstruction: Reconstruction
) -> tuple[Weight, Mask]:
    """Return a linear's new weight and its mask, from its inputs, [tokens, in], or else from XᵀX of these, [in, in].

    UserError for other shapes, values that are not finite, or a pattern that does not fit.
    """
    if inputs is not None:
        sums = Gram.empty(inputs.shape[-1], inputs.device)
        sums.add(inputs)
        gram = sums.matrix()
    assert gram is not None  # the caller has one of them
    features = weight.shape[1]
    if gram.shape != (features, features) or not gram.isfinite().all():
        raise UserError(
            f"inputs, gram: found shape {list(gram.shape)} of XᵀX, or values that are not finite, expected finite "
            f"inputs [tokens, {features}], or XᵀX of these; remove tokens that are not finite"
        )
    squares, name = gram.diagonal().double(), "weight"
    stats = InputStats(squares, torch.zeros_like(squares), count=1)
    factors = GramFactors(gram)
    x = factors if rule.method.needs == "gram" else stats
    mask = choose_linear(name, weight, x, BlockStats({name: stats}, {name: [name]}, []), rule).to(weight.device)
    if reconstruction.function is None:
        return masked(weight, mask), mask
    result = reconstruct(weight, mask, factors, reconstruction=reconstruction)
    return check_new_weight(name, result.weight.to(weight)), mask
