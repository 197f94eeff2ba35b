"""Allocation: the sparsity of each block or linear, with the requested sparsity as the mean.

Shares are exact fractions in [0, 1]. `settle` makes up for the counts of groups, which are rounded down.
"""

import bisect
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from pkgutil import resolve_name

import torch
from jaxtyping import Float, Int
from torch import Tensor

from wanda_dvc.catalog import Allocation
from wanda_dvc.pruning.gram import WEIGHTS_AT_A_TIME
from wanda_dvc.pruning.masks import Sparsity
from wanda_dvc.pruning.reconstruction import ReadWeight, oriented
from wanda_dvc.pruning.scores import wanda
from wanda_dvc.pruning.selection import removed
from wanda_dvc.pruning.statistics import BlockStats, InputStats

DIGITS = 10**6  # shares are rounded to so many parts before they are shifted
OUTLIER = 5  # OWL's M for LLaMA
STEPS = 40  # of a bisection
BIN = 19  # low bits of a float32 that do not change a score's bin: 16 bins an octave
MOST = 0.97  # largest share of a linear in the sensitivity allocation: a linear without weights has no output


def allocate(
    weights: ReadWeight,
    blocks: Iterable[BlockStats],
    count: int,
    *,
    allocation: Allocation,
    sparsity: Fraction,
    group: str,
) -> Sequence[Sparsity]:
    """Return the share of weights to prune, of each block or of each linear.

    `blocks` yields the statistics of the `count` blocks, with the gradients tier where the allocation needs it. Without
    a strength all shares are equal, and `blocks` is not read.
    """
    if allocation.strength is None:
        return [sparsity] * count
    rate, divide = resolve_name(allocation.rating), resolve_name(allocation.function)
    linears: list[dict[str, tuple[int, int]]] = []  # of each block: the number and size of their competing groups
    ratings: list[object] = []
    for measured in blocks:
        own: dict[str, tuple[int, int]] = {}
        for name, x in measured.by_linear.items():
            number, features = weights(name).numel(), len(x.sum)
            own[name] = (number // features, features) if group == "row" else (1, number)
        linears.append(own)
        ratings += rate(weights, measured)
    groups = [list(own.values()) for own in linears]  # of each part
    if allocation.uses_fisher:
        groups = [[one] for block in groups for one in block]
    sizes = [sum(number * size for number, size in part) for part in groups]
    sparsities = round_to_total(divide(sparsity, sizes, ratings, allocation.strength), sparsity, groups)
    if not allocation.uses_fisher:
        return sparsities
    of_linears = iter(sparsities)
    return [{name: next(of_linears) for name in own} for own in linears]


def outlier_rating(weights: ReadWeight, block: BlockStats) -> list[float]:
    """Return the percentage of outliers among a block's Wanda scores, for OWL: the block is one part."""
    every = block.by_linear.items()
    return [outlier_ratio(lambda: (scores for name, x in every for scores in _wanda_scores(weights, block, name, x)))]


def sensitivity_rating(weights: ReadWeight, block: BlockStats) -> list[Tensor | None]:
    """Return a histogram of each linear's scores; None without Fisher information.

    The score is |W| · ‖X_j‖₂ · √(F_i / Σ_j ‖X_j‖²). It divides a row's F_i among its weights in proportion to ‖X_j‖².
    """

    def rate(name: str, x: InputStats) -> Tensor | None:
        if name not in block.fisher:
            return None
        total = x.norm.double().square().sum()
        roots, counts = (block.fisher[name] / total).sqrt().float(), []
        for scores in _wanda_scores(weights, block, name, x):
            root, roots = roots[: len(scores)], roots[len(scores) :]
            counts.append(count_scores(scores * root[:, None]))
        return torch.stack(counts).sum(dim=0, dtype=torch.int32)

    return [rate(name, x) for name, x in block.by_linear.items()]


def _wanda_scores(
    weights: ReadWeight, block: BlockStats, name: str, x: InputStats
) -> Iterator[Float[Tensor, "rows in"]]:
    """Yield a linear's Wanda scores in slices of rows, so that memory does not grow with the linear."""
    weight = oriented(weights(name), name in block.transposed)
    for rows in weight.split(max(1, WEIGHTS_AT_A_TIME // weight.shape[1])):
        yield wanda(rows, x)


def owl(sparsity: Fraction, sizes: Sequence[int], outliers: Sequence[float], spread: float) -> list[Fraction]:
    """Return OWL's shares: a block with more outliers keeps more. Yin et al. 2024, arXiv 2310.05175.

    The kept fraction is (D − min D) / (max D − min D) · 2λ, shifted; D is each block's `outlier_ratio`, λ the spread.
    """
    most = max(outliers)
    scale = 2 * spread / (most - min(outliers)) if most > min(outliers) else 0.0
    return shift([Fraction(round((most - ratio) * scale * DIGITS), DIGITS) for ratio in outliers], sparsity, sizes)


def sensitivity(
    sparsity: Fraction, sizes: Sequence[int], counts: Sequence[Int[Tensor, " bins"] | None], spread: float
) -> list[Fraction]:
    """Return each linear's share when the lowest scores of all linears together are pruned.

    `counts` are each linear's `count_scores`. A share differs from the sparsity by at most `spread`. It is at most 0.97
    or the sparsity. A linear without counts has the sparsity. Scores are assumed to be evenly spread within a bin.
    """
    known = [number for number, bins in enumerate(counts) if bins is not None]
    wanted = float(sparsity)
    raw = [sparsity] * len(sizes)
    if known and 0 < sparsity < 1:
        bins = torch.stack([x for x in counts if x is not None])
        bins = bins[:, bins.any(dim=0)]
        up_to = bins.cumsum(dim=1, dtype=torch.int64)
        size = torch.tensor([sizes[number] for number in known], dtype=torch.float64)
        least, most = max(wanted - spread, 0.0), max(min(wanted + spread, MOST), wanted)

        def pruned_fractions(threshold: float) -> Float[Tensor, " linears"]:
            place = int(threshold)
            below = up_to[:, place] - bins[:, place] * (1 - (threshold - place))
            return (below / size).clamp(least, most)

        low, high = 0.0, bins.shape[1] - 1e-6
        for _ in range(STEPS + STEPS):
            middle = (low + high) / 2
            low, high = (middle, high) if pruned_fractions(middle) @ size < wanted * size.sum() else (low, middle)
        for number, fraction in zip(known, pruned_fractions(high).tolist(), strict=True):
            raw[number] = Fraction(round(fraction * DIGITS), DIGITS)
    return shift(raw, sparsity, sizes)


def count_scores(score: Float[Tensor, "..."]) -> Int[Tensor, " bins"]:
    """Count positive scores by their exponent and the first four bits of their fraction."""
    bits = score.float().contiguous().flatten().view(torch.int32) >> BIN
    return torch.bincount(bits, minlength=1 << (31 - BIN)).int()


def outlier_ratio(scores: Callable[[], Iterable[Float[Tensor, "..."]]], times: float = OUTLIER) -> float:
    """Return the percentage of a block's scores that are above `times` their mean: OWL's D.

    `scores` yields the scores in parts, twice. Only one part is in memory at a time.
    """
    counts, sums = zip(*((score.numel(), score.sum(dtype=torch.float64).item()) for score in scores()), strict=True)
    mean = sum(sums) / sum(counts)
    return 100 * sum((score > times * mean).sum().item() for score in scores()) / sum(counts)


def shift(raw: Sequence[Fraction], sparsity: Fraction, sizes: Sequence[int]) -> list[Fraction]:
    """Return `raw` plus one constant, clipped to [0, 1]; the mean weighted by size is exactly the sparsity."""

    def sparsities(constant: Fraction) -> list[Fraction]:
        return [min(max(value + constant, Fraction(0)), Fraction(1)) for value in raw]

    def mean(constant: Fraction) -> Fraction:
        return Fraction(sum(map(operator.mul, sparsities(constant), sizes)), sum(sizes))

    # The mean rises with the constant, and is linear between two constants at which no part reaches 0 or 1.
    constants = sorted({end - value for value in raw for end in (0, 1)})
    above = bisect.bisect_left(constants, sparsity, key=mean)
    if mean(constants[above]) == sparsity:
        return sparsities(constants[above])
    low, high = constants[above - 1 : above + 1]
    return sparsities(low + (sparsity - mean(low)) / (mean(high) - mean(low)) * (high - low))


def round_to_total(
    sparsities: Sequence[Fraction], sparsity: Fraction, groups: Sequence[list[tuple[int, int]]]
) -> list[Fraction]:
    """Return shares plus one constant, chosen to bring the count of removed weights nearest to the sparsity.

    `groups` has (number, size) of the competing groups of each part, such as a linear's rows. Counts are rounded down,
    so each group loses up to one weight too few. For rows of 576 at 50 % the sparsity would be 0.4993.
    """
    total = sum(number * size for part in groups for number, size in part)

    def off(constant: Fraction) -> Fraction:
        raised = (min(value + constant, Fraction(1)) for value in sparsities)
        pairs = zip(raised, groups, strict=True)
        return sum(number * removed(size, value) for value, part in pairs for number, size in part) - sparsity * total

    low, high = Fraction(0), Fraction(1, min(size for part in groups for _, size in part))
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if off(middle) < 0 else (low, middle)
    constant = min((low, high), key=lambda one: abs(off(one)))
    return [min(value + constant, Fraction(1)) for value in sparsities]
