"""Input norms by distinct input, for pictures and for `wanda-dvc stats`."""

from pathlib import Path
from typing import NamedTuple

from wanda_dvc.study.tensors import block_count, read_stats


class InputNorms(NamedTuple):
    """Distinct inputs of one label over all blocks: quantiles of norms, of experts the middle one, and outliers."""

    label: str
    blocks: list[int]
    low: list[float]  # the 5th percentile
    median: list[float]
    high: list[float]  # the 95th
    outliers: list[tuple[int, int, float, float]]  # block, feature, norm, and norm over the input's own median
    features: int  # of the widest
    total: int  # features of all of them


def input_norms(folder: Path) -> list[InputNorms]:
    """Return the norms of a set of statistics, by distinct inputs of one label, over the blocks."""
    import torch

    from wanda_dvc.pruning.statistics import outliers

    found: dict[str, InputNorms] = {}
    for block in range(block_count(folder, "calibrate")):
        stats = read_stats(folder, block)
        by_label: dict[str, list[torch.Tensor]] = {}
        for name, x in stats.inputs.items():
            by_label.setdefault(stats.label(name), []).append(x.norm)
        for label, norms in by_label.items():
            one = found.setdefault(label, InputNorms(label, [], [], [], [], [], 0, 0))
            one.blocks.append(block)
            for values, share in ((one.low, 0.05), (one.median, 0.5), (one.high, 0.95)):
                values.append(torch.stack([norm.quantile(share) for norm in norms]).quantile(0.5).item())
            for norm in norms:
                above, median = outliers(norm).nonzero().flatten().tolist(), norm.quantile(0.5)
                one.outliers.extend((block, at, norm[at].item(), (norm[at] / median).item()) for at in above)
            widest = max(one.features, *map(len, norms))
            found[label] = one._replace(features=widest, total=one.total + sum(map(len, norms)))
    return list(found.values())
