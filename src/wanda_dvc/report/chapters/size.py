"""The chapter on a model's bytes with its zeros left out."""

import math

from wanda_dvc.pruning.patterns import parse_pattern
from wanda_dvc.report import charts
from wanda_dvc.report.charts import Point
from wanda_dvc.report.pages import Content, Picture, table
from wanda_dvc.report.rows import Row
from wanda_dvc.report.section import Section
from wanda_dvc.study.markup import number

DENSE = "models/dense"


def content(section: Section) -> Content:
    """The table, and perplexity against bytes."""
    dense, size = section.dense.perplexity, section.rows[0].outs.get(DENSE, {}).get("size")

    def point(row: Row) -> Point | None:
        stored, value = stored_bytes(row), row.pruned.perplexity
        name = row.pattern.strip() or row.sparsity
        return Point(stored / 1e6, value, name=name) if stored and isinstance(value, float) else None

    rows = [["dense", f"{size / 1e6:,.1f}", "100.0", number(dense)]] if size else []
    for row in section.ordered:
        if stored := stored_bytes(row):
            share = f"{100 * stored / row.outs[DENSE]['size']:.1f}"
            rows.append([section.name(row), f"{stored / 1e6:,.1f}", share, number(row.pruned.perplexity)])
    if not rows:
        return []
    caption = (
        "The model's size if its zeros were left out. Assumed: unstructured, one bit a weight for where zeros stand "
        "and the values that stay; n:m, the values that stay and ⌈log₂ m⌉ bits each for their place. The files that "
        "`apply` writes hold the zeros and are no smaller."
    )
    parts: Content = [table(caption, ["", "MB", "% of dense", "perplexity"], rows)]
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
    """The model's bytes if zeros were left out; None if the sparsity or the dense size is unknown.

    Unstructured: each linear as one bit a weight, and the values that stay. n:m: the values that stay, each with
    ⌈log₂ m⌉ bits for its place among m (2:4 as sparse tensor cores read it). Everything else is unchanged.
    """
    linears, total = row.plot("sparsity"), row.outs.get(DENSE, {}).get("size")
    if not linears or not total:
        return None
    pattern = parse_pattern(row.params.pattern)
    for line in linears:
        weights, zeros, size = int(line["weights"]), int(line["zeros"]), int(line["bytes"])
        kept = weights - zeros
        places = kept * math.ceil(math.log2(pattern[1])) if pattern else weights
        total += kept * (size // weights) + math.ceil(places / 8) - size
    return int(total)
