"""The chapter on where weights were removed, the layer errors, and the input norms that recipes read."""

from collections.abc import Iterable

from wanda_dvc.report import charts
from wanda_dvc.report.charts import Point
from wanda_dvc.report.norms import input_norms
from wanda_dvc.report.pages import Content, Picture
from wanda_dvc.report.rows import Row
from wanda_dvc.report.section import Section
from wanda_dvc.study.markup import inline
from wanda_dvc.study.tensors import block_count

STATS = "stats/norms"


def content(section: Section) -> Content:
    """Pictures of sparsity and layer error by block, and of the norms of each set of statistics."""
    return [*_sparsity(section), *_layer_errors(section), *_norms(section)]


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
    """Pictures of the layer errors by block, and of perplexity against their mean, where Gram matrices are kept."""
    lines = {id(row): [(int(x["block"]), float(x["error"])) for x in row.plot("layer_error")] for row in section.rows}
    rows = [row for row in section.ordered if lines[id(row)]]
    if not rows:
        return []

    def point(row: Row) -> Point | None:
        errors, perplexity = [error for _, error in lines[id(row)]], row.pruned.perplexity
        if not errors or not isinstance(perplexity, float):
            return None
        return Point(100 * sum(errors) / len(errors), perplexity, name=row.sparsity)

    series = {section.label(row): by_block((block, error, 1) for block, error in lines[id(row)]) for row in rows}
    caption = (
        "How far a linear's output on the calibration text is off, ‖(W−Ŵ)X‖² / ‖WX‖², on the dense model's inputs. The "
        "shade is from a block's least to its largest."
    )
    figure = charts.by_block(series, y_label="layer error, %")
    parts: Content = [Picture(f"{section.prefix}layer-error", "Layer error by block", caption, figure)]
    points = section.points(point)
    if sum(map(len, points.values())) > 2:
        caption = (
            "The mean over all linears. Where points of different recipes lie on one line, the layer error, which "
            "needs no run of the model, predicts the perplexity."
        )
        x_label, y_label = "mean layer error, %", "perplexity, log scale"
        figure = charts.curves(points, x_label=x_label, y_label=y_label, log=True)
        title = "Perplexity against the layer error"
        parts.append(Picture(f"{section.prefix}layer-error-perplexity", title, caption, figure))
    return parts


def _norms(section: Section) -> Content:
    """A picture of each set of statistics, and which recipes use it."""
    by_stats: dict[str, Row] = {}
    for row in section.rows:
        if row.whole(STATS) and block_count(row.study.stats, "calibrate"):
            by_stats.setdefault(row.outs.get(STATS, {}).get("md5", row.name), row)
    readers = {row.recipe[-1] for row in section.rows if row.params.plan.method.needs == "norms"}
    names = [inline(recipe) for recipe in section.recipes if recipe in readers]
    spared = f" {' and '.join(names)} spare{'s' * (len(names) == 1)} the weights that read them." if names else ""
    parts: Content = []
    for count, row in enumerate(by_stats.values()):
        inputs = input_norms(row.study.stats)
        found, total = sum(len(one.outliers) for one in inputs), sum(one.total for one in inputs)
        title = "Input norms by block and feature"
        if len(by_stats) > 1:
            title += f" of {inline(section.series(row))}"
        caption = (
            "Above: the norms ‖X‖₂ of each distinct input. Below: which features are outliers, more than 6 times their "
            f"median ({found:,} of {total:,}, {100 * found / total:.2f} %).{spared}"
        )
        parts.append(Picture(f"{section.prefix}norms{count or ''}", title, caption, charts.norms(inputs)))
    return parts


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
