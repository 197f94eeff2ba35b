"""Allocation: the sparsity of each block or linear, an exact fraction; the requested sparsity is the mean."""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from pkgutil import resolve_name
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from wanda_dvc.catalog import Allocation
from wanda_dvc.pruning.gram import Weight, row_slices
from wanda_dvc.pruning.masks import BlockSparsity
from wanda_dvc.pruning.reconstruction import ReadWeight, oriented
from wanda_dvc.pruning.scores import wanda
from wanda_dvc.pruning.selection import count_removed
from wanda_dvc.pruning.statistics import BlockStats

DIGITS = 10**6  # sparsities are rounded to this fraction before they are shifted
MEANS_OF_AN_OUTLIER = 5  # OWL's M for LLaMA: an outlier's score is above this multiple of the mean
STEPS = 40  # of a bisection of fractions; twice as many take floats to neighbouring ones
BIN_BITS = 19  # low bits of a float32 that do not change a score's bin: 16 bins an octave
LARGEST_SPARSITY = 0.97  # of a linear in the sensitivity allocation: a linear without weights has no output


class Competition(NamedTuple):
    """How a linear's weights compete: in groups of `size` weights, each a row or the linear."""

    groups: int
    size: int


def allocate(
    read_weight: ReadWeight,
    blocks: Iterable[BlockStats],
    count: int,
    allocation: Allocation,
    sparsity: Fraction,
    group: str,
    device: torch.device,
) -> Sequence[BlockSparsity]:
    """Return the sparsity of each block, or of the linears of each block; weights are rated on a device.

    `blocks` yields the statistics of the `count` blocks, and is not read if the allocation has no strength.
    """
    if allocation.strength is None:
        return [sparsity] * count
    rate, allocate_by_rating = resolve_name(allocation.rating), resolve_name(allocation.function)
    ratings: list[object] = []  # of each block, or of each linear where the allocation uses Fisher information
    competitions: list[list[Competition]] = []  # for each rating, of the linears that share it
    linears: list[list[str]] = []  # of each block
    for block in blocks:
        weights = {
            linear: oriented(read_weight(linear).to(device), linear in block.transposed) for linear in block.by_linear
        }
        by_linear = [Competition(*w.shape) if group == "row" else Competition(1, w.numel()) for w in weights.values()]
        linears.append(list(weights))
        competitions += [[competition] for competition in by_linear] if allocation.uses_fisher else [by_linear]
        ratings += rate(weights, block)
    sizes = [sum(map(math.prod, sharing)) for sharing in competitions]
    raw = allocate_by_rating(sparsity, sizes, ratings, allocation.strength)
    sparsities = round_to_total(raw, sparsity, competitions)
    if not allocation.uses_fisher:
        return sparsities
    next_sparsity = iter(sparsities)
    return [{name: next(next_sparsity) for name in names} for names in linears]


def outlier_rating(weights: Mapping[str, Weight], block: BlockStats) -> list[float]:
    """Return the percentage of a block's Wanda scores that are above 5 times their mean: OWL's D.

    Scores are computed twice, in slices: memory does not grow with the linear. The host waits for a GPU twice.
    """

    def scores() -> Iterator[Float[Tensor, "rows in"]]:
        for linear, x in block.by_linear.items():
            weight = weights[linear]
            stats = x.to(weight.device)
            for rows in row_slices(weight):
                yield wanda(weight[rows], stats)

    count = sum(weight.numel() for weight in weights.values())
    mean = sum(torch.stack([score.sum(dtype=torch.float64) for score in scores()]).tolist()) / count
    outliers = torch.stack([(score > MEANS_OF_AN_OUTLIER * mean).sum() for score in scores()])
    return [100 * int(outliers.sum()) / count]


def sensitivity_rating(weights: Mapping[str, Weight], block: BlockStats) -> list[Tensor | None]:
    """Return a histogram of each linear's scores; None without Fisher information, or for an input of zeros.

    The score is |W| · ‖X_j‖₂ · √(F_i / Σ_j ‖X_j‖²). It divides a row's F_i among its weights in proportion to ‖X_j‖².
    """
    histograms: list[Tensor | None] = []
    for linear, x in block.by_linear.items():
        total = x.norm.double().square().sum()
        if linear not in block.fisher or not total:
            histograms.append(None)
            continue
        weight = weights[linear]
        row_factors = (block.fisher[linear] / total).sqrt().float().to(weight.device)[:, None]
        stats = x.to(weight.device)
        counts = [count_scores(wanda(weight[rows], stats) * row_factors[rows]) for rows in row_slices(weight)]
        histograms.append(torch.stack(counts).sum(dim=0, dtype=torch.int32).cpu())
    return histograms


