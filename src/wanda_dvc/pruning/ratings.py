"""Allocation for a model: rate each block or linear, and compute its share from the ratings."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction

import torch
from jaxtyping import Float
from torch import Tensor

from wanda_dvc.catalog import Allocation
from wanda_dvc.pruning.allocation import count_scores, greedy_error, outlier_ratio, settle
from wanda_dvc.pruning.choose import WEIGHTS_AT_A_TIME, Share, function_of, oriented
from wanda_dvc.pruning.gram import Gram
from wanda_dvc.pruning.scores import wanda
from wanda_dvc.pruning.statistics import BlockStats


def allocate(  # noqa: PLR0913 - the statistics, and the settings of an allocation
    weights: Callable[[str], Tensor],
    blocks: Iterable[tuple[BlockStats, Mapping[str, Gram]]],
    count: int,
    *,
    allocation: Allocation,
    share: Fraction,
    group: str,
    strength: float | None,
) -> Sequence[Share]:
    """Return the share of weights to prune, of each block or of each linear.

    `blocks` yields the statistics of the `count` blocks, with Gram matrices or the gradients tier where the allocation
    needs them. Without `strength` all shares are equal, and `blocks` is not read.
    """
    if strength is None:
        return [share] * count
    parts: list[list[str]] = []  # the linears of each
    groups: list[list[tuple[int, int]]] = []  # of each part's linears
    ratings: list[object] = []
    ends: list[int] = []  # the parts up to each block's end
    for measured, grams in blocks:
        linears: dict[str, tuple[int, int]] = {}
        for source, names in measured.readers.items():
            for name in names:
                number, features = weights(name).numel(), len(measured.inputs[source].sum)
                linears[name] = (number // features, features) if group == "row" else (1, number)
        own = [[name] for name in linears] if allocation.by_linear else [list(linears)]
        parts += own
        groups += [[linears[name] for name in part] for part in own]
        ends.append(len(parts))
        if allocation.rating is not None:
            rated = function_of(allocation.rating)(weights, measured, grams)
            ratings += rated if allocation.by_linear else [rated]
    words: list[object] = [ratings] if allocation.rating is not None else []
    words.append(Fraction(str(strength)) if allocation.rating is None else strength)
    sizes = [sum(number * size for number, size in linears) for linears in groups]
    shares = settle(function_of(allocation.function)(share, sizes, *words), share, groups)
    if not allocation.by_linear:
        return shares
    return [
        {parts[part][0]: shares[part] for part in range(begin, end)} for begin, end in itertools.pairwise([0, *ends])
    ]


def outlier_rating(weights: Callable[[str], Tensor], block: BlockStats, _: Mapping[str, Gram]) -> float:
    """Return the percentage of outliers among a block's Wanda scores, for OWL."""

    def scores() -> Iterator[Tensor]:
        for source, names in block.readers.items():
            for name in names:
                yield from _wanda_scores(weights, block, name, source)

    return outlier_ratio(scores)


def sensitivity_rating(
    weights: Callable[[str], Tensor], block: BlockStats, _: Mapping[str, Gram]
) -> list[Tensor | None]:
    """Return a histogram of each linear's scores; None without Fisher information.

    The score is |W| · ‖X_j‖₂ · √(F_i / Σ_j ‖X_j‖²). It divides a row's F_i among its weights in proportion to ‖X_j‖².
    """

    def rate(name: str, source: str) -> Tensor | None:
        if name not in block.fisher:
            return None
        total = block.inputs[source].norm.double().square().sum()
        roots, counts = (block.fisher[name] / total).sqrt().float(), []
        for scores in _wanda_scores(weights, block, name, source):
            root, roots = roots[: len(scores)], roots[len(scores) :]
            counts.append(count_scores(scores * root[:, None]))
        return torch.stack(counts).sum(dim=0, dtype=torch.int32)

    return [rate(name, source) for source, names in block.readers.items() for name in names]


def _wanda_scores(
    weights: Callable[[str], Tensor], block: BlockStats, name: str, source: str
) -> Iterator[Float[Tensor, "rows in"]]:
    """Yield a linear's Wanda scores in slices of rows, so that memory does not grow with the linear."""
    weight = oriented(weights(name), name in block.transposed)
    for rows in weight.split(max(1, WEIGHTS_AT_A_TIME // weight.shape[1])):
        yield wanda(rows, block.inputs[source])


def greedy_rating(weights: Callable[[str], Tensor], block: BlockStats, grams: Mapping[str, Gram]) -> float:
    """Return the mean error of greedy pruning of a block's linears, for LSA; experts without tokens count 0."""
    errors: list[float] = []
    for source, names in block.readers.items():
        gram = grams[source].matrix() if source in grams else None  # no two of a block at once
        for name in names:
            weight = oriented(weights(name), name in block.transposed)
            errors.append(0.0 if gram is None else greedy_error(weight, gram))
    return sum(errors) / len(errors)
