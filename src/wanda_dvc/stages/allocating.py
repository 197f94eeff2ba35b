"""The sparsity of each block or linear, as `allocation` says."""

from collections.abc import Iterator, Mapping, Sequence

from wanda_dvc.engine.checkpoint import Checkpoint
from wanda_dvc.pruning import choose
from wanda_dvc.pruning.gram import Gram
from wanda_dvc.pruning.statistics import BlockStats
from wanda_dvc.stages.inputs import Statistics, with_fisher
from wanda_dvc.stages.running import progress
from wanda_dvc.study.project import Project
from wanda_dvc.study.tensors import read_grams, read_stats


def allocate(project: Project, stats: Statistics, checkpoint: Checkpoint) -> Sequence[choose.Share]:
    """Return the share of each block's weights that goes, or of each of its linears'.

    They are rated on the dense model's statistics.
    """
    plan = project.params.plan
    allocation = plan.allocation

    def blocks() -> Iterator[tuple[BlockStats, Mapping[str, Gram]]]:
        for block in progress(range(stats.blocks), total=stats.blocks, what="mask, blocks rated"):
            grams = read_grams(project.gram, block) if allocation.needs == "gram" else {}
            measured = read_stats(project.stats, block)
            yield with_fisher(project, block, measured) if allocation.needs == "fisher" else measured, grams

    return choose.allocate(
        checkpoint.weight,
        blocks(),
        stats.blocks,
        allocation=allocation,
        share=plan.share,
        group=plan.group,
        strength=plan.strength,
    )
