"""Units that are complete linears, blocks and routed experts: a score of each unit, and the highest scores."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from wanda_dvc.catalog import Method, function_of
from wanda_dvc.errors import UserError
from wanda_dvc.pruning.choose import oriented
from wanda_dvc.pruning.statistics import BlockStats, OutputStats
from wanda_dvc.pruning.units import highest


class Whole(NamedTuple):
    """A set of units that are complete linears: all blocks, or the experts that one router chooses from."""

    members: list[list[str]]  # the linears of each unit
    stay: int
    groups: int = 1  # of neighbouring units: the same number stays in each
    sums: torch.dtype = torch.float32  # of the scores of a linear's weights


def choose_units(
    sets: Mapping[str, Whole],
    weights: Callable[[str], Tensor],
    blocks: Iterable[BlockStats],
    *,
    method: Method,
    device: torch.device | None = None,
) -> dict[str, Bool[Tensor, " units"]]:
    """Return the units of each set that stay: those with the highest scores; of ties the first goes.

    Without a score of units, a unit's is the sum of its weights' scores. `weights` reads a linear's stored weight.
    UserError if a score is not finite, or the outputs of experts were not recorded.
    """
    scores: dict[str, list[float]] = {name: [] for name in sets}
    for block in blocks:
        sources = {name: source for source, names in block.readers.items() for name in names}
        for name, units in sets.items():
            for linears in units.members:
                if linears[0] not in sources:  # of another block
                    continue
                if method.competition == "blocks":
                    score = function_of(method.function)(block)
                elif method.competition == "experts":
                    score = function_of(method.function)(_outputs(block, linears, sources, method))
                else:
                    score = _summed(weights, block, linears, sources, method, units.sums, device)
                if not math.isfinite(score):
                    raise UserError(
                        f"{linears[0]}: the score of its unit is not finite; its weights or activations overflow"
                    )
                scores[name].append(score)
    stays = {}
    for name, units in sets.items():
        parts = torch.tensor(scores[name], dtype=units.sums).chunk(units.groups)
        stays[name] = torch.cat([highest(part, units.stay // units.groups) for part in parts])
    return stays


def _outputs(block: BlockStats, linears: list[str], sources: Mapping[str, str], method: Method) -> OutputStats:
    """Return the sums over the outputs of one expert. UserError if they do not cover all of its tokens."""
    tokens = max(block.inputs[sources[name]].count for name in linears)
    found = [block.outputs[name] for name in linears if name in block.outputs]
    outputs = found[0] if found else OutputStats(torch.zeros((), dtype=torch.float64), 0)
    if outputs.count != tokens or len(found) > 1:
        raise UserError(
            f"method: got {method.name}, but calibration saw {outputs.count} outputs with gates of {linears[0]} "
            f"for {tokens} tokens, expected one for each; set method=wanda"
        )
    return outputs


def _summed(  # noqa: PLR0913, PLR0917 - the unit, its statistics, and how weights are scored
    weights: Callable[[str], Tensor],
    block: BlockStats,
    linears: list[str],
    sources: Mapping[str, str],
    method: Method,
    sums: torch.dtype,
    device: torch.device | None,
) -> float:
    """Return the sum of the scores of a unit's weights."""
    total, score = 0.0, function_of(method.function)
    for name in linears:
        weight = oriented(weights(name), name in block.transposed)
        weight = weight if device is None else weight.to(device)
        total += float(score(weight, block.inputs[sources[name]].to(weight.device)).sum(dtype=sums))
    return total
