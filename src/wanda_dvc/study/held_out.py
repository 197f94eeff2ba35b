"""Warnings about a recipe, from the losses of held-out calibration windows: metrics/pruned/held_out.json."""

import math
from collections.abc import Iterator
from itertools import pairwise

from wanda_dvc.reading import DIVERGED
from wanda_dvc.study.files import Json


def raised(metrics: Json) -> Iterator[str]:
    """Yield a sentence for each choice of the recipe with a higher loss on held-out windows.

    `metrics` has under `held_out` the losses of masks and of weights, by choice; neighbours differ by one choice.
    """
    for losses in metrics.get("held_out", {}).values():
        for (_, before), (choice, after) in pairwise(losses.items()):
            if _number(after) > _number(before):
                yield (
                    f"{choice} raises the loss of held-out calibration windows from {_spelled(before)} to "
                    f"{_spelled(after)}; try the recipe without it"
                )


def _number(loss: float | str) -> float:
    return math.inf if loss == DIVERGED else float(loss)


def _spelled(loss: float | str) -> str:
    return loss if isinstance(loss, str) else f"{loss:.4f}"
