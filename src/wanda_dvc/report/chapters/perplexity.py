"""The chapter on perplexity: a table of the methods, and two pictures against sparsity."""

import itertools

from wanda_dvc.report import charts
from wanda_dvc.report.charts import Point
from wanda_dvc.report.formatting import DASH, number, title
from wanda_dvc.report.measures import DIVERGED, pruned
from wanda_dvc.report.pages import Content, Table, literal, picture
from wanda_dvc.report.rows import Row
from wanda_dvc.report.section import Section


def content(section: Section) -> Content:
    """The table and the pictures."""
    absolute, increase = _absolute(section), _increase(section)
    lost = [literal(section.label(row)) for row in section.rows if pruned(row).diverged]
    said = f" Diverged, and so at the upper edge: {', '.join(lost)}." if lost else ""
    dense = section.dense_perplexity
    level = ("dense", dense) if isinstance(dense, float) else None
    parts: Content = [
        _table(section),
        picture(
            section.prefix + "perplexity",
            "Perplexity against sparsity",
            f"Log scale; bars are 95 % intervals over windows.{said}",
            charts.curves(absolute, y_label="perplexity, log scale", level=level, log=True),
        ),
    ]
    if any(increase.values()):
        parts.append(
            picture(
                section.prefix + "increase",
                "Increase over dense",
                f"How many times the dense model's perplexity; log scale, bars are 95 % paired intervals.{said}",
                charts.curves(increase, y_label="pruned / dense, log scale", level=("dense", 1.0), log=True),
            )
        )
    return parts


def _table(section: Section) -> Table:
    """Perplexity by place and method, and each method's improvement over the baseline.

    The baseline is the section's first method in the catalog's order.
    """
    baseline, *improved = section.methods
    rows = []
    for place in sorted({section.place(row) for row in section.rows}):
        here: dict[str, list[Row]] = {}
        for row in section.rows:
            if section.place(row) == place:
                here.setdefault(str(row.params.filled.method), []).append(row)
        for chosen in itertools.product(*here.values()):  # a line for each of several with the same parameters
            values = {str(row.params.filled.method): pruned(row).perplexity for row in chosen}
            names = [f" [{row.name}]" for row in chosen if len(here[str(row.params.filled.method)]) > 1]
            cells = [literal(place[1] + "".join(names)), number(section.dense_perplexity)]
            cells += [number(values.get(method)) for method in section.methods]
            cells += [_improvement(baseline, values.get(baseline), values.get(method)) for method in improved]
            rows.append(cells)
    headers = ["sparsity", "dense", *(literal(title(method)) for method in section.methods)]
    headers += [literal(f"{title(method)}'s improvement") for method in improved]
    return Table(_caption(baseline, improved), headers, rows)


def _caption(baseline: str, improved: list[str]) -> str:
    base, names = literal(title(baseline)), [literal(title(method)) for method in improved]
    if not names:
        return "Perplexity."
    if len(names) == 1:
        return f"Perplexity; the improvement is of {names[0]} over {base}, 1 − {names[0]} / {base}."
    return f"Perplexity; each improvement is of a method over {base}, 1 − method / {base}."


def _improvement(baseline: str, base: float | str | None, value: float | str | None) -> str:
    if isinstance(base, float) and isinstance(value, float):
        percent = 100 * (1 - value / base)
        return (f"{percent:.2f} %" if 99 < percent < 100 else f"{percent:.1f} %").replace("-", "−")
    return f"{DASH} ({literal(title(baseline))} diverged)" if base == DIVERGED and isinstance(value, float) else DASH


def _absolute(section: Section) -> dict[str, list[Point]]:
    found: dict[str, list[Point]] = {}
    for label, on_curve in section.curves.items():
        found[label] = []
        for row in on_curve:
            value, ends = pruned(row).perplexity, pruned(row).perplexity_interval()
            if value is not None:
                y = value if isinstance(value, float) else None
                found[label].append(Point(100 * row.params.sparsity, y, ends and ends.low, ends and ends.high))
    return found


def _increase(section: Section) -> dict[str, list[Point]]:
    dense = section.dense_perplexity
    if not isinstance(dense, float):
        return {}
    found: dict[str, list[Point]] = {}
    for label, on_curve in section.curves.items():
        found[label] = []
        for row in on_curve:
            value, ratio = pruned(row).perplexity, section.against_dense(row).ratio
            if value is not None:
                y = value / dense if isinstance(value, float) else None
                found[label].append(Point(100 * row.params.sparsity, y, ratio and ratio.low, ratio and ratio.high))
    return found
