"""The chapter on perplexity: a table of the recipes, and a picture against sparsity."""

from wanda_dvc.reading import DIVERGED
from wanda_dvc.report import charts
from wanda_dvc.report.charts import Point
from wanda_dvc.report.formatting import DASH
from wanda_dvc.report.pages import Content, Picture, table
from wanda_dvc.report.rows import Row
from wanda_dvc.report.section import Section
from wanda_dvc.study.markup import inline, number


def content(section: Section) -> Content:
    """The table and the picture of each text."""
    return [part for text in section.texts for part in _on_text(section.on(text), section.about(text))]


def _on_text(section: Section, about: str) -> Content:
    dense = section.dense.perplexity
    lost = [section.name(row) for row in section.rows if row.pruned.diverged]
    said = f" Diverged, shown at the upper edge: {', '.join(lost)}." if lost else ""
    level = ("dense", dense) if isinstance(dense, float) else None
    figure = charts.curves(section.points(_point), y_label="perplexity, log scale", level=level, log=True)
    caption = f"Log scale; bars are 95 % intervals over windows.{said}"
    title = f"Perplexity against sparsity{about and f', on {about}'}"
    return [_table(section, about), Picture(f"{section.prefix}perplexity", title, caption, figure)]


def _point(row: Row) -> Point | None:
    """A point at the row's sparsity, without a value if it diverged; None if it was not measured."""
    value, ends = row.pruned.perplexity, row.pruned.perplexity_interval()
    if value is None:
        return None
    y = value if isinstance(value, float) else None
    return Point(100 * row.params.sparsity, y, ends and ends.low, ends and ends.high)


def _table(section: Section, about: str) -> str:
    """Return perplexity by place and recipe, with improvements over the baseline, the first recipe of the catalog."""
    baseline, *improved = section.recipes
    rows = []
    for place in sorted({section.place(row) for row in section.rows}):
        here: dict[str, list[Row]] = {}
        for row in section.rows:
            if section.place(row) == place:
                here.setdefault(row.recipe[-1], []).append(row)
        for line in range(max(map(len, here.values()))):  # one for each of several with the same parameters
            chosen = [rows[line % len(rows)] for rows in here.values()]
            values = {row.recipe[-1]: row.pruned.perplexity for row in chosen}
            names = [f" [{row.name}]" for row in chosen if len(here[row.recipe[-1]]) > 1]
            cells = [inline(place[1] + "".join(names)), number(section.dense.perplexity)]
            cells += [number(values.get(recipe)) for recipe in section.recipes]
            cells += [_improvement(baseline, values.get(baseline), values.get(recipe)) for recipe in improved]
            rows.append(cells)
    headers = ["sparsity", "dense", *map(inline, section.recipes)]
    headers += [f"{inline(recipe)}'s improvement" for recipe in improved]
    base = inline(baseline)
    on = about and f" on {about}"
    caption = f"Perplexity{on}" + (f"; an improvement over {base} is 1 − perplexity / {base}'s." if improved else ".")
    return table(caption, headers, rows)


def _improvement(baseline: str, base: float | str | None, value: float | str | None) -> str:
    if isinstance(base, float) and isinstance(value, float):
        percent = 100 * (1 - value / base)
        return (f"{percent:.2f} %" if 99 < percent < 100 else f"{percent:.1f} %").replace("-", "−")
    return f"{DASH} ({inline(baseline)} diverged)" if base == DIVERGED and isinstance(value, float) else DASH