def owl(_: Fraction, __: Sequence[int], outliers: Sequence[float], spread: float) -> list[Fraction]:
    """Return OWL's sparsities, which lack a constant that `round_to_total` adds. Yin et al. 2024, arXiv 2310.05175.

    A block with more outliers keeps more: (D − min D) / (max D − min D) · 2λ, D its `outlier_rating`, λ the spread.
    """
    largest, smallest = max(outliers), min(outliers)
    scale = 2 * spread / (largest - smallest) if largest > smallest else 0.0
    return [Fraction(round((largest - ratio) * scale * DIGITS), DIGITS) for ratio in outliers]


def sensitivity(
    sparsity: Fraction, sizes: Sequence[int], counts: Sequence[Int[Tensor, " bins"] | None], spread: float
) -> list[Fraction]:
    """Return each linear's sparsity when the lowest scores of all linears together are pruned.

    `counts` are each linear's `count_scores`; scores are assumed to be evenly spread within a bin. A sparsity differs
    from the model's by at most `spread`, and is at most 0.97 or the model's. A linear without counts has the model's.
    """
    counts_by_index = {index: count for index, count in enumerate(counts) if count is not None}
    raw = [sparsity] * len(sizes)
    if not counts_by_index or not 0 < sparsity < 1:
        return raw
    requested = float(sparsity)
    bin_counts = torch.stack([*counts_by_index.values()])
    bin_counts = bin_counts[:, bin_counts.any(dim=0)]  # without those that are empty in all linears
    up_to = bin_counts.cumsum(dim=1, dtype=torch.int64)
    size = torch.tensor([sizes[index] for index in counts_by_index], dtype=torch.float64)
    smallest = max(requested - spread, 0.0)
    largest = max(min(requested + spread, LARGEST_SPARSITY), requested)

    def pruned_fractions(position: float) -> Float[Tensor, " linears"]:
        """Return what is pruned of each linear: at position 3.25, bins 0 to 2 and a quarter of bin 3."""
        bin_number = int(position)
        below = up_to[:, bin_number] - bin_counts[:, bin_number] * (1 - (position - bin_number))
        return (below / size).clamp(smallest, largest)

    low, high = 0.0, bin_counts.shape[1] - 1e-6
    for _ in range(2 * STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if pruned_fractions(middle) @ size < requested * size.sum() else (low, middle)
    for index, fraction in zip(counts_by_index, pruned_fractions(high).tolist(), strict=True):
        raw[index] = Fraction(round(fraction * DIGITS), DIGITS)
    return raw


def count_scores(score: Float[Tensor, "..."]) -> Int[Tensor, " bins"]:
    """Count scores, which are not negative, by their exponent and the first four bits of their fraction."""
    bits = score.float().contiguous().flatten().view(torch.int32) >> BIN_BITS
    return torch.bincount(bits, minlength=1 << (31 - BIN_BITS)).int()


def round_to_total(
    sparsities: Sequence[Fraction], sparsity: Fraction, competitions: Sequence[Sequence[Competition]]
) -> list[Fraction]:
    """Return sparsities plus one constant, clipped to [0, 1], that brings the count of removed weights nearest.

    `competitions` has, for each of the sparsities, those of its linears. Counts are rounded down: each group loses up
    to one weight too few.
    """
    all_competitions = [*itertools.chain(*competitions)]
    total = sum(map(math.prod, all_competitions))

    def shifted(constant: Fraction) -> list[Fraction]:
        return [min(max(value + constant, Fraction(0)), Fraction(1)) for value in sparsities]

    def surplus(constant: Fraction) -> Fraction:
        removed = 0
        for value, sharing in zip(shifted(constant), competitions, strict=True):
            for competition in sharing:
                removed += competition.groups * count_removed(competition.size, value)
        return removed - sparsity * total

    low, high = -max(sparsities), 1 - min(sparsities)
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if surplus(middle) < 0 else (low, middle)
    return shifted(min((low, high), key=lambda bound: abs(surplus(bound))))
