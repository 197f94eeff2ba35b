"""New values of kept weights, and the pruned weight of a linear with its layer errors."""

from collections.abc import Callable
from dataclasses import replace
from pkgutil import resolve_name
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wanda_dvc.catalog import Reconstruction
from wanda_dvc.errors import UserError
from wanda_dvc.pruning.gram import Gram, layer_errors
from wanda_dvc.pruning.solvers import GramFactors, SolverResult, corrected_target

ReadWeight = Callable[[str], Tensor]  # returns the weight of the linear with this name, as stored


def oriented(weight: Tensor, transposed: bool) -> Tensor:
    """Convert a weight between its stored orientation and [out, in]."""
    return weight.T if transposed else weight


# --- new values of kept weights ---


def target_weight(
    weight: Tensor, factors: GramFactors | None, cross: Tensor | None, *, strength: float, transposed: bool = False
) -> Tensor:
    """Return a linear's target weight, float32, as stored: with it, inputs from the pruned model give dense outputs.

    `cross` is X_denseᵀX of its input; without it or tokens, the target is the weight.
    """
    weight = weight.float()
    if factors is not None and cross is not None:
        oriented_weight = oriented(weight, transposed).to(factors.gram.device)
        target = corrected_target(oriented_weight, factors, cross.float().to(oriented_weight), strength=strength)
        weight = oriented(target, transposed).to(weight)
    return weight.contiguous()


def reconstruct(
    weight: Tensor,
    mask: Tensor,
    factors: GramFactors,
    *,
    reconstruction: Reconstruction,
    gradient_gram: Gram | None = None,
    transposed: bool = False,
) -> SolverResult:
    """Return the weights of one linear on its mask, oriented, typed and placed as `weight` is stored.

    `gradient_gram` is the Gram matrix of the gradients of its output, if the reconstruction uses it and it exists.
    """
    assert reconstruction.function is not None
    solve = resolve_name(reconstruction.function)
    device = factors.gram.device
    kwargs: dict[str, Any] = {}
    if reconstruction.uses_fisher:
        kwargs["gradient_gram"] = None if gradient_gram is None else gradient_gram.matrix().to(device)
    if reconstruction.steps:
        kwargs["steps"] = reconstruction.steps
    result: SolverResult = solve(
        oriented(weight, transposed).to(device), oriented(mask, transposed).to(device), factors, **kwargs
    )
    return replace(result, mask=mask, weight=oriented(result.weight, transposed).contiguous().to(weight))


def check_new_weight(linear: str, weight: Tensor) -> Tensor:
    """Return a linear's new weight, as stored. UserError if its dtype does not hold the values."""
    if not weight.isfinite().all():
        raise UserError(f"{linear}: new weights are not finite in {weight.dtype}; set reconstruction=none")
    return weight


# --- the pruned weight ---


class PrunedWeight(NamedTuple):
    """One linear of a pruned model, as its weight is stored."""

    weight: Tensor  # zero off the mask
    error: float | None  # ‖(W−Ŵ)X‖² / ‖WX‖² on the dense model's inputs; None without their Gram matrix
    masked_error: float | None  # likewise, without new values


def prune_linear(
    weight: Tensor,
    mask: Tensor,
    factors: GramFactors | None,
    values: Tensor | None = None,
    *,
    transposed: bool = False,
    removes_inputs: bool = False,
) -> PrunedWeight:
    """Return one linear on its mask, and its layer errors; `values` replace the kept weights.

    `removes_inputs`: the mask removes complete inputs. Nothing reads the outputs without kept weights, so the errors
    are those of the other rows, and None where these rows are unchanged.
    """
    plain = masked(weight, mask)
    new = plain if values is None else masked(values.to(weight.device), mask)
    if factors is None:
        return PrunedWeight(new, None, None)
    weights = [oriented(w, transposed).to(factors.gram.device).float() for w in (weight, plain, new)]
    if removes_inputs:
        oriented_mask = oriented(mask, transposed)
        rows = oriented_mask.any(dim=1)
        if not rows.any() or (oriented_mask[rows].all() and torch.equal(new, plain)):
            return PrunedWeight(new, None, None)
        rows = rows.to(factors.gram.device)
        weights = [w[rows] for w in weights]
    masked_error, error = layer_errors(weights[0], weights[1:], factors.gram, factors.dead)
    return PrunedWeight(new, error, masked_error)


def masked(weight: Tensor, mask: Tensor) -> Tensor:
    """Return weights with +0 off the mask; kept weights are byte-identical, in every dtype."""
    if weight.device.type != "cpu":
        return weight.masked_fill(~mask.to(weight.device), 0)
    # The bits as integers times 0 or 1: on one core torch.where takes 18 (float32) to 60 (bfloat16) times as long.
    bits = weight.contiguous().view(getattr(torch, f"int{8 * weight.itemsize}"))
    return (bits * mask.cpu()).view(weight.dtype)
