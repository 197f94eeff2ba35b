"""The chapter on the divergence from the dense model: a table, and pictures against sparsity."""

from wanda_dvc.reading import DIVERGED
from wanda_dvc.report import charts
from wanda_dvc.report.charts import Point
from wanda_dvc.report.formatting import DASH
from wanda_dvc.report.pages import Content, Picture, table
from wanda_dvc.report.rows import Row
from wanda_dvc.report.section import Section
from wanda_dvc.study.files import Json

CAPTION = (
    "Predictions of each next token, against the dense model on the same windows: the divergence KL(dense ‖ pruned) in "
    "nats, the share of positions where both predict the same token, and the root mean square of the change of the "
    "true token's probability, in points. Intervals are 95 % over windows (t)."
)
BARS = "Bars are 95 % intervals over windows."
COLUMNS = ["divergence", "interval", "median", "99 %", "largest", "agreement, %", "interval", "true token, points"]


def content(section: Section) -> Content:
    """The table and the pictures of each text."""
    return [part for text in section.texts for part in _on_text(section.on(text), section.about(text))]


def _on_text(section: Section, about: str) -> Content:
    on, title = (about and f"{word} {about}" for word in ("On", ", on"))
    measured = [row for row in section.ordered if row.pruned.divergence]
    if not measured:
        return [f"{on and f'{on}: '}No experiment was compared with the dense model."]
    parts: Content = [
        table(f"{on and f'{on}. '}{CAPTION}", ["", *COLUMNS], [[section.name(row), *_cells(row)] for row in measured])
    ]
    if points := section.points(_divergence):
        figure = charts.curves(points, y_label="divergence, nats, log scale", level=None, log=True)
        parts.append(Picture(f"{section.prefix}divergence", f"Divergence against sparsity{title}", BARS, figure))
    if points := section.points(lambda row: _point(row, "top1_agreement", 100)):
        figure = charts.curves(points, y_label="top-1 agreement, %", level=None, log=False)
        parts.append(Picture(f"{section.prefix}agreement", f"Agreement against sparsity{title}", BARS, figure))
    return parts


def _cells(row: Row) -> list[str]:
    found = row.pruned.divergence
    if found["divergence"] == DIVERGED:
        return [DIVERGED, *[DASH] * (len(COLUMNS) - 1)]
    kl, agreed = found["divergence"], found["top1_agreement"]
    return [
        f"{kl['mean']:.4f}",
        _ends(kl, "{:.4f}"),
        *(f"{kl[key]:.4f}" for key in ("median", "p99", "largest")),
        f"{100 * agreed['mean']:.1f}",
        _ends({key: 100 * value for key, value in agreed.items()}, "{:.1f}"),
        f"{100 * found['rms_probability_change']:.1f}",
    ]


def _ends(measure: Json, form: str) -> str:
    return f"{form.format(measure['low'])} to {form.format(measure['high'])}" if "low" in measure else DASH


def _divergence(row: Row) -> Point | None:
    """A point at the row's sparsity; None if it was not measured, or is 0, which a log scale does not have."""
    point = _point(row, "divergence", 1)
    return None if point and point.y == 0 else point


def _point(row: Row, name: str, factor: float) -> Point | None:
    measure = row.pruned.divergence.get(name)
    if measure is None:
        return None
    if measure == DIVERGED:
        return Point(100 * row.params.sparsity, None)
    mean, low, high = (factor * measure[key] if key in measure else None for key in ("mean", "low", "high"))
    return Point(100 * row.params.sparsity, mean, low, high)
