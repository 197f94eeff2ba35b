"""The chapter on a model's bytes with its zeros left out."""

import math

from wanda_dvc.pruning.patterns import parse_pattern
from wanda_dvc.report import charts
from wanda_dvc.report.formatting import number
from wanda_dvc.report.measures import pruned
from wanda_dvc.report.pages import Content, Table, literal, picture
from wanda_dvc.report.rows import Row
from wanda_dvc.report.section import Section, sparsity


def content(section: Section) -> Content:
    """The table, and perplexity against bytes."""
    dense, size = section.dense_perplexity, section.rows[0].sizes.get("models/dense")
    series: dict[str, list[tuple[float, float, str]]] = {}
    rows = [["dense", f"{size / 1e6:,.1f}", "100.0", number(dense)]] if size else []
    for label, on_curve in section.curves.items():
        for row in on_curve:
            stored, value = stored_bytes(row), pruned(row).perplexity
            if stored is None:
                continue
            share = f"{100 * stored / row.sizes['models/dense']:.1f}"
            rows.append([literal(section.label(row)), f"{stored / 1e6:,.1f}", share, number(value)])
            if isinstance(value, float):
                short = sparsity(row) if row.params.pattern == "unstructured" else row.params.pattern
                series.setdefault(label, []).append((stored / 1e6, value, short))
    if not rows:
        return []
    caption = (
        "The model's size if its zeros were left out. Assumed: unstructured, one bit a weight for where zeros stand "
        "and the values that stay; n:m, the values that stay and ⌈log₂ m⌉ bits each for their place. The files that "
        "`apply` writes hold the zeros and are no smaller."
    )
    parts: Content = [Table(caption, ["", "MB", "% of dense", "perplexity"], rows)]
    if series:
        at_dense = (size / 1e6, dense) if size and isinstance(dense, float) else None
        parts.append(
            picture(
                section.prefix + "bytes",
                "Quality against bytes",
                "Perplexity on a log scale against the model's size with its zeros left out. A model that diverged is "
                "not shown.",
                charts.perplexity_against(at_dense, series, x_label="megabytes of the model, zeros left out"),
            )
        )
    return parts


def stored_bytes(row: Row) -> int | None:
    """The model's bytes if zeros were left out; None if the sparsity or the dense size is unknown.

    Unstructured: each linear as one bit a weight, and the values that stay. n:m: the values that stay, each with
    ⌈log₂ m⌉ bits for its place among m (2:4 as sparse tensor cores read it). Everything else is unchanged.
    """
    linears, dense = row.plot("sparsity"), row.sizes.get("models/dense")
    if not linears or not dense:
        return None
    pattern = parse_pattern(row.params.pattern)
    total = dense
    for line in linears:
        weights, zeros, size = int(line["weights"]), int(line["zeros"]), int(line["bytes"])
        kept = weights - zeros
        places = kept * math.ceil(math.log2(pattern[1])) if pattern else weights
        total += kept * (size // weights) + math.ceil(places / 8) - size
    return total
