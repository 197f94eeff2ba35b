"""The chapter on where weights were removed, and on the layer errors."""

from collections.abc import Iterable

from wanda_dvc.report import charts
from wanda_dvc.report.pages import Content, Picture
from wanda_dvc.report.section import Section


def content(section: Section) -> Content:
    """Pictures of sparsity and layer error by block."""
    return [*_sparsity(section), *_layer_errors(section)]


def _sparsity(section: Section) -> Content:
    series = {}
    for row in section.ordered:
        lines = [(int(line["block"]), int(line["zeros"]), int(line["weights"])) for line in row.plot("sparsity")]
        if lines:
            series[section.label(row)] = by_block(lines)
    if not series:
        return []
    caption = (
        "Measured on the pruned weights; the shade is from a block's least to its most pruned linear. Curves of one "
        "sparsity lie over each other."
    )
    figure = charts.by_block(series, y_label="sparsity, %", top=100)
    return [Picture(f"{section.prefix}sparsity", "Sparsity by block", caption, figure)]


def _layer_errors(section: Section) -> Content:
    """The layer errors by block, where Gram matrices are kept."""
    series = {}
    for row in section.ordered:
        if lines := [(int(line["block"]), float(line["error"]), 1) for line in row.plot("layer_error")]:
            series[section.label(row)] = by_block(lines)
    if not series:
        return []
    caption = (
        "How far a linear's output on the calibration text is off, ‖(W−Ŵ)X‖² / ‖WX‖², on the dense model's inputs. The "
        "shade is from a block's least to its largest."
    )
    figure = charts.by_block(series, y_label="layer error, %")
    return [Picture(f"{section.prefix}layer-error", "Layer error by block", caption, figure)]


def by_block(linears: Iterable[tuple[int, float, float]]) -> list[tuple[int, float, float, float]]:
    """From each linear's block, part and whole: each block's share in percent, and its linears' least and most."""
    blocks: dict[int, list[tuple[float, float]]] = {}
    for block, part, whole in linears:
        blocks.setdefault(block, []).append((part, whole))
    points = []
    for block, found in sorted(blocks.items()):
        shares = [100 * part / whole for part, whole in found]
        mean = 100 * sum(part for part, _ in found) / sum(whole for _, whole in found)
        points.append((block, mean, min(shares), max(shares)))
    return points
