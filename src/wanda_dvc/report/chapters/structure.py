"""The chapter on the places of removed weights, layer errors, and a model's bytes without its zeros."""

import math
from collections.abc import Iterable, Mapping

from wanda_dvc.catalog import parse_pattern
from wanda_dvc.report import charts
from wanda_dvc.report.charts import Point
from wanda_dvc.report.pages import Content, Picture, bullets, table
from wanda_dvc.report.rows import Row
from wanda_dvc.report.section import Section
from wanda_dvc.study.card import what_was_pruned
from wanda_dvc.study.files import load_json
from wanda_dvc.study.markup import number

DENSE, PRUNED = "models/dense", "models/pruned"


def content(section: Section) -> Content:
    """Pictures of sparsity and layer error by block, and the table of sizes with its picture."""
    return [*_removed(section), *_sparsity(section), *_layer_errors(section), *_sizes(section)]


def _removed(section: Section) -> Content:
    """Return a sentence for each smaller model."""
    said = []
    for row in section.ordered:
        if row.removed is not None:
            share = load_json(row.study.metrics("pruned", "sparsity"))["sparsity"]
            said.append(f"{section.name(row)}: {what_was_pruned(row.params.pattern, share, row.removed)}.")
    return [bullets(said)] if said else []


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
    """Return the layer errors by block, if Gram matrices exist."""
    series = {}
    for row in section.ordered:
        if lines := [(int(line["block"]), float(line["error"]), 1) for line in row.plot("layer_error")]:
            series[section.label(row)] = by_block(lines)
    if not series:
        return []
    caption = (
        "Layer error: ‖(W−Ŵ)X‖² / ‖WX‖² of a linear on the calibration text, with the dense model's inputs. The shade "
        "is from a block's least to its largest."
    )
    figure = charts.by_block(series, y_label="layer error, %")
    return [Picture(f"{section.prefix}layer-error", "Layer error by block", caption, figure)]


def by_block(linears: Iterable[tuple[int, float, float]]) -> list[tuple[int, float, float, float]]:
    """Return blocks' shares in percent, with least and most of the linears, from each linear's (block, part, total)."""
    blocks: dict[int, list[tuple[float, float]]] = {}
    for block, part, total in linears:
        blocks.setdefault(block, []).append((part, total))
    points = []
    for block, found in sorted(blocks.items()):
        shares = [100 * part / total for part, total in found]
        mean = 100 * sum(part for part, _ in found) / sum(total for _, total in found)
        points.append((block, mean, min(shares), max(shares)))
    return points


def _sizes(section: Section) -> Content:
    """Return the table of bytes, and the picture of perplexity by bytes."""
    dense, size = section.dense.perplexity, section.rows[0].outs.get(DENSE, {}).get("size")

    def point(row: Row) -> Point | None:
        stored, value = stored_bytes(row), row.pruned.perplexity
        return Point(stored / 1e6, value, name=row.amount) if stored and isinstance(value, float) else None

    rows = [["dense", f"{size / 1e6:,.1f}", "100.0", number(dense)]] if size else []
    for row in section.ordered:
        if stored := stored_bytes(row):
            share = f"{100 * stored / row.outs[DENSE]['size']:.1f}"
            rows.append([section.name(row), f"{stored / 1e6:,.1f}", share, number(row.pruned.perplexity)])
    if not rows:
        return []
    on = f", {section.about(section.texts[0])}" if len(section.texts) > 1 else ""
    caption = (
        "The model's size without its zeros. Unstructured: the remaining values, and one bit a weight for the mask. "
        "n:m: the remaining values, and ⌈log₂ m⌉ bits each for their position. The files of `apply` contain the zeros "
        "and are no smaller. Neurons, heads, blocks, experts: the files of `apply`, which are smaller."
    )
    parts: Content = [table(caption, ["", "MB", "% of dense", f"perplexity{on}"], rows)]
    if series := section.points(point):
        if size and isinstance(dense, float):
            series["dense"] = [Point(size / 1e6, dense)]
        x_label, y_label = "megabytes of the model, zeros left out", "perplexity, log scale"
        parts.append(
            Picture(
                f"{section.prefix}bytes",
                "Quality against bytes",
                "Perplexity on a log scale against the model's size with its zeros left out. A model that diverged is "
                "not shown.",
                charts.curves(series, x_label=x_label, y_label=y_label, log=True),
            )
        )
    return parts


def stored_bytes(row: Row) -> int | None:
    """Return the model's bytes without zeros; None if the sparsity or the dense size is unknown.

    A smaller model has the size of its directory.
    """
    if row.params.plan.structure:
        smaller: int | None = row.outs.get(PRUNED, {}).get("size")
        return smaller
    linears, total = row.plot("sparsity"), row.outs.get(DENSE, {}).get("size")
    return without_zeros(linears, total, row.params.pattern) if linears and total else None


def without_zeros(linears: Iterable[Mapping[str, str]], total: int, pattern: str) -> int:
    """Return a model's bytes without zeros, from the lines of metrics/plots/sparsity.csv and the dense model's bytes.

    Unstructured: each linear as one bit a weight, and the kept values. n:m: the kept values, each with ⌈log₂ m⌉ bits
    for its place among m (as sparse tensor cores read 2:4). All other tensors are unchanged.
    """
    n_of_m = parse_pattern(pattern)
    for line in linears:
        weights, zeros, size = int(line["weights"]), int(line["zeros"]), int(line["bytes"])
        kept = weights - zeros
        places = kept * math.ceil(math.log2(n_of_m[1])) if n_of_m else weights
        total += kept * (size // weights) + math.ceil(places / 8) - size
    return int(total)
