"""Input norms by distinct input, for pictures and for `wanda-dvc stats`."""

from pathlib import Path

from wanda_dvc.report.charts import InputNorms
from wanda_dvc.study.tensors import block_count, read_stats


def input_norms(folder: Path) -> list[InputNorms]:
    """Return the norms of a set of statistics, by distinct input, over the blocks."""
    from wanda_dvc.pruning.statistics import outliers

    found: dict[str, InputNorms] = {}
    for block in range(block_count(folder, "calibrate")):
        stats = read_stats(folder, block)
        for name, x in stats.inputs.items():
            norm = x.norm
            one = found.setdefault(stats.label(name), InputNorms(stats.label(name), [], [], [], [], [], len(norm)))
            one.blocks.append(block)
            for values, share in ((one.low, 0.05), (one.median, 0.5), (one.high, 0.95)):
                values.append(norm.quantile(share).item())
            above = outliers(norm).nonzero().flatten().tolist()
            one.outliers.extend((block, feature, norm[feature].item()) for feature in above)
    return list(found.values())
