"""The sparsity of each block, as `allocation` says."""

from fractions import Fraction

from wanda_dvc.catalog import ALLOCATIONS
from wanda_dvc.engine.checkpoint import Checkpoint
from wanda_dvc.pruning.allocation import settle
from wanda_dvc.pruning.choose import function_of
from wanda_dvc.stages.inputs import Statistics
from wanda_dvc.stages.running import progress
from wanda_dvc.study.project import Project
from wanda_dvc.study.tensors import read_grams, read_stats


def allocate(project: Project, stats: Statistics, checkpoint: Checkpoint) -> list[Fraction]:
    """Return the share of each block's weights that goes. Blocks are rated on the dense model's statistics."""
    params = project.params
    row = ALLOCATIONS[params.allocation]
    if row.strength is None:
        equal: list[Fraction] = function_of(row.function)(params.share, range(stats.blocks))
        return equal
    groups: list[list[tuple[int, int]]] = []  # of each block's linears
    ratings = []
    for block in progress(range(stats.blocks), total=stats.blocks, what="mask, blocks rated"):
        measured = read_stats(project.stats, block)
        groups.append([])
        for source, names in measured.readers.items():
            for name in names:
                count, features = checkpoint.weight(name).numel(), len(measured.inputs[source].sum)
                groups[-1].append((count // features, features) if params.group == "row" else (1, count))
        if row.rating is not None:
            grams = read_grams(project.gram, block) if row.needs == "gram" else {}
            ratings.append(function_of(row.rating)(checkpoint.weight, measured, grams))
    words: list[object] = [ratings] if row.rating is not None else []
    if params.allocation_strength is not None:
        exact = Fraction(str(params.allocation_strength))
        words.append(exact if row.rating is None else float(exact))
    sizes = [sum(number * size for number, size in linears) for linears in groups]
    return settle(function_of(row.function)(params.share, sizes, *words), params.share, groups)
