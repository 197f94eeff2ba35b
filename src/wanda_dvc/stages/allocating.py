"""The sparsity of each block, as `allocation` says."""

from collections.abc import Iterator, Mapping
from fractions import Fraction

from wanda_dvc.catalog import ALLOCATIONS
from wanda_dvc.engine.checkpoint import Checkpoint
from wanda_dvc.pruning import choose
from wanda_dvc.pruning.gram import Gram
from wanda_dvc.pruning.statistics import BlockStats
from wanda_dvc.stages.inputs import Statistics
from wanda_dvc.stages.running import progress
from wanda_dvc.study.project import Project
from wanda_dvc.study.tensors import read_grams, read_stats


def allocate(project: Project, stats: Statistics, checkpoint: Checkpoint) -> list[Fraction]:
    """Return the share of each block's weights that goes. Blocks are rated on the dense model's statistics."""
    params = project.params
    allocation = ALLOCATIONS[params.allocation]

    def blocks() -> Iterator[tuple[BlockStats, Mapping[str, Gram]]]:
        for block in progress(range(stats.blocks), total=stats.blocks, what="mask, blocks rated"):
            grams = read_grams(project.gram, block) if allocation.needs == "gram" else {}
            yield read_stats(project.stats, block), grams

    return choose.allocate(
        checkpoint.weight,
        blocks(),
        stats.blocks,
        allocation=allocation,
        share=params.share,
        group=params.group,
        strength=params.allocation_strength,
    )
