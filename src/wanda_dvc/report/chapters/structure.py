"""The chapter on where weights were removed, and on the input norms that methods read."""

from wanda_dvc.catalog import methods
from wanda_dvc.report import charts
from wanda_dvc.report.allocations import Result, against_uniform
from wanda_dvc.report.formatting import title
from wanda_dvc.report.measures import pruned
from wanda_dvc.report.norms import input_norms
from wanda_dvc.report.pages import Content, Items, Text, literal, picture
from wanda_dvc.report.rows import Row
from wanda_dvc.report.section import Section, sparsity
from wanda_dvc.study.tensors import block_count


def content(section: Section) -> Content:
    """Pictures of sparsity by block, and of the norms of each set of statistics."""
    parts: Content = []
    series = {section.label(row): _by_block(row) for row in section.ordered if row.plot("sparsity")}
    if series:
        parts.append(
            picture(
                section.prefix + "sparsity",
                "Sparsity by block",
                "Measured on the pruned weights; the shade is from a block's least to its most pruned linear. Curves "
                "of one sparsity lie over each other.",
                charts.by_block(series, y_label="sparsity, %", top=100),
            )
        )
    parts += _allocations(section)
    parts += _layer_errors(section)
    by_stats: dict[str, Row] = {}
    for row in section.rows:
        if row.whole("stats") and block_count(row.study.stats, "calibrate"):
            by_stats.setdefault(row.hashes.get("stats", row.name), row)
    spared = _spared(section)
    for count, row in enumerate(by_stats.values()):
        inputs = input_norms(row.study.stats)
        found = sum(len(one.outliers) for one in inputs)
        total = sum(one.total for one in inputs)
        named = f" of {literal(section.series(row))}" if len(by_stats) > 1 else ""
        parts.append(
            picture(
                f"{section.prefix}norms{count or ''}",
                f"Input norms by block and feature{named}",
                f"Above: the norms ‖X‖₂ of each distinct input. Below: which features are outliers, more than 6 times "
                f"their median ({found:,} of {total:,}, {100 * found / total:.2f} %).{spared}",
                charts.norms(inputs),
            )
        )
    return parts


def _allocations(section: Section) -> Content:
    """What each other allocation than `uniform` gives beside it; nothing where no two rows differ in that alone."""
    said = []
    for row, other in section.beside_uniform:
        results = against_uniform(Result.of(row.study), Result.of(other.study))
        if results:
            names = (literal(section.label(one)) for one in (row, other))
            said.append(f"{' against '.join(names)}: {results}.")
    return [Text("What an allocation gives beside `uniform`, all else equal:"), Items(said)] if said else []


def _layer_errors(section: Section) -> Content:
    """Pictures of the layer errors by block, and of perplexity against their mean, where Gram matrices are kept."""
    rows = [row for row in section.ordered if row.plot("layer_error")]
    if not rows:
        return []
    parts: Content = [
        picture(
            section.prefix + "layer-error",
            "Layer error by block",
            "How far a linear's output on the calibration text is off, ‖(W−Ŵ)X‖² / ‖WX‖², on the dense model's inputs. "
            "The shade is from a block's least to its largest.",
            charts.by_block({section.label(row): _errors_by_block(row) for row in rows}, y_label="layer error, %"),
        )
    ]
    series: dict[str, list[tuple[float, float, str]]] = {}
    for row in rows:
        errors, perplexity = [float(line["error"]) for line in row.plot("layer_error")], pruned(row).perplexity
        if isinstance(perplexity, float):
            point = (100 * sum(errors) / len(errors), perplexity, sparsity(row))
            series.setdefault(section.series(row), []).append(point)
    if sum(map(len, series.values())) > 2:
        parts.append(
            picture(
                section.prefix + "layer-error-perplexity",
                "Perplexity against the layer error",
                "The mean over all linears. Where points of different methods lie on one line, the layer error, which "
                "needs no run of the model, predicts the perplexity.",
                charts.perplexity_against(None, series, x_label="mean layer error, %"),
            )
        )
    return parts


def _errors_by_block(row: Row) -> list[tuple[int, float, float, float]]:
    blocks: dict[int, list[float]] = {}
    for line in row.plot("layer_error"):
        blocks.setdefault(int(line["block"]), []).append(100 * float(line["error"]))
    return [(block, sum(found) / len(found), min(found), max(found)) for block, found in sorted(blocks.items())]


def _spared(section: Section) -> str:
    """Which methods of the section use the norms, as a sentence; empty if none does."""
    names = [title(method) for method in section.methods if methods()[method].needs == "norms"]
    if not names:
        return ""
    return literal(f" {' and '.join(names)} {'spare' if len(names) > 1 else 'spares'} the weights that read them.")


def _by_block(row: Row) -> list[tuple[int, float, float, float]]:
    blocks: dict[int, list[tuple[int, int]]] = {}
    for line in row.plot("sparsity"):
        blocks.setdefault(int(line["block"]), []).append((int(line["zeros"]), int(line["weights"])))
    return [of_block(block, linears) for block, linears in sorted(blocks.items())]


def of_block(block: int, linears: list[tuple[int, int]]) -> tuple[int, float, float, float]:
    """From each linear's zeros and weights: the block, its sparsity in percent, and its linears' least and most."""
    fractions = [100 * zeros / weights for zeros, weights in linears]
    mean = 100 * sum(zeros for zeros, _ in linears) / sum(weights for _, weights in linears)
    return block, mean, min(fractions), max(fractions)
