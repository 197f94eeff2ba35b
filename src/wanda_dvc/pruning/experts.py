"""The choice of the routed experts that stay: a score of each expert, and the highest scores of each mixture."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from wanda_dvc.catalog import Method
from wanda_dvc.errors import UserError
from wanda_dvc.pruning.choose import function_of, oriented
from wanda_dvc.pruning.statistics import BlockStats, OutputStats
from wanda_dvc.pruning.units import highest


class Mixture(NamedTuple):
    """The experts that one router chooses from."""

    experts: list[list[str]]  # the linears of each
    stay: int
    groups: int = 1  # neighbouring experts: the same number stays in each group


def reap(outputs: OutputStats) -> float:
    """Return REAP's score: the mean over the tokens sent to an expert of gate · ‖output‖₂; 0 without tokens.

    Lasby et al. 2025, arXiv 2510.13999, equation 9. The norm is of the product that the model computes.
    """
    return float(outputs.sum) / outputs.count if outputs.count else 0.0


def choose_experts(
    weights: Callable[[str], Tensor],
    block: BlockStats,
    mixtures: Mapping[str, Mixture],
    *,
    method: Method,
    device: torch.device | None = None,
) -> dict[str, Bool[Tensor, "rows columns"]]:
    """Return the masks of one block's linears: all weights of an expert stay or go, all others stay.

    The lowest scores of each mixture go, or of each of its groups; of ties the first goes. Without a score of experts,
    an expert's is the sum of its weights' scores. UserError if the outputs of experts were not recorded.
    """
    sources = {name: source for source, names in block.readers.items() for name in names}
    keeps = dict.fromkeys(sources, True)
    for mixture in mixtures.values():
        if mixture.experts[0][0] in sources:
            scores = torch.tensor([_score(weights, block, sources, own, method, device) for own in mixture.experts])
            stay = torch.cat([highest(x, mixture.stay // mixture.groups) for x in scores.chunk(mixture.groups)])
            keeps |= {name: kept for own, kept in zip(mixture.experts, stay.tolist(), strict=True) for name in own}
    return {name: torch.full(weights(name).shape, keep) for name, keep in keeps.items()}


def _score(  # noqa: PLR0913, PLR0917 - the expert, its statistics, and how it is scored
    weights: Callable[[str], Tensor],
    block: BlockStats,
    sources: Mapping[str, str],
    linears: list[str],
    method: Method,
    device: torch.device | None,
) -> float:
    """Return the score of one expert."""
    score = function_of(method.function)
    if method.competition == "experts":
        tokens = max(block.inputs[sources[name]].count for name in linears)
        found = [block.outputs[name] for name in linears if name in block.outputs]
        outputs = found[0] if found else OutputStats(torch.zeros((), dtype=torch.float64), 0)
        if outputs.count != tokens or len(found) > 1:
            raise UserError(
                f"method: got {method.name}, but calibration saw {outputs.count} outputs with gates of {linears[0]} "
                f"for {tokens} tokens, expected one for each; set method=wanda"
            )
        return float(score(outputs))
    total = 0.0
    for name in linears:
        weight, x = oriented(weights(name), name in block.transposed), block.inputs[sources[name]]
        weight = weight if device is None else weight.to(device)
        total += float(score(weight, x.to(weight.device)).sum(dtype=torch.float32))
    if not torch.tensor(total).isfinite():
        raise UserError(f"{linears[0]}: scores that are not finite; weights or activations of its expert overflow")
    return total
