"""The choice of the blocks that stay: a score of each block, and the highest scores."""

import math
from collections.abc import Callable, Iterable

import torch
from jaxtyping import Bool
from torch import Tensor

from wanda_dvc.catalog import Method
from wanda_dvc.errors import UserError
from wanda_dvc.pruning.choose import function_of, oriented
from wanda_dvc.pruning.statistics import BlockStats
from wanda_dvc.pruning.units import highest


def influence(block: BlockStats) -> float:
    """Return a block's influence: the mean over tokens of 1 − cosine of its input and output.

    Men et al. 2024, ShortGPT, arXiv 2403.03853. UserError if it was not measured.
    """
    if block.influence is None:
        raise UserError(
            "stats/: no influence of blocks, expected one number for each, as this version measures; run `dvc repro` "
            "or `wanda-dvc calibrate`"
        )
    total, tokens = block.influence.tolist()
    return total / tokens


def choose_blocks(
    weights: Callable[[str], Tensor], blocks: Iterable[BlockStats], stay: int, *, method: Method
) -> Bool[Tensor, " blocks"]:
    """Return which blocks stay: those with the highest scores; of ties the first goes.

    Without a score of blocks, a block's is the sum of its weights' scores.
    """
    score, scores = function_of(method.function), []
    for block in blocks:
        if method.competition == "blocks":
            scores.append(score(block))
            continue
        linears = [(name, source) for source, names in block.readers.items() for name in names]
        total = 0.0
        for name, source in linears:
            weight = oriented(weights(name), name in block.transposed).float()
            total += float(score(weight, block.inputs[source]).sum(dtype=torch.float64))
        scores.append(total)
    for index, found in enumerate(scores):
        if not math.isfinite(found):
            raise UserError(f"block {index}: a score that is not finite; its weights or activations overflow")
    return highest(torch.tensor(scores, dtype=torch.float64), stay)
