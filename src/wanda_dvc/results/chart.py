"""The report's charts, drawn by matplotlib."""

import io
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler
from matplotlib.ticker import LogLocator

from wanda_dvc.results.intervals import Estimate
from wanda_dvc.results.measures import LOG, Measure, Results

# Curves differ in colour and marker, for colour-blind eyes.
CURVES = cycler(color=mpl.color_sequences["petroff6"], marker=["o", "s", "D", "^", "v", "P"])
LOOK: dict[Any, Any] = {  # whatever the reader's matplotlibrc says
    "axes.prop_cycle": CURVES, "axes.grid": True, "text.parse_math": False, "svg.hashsalt": "wanda-dvc",
}  # fmt: skip


@mpl.rc_context(LOOK)
def chart(measure: Measure, target: str, points: Sequence[tuple[str, float, Results]], dense: Results) -> Figure:
    """Draw a measure against sparsity, with intervals, and a line of the dense model.

    A point is the label of its curve, a sparsity, and results. Values that are not finite are left out.
    """
    figure = Figure(figsize=(6, 3.5))
    ax = figure.subplots()
    curves: dict[str, list[tuple[float, Estimate]]] = {}
    for label, sparsity, results in points:
        curve, value = curves.setdefault(label, []), measure.read(results, target)
        if isinstance(value, Estimate):
            curve.append((100 * sparsity, value))
    for label, curve in curves.items():
        x = [sparsity for sparsity, _ in curve]
        (line,) = ax.plot(x, [value.value for _, value in curve], label=label)
        ax.vlines(x, [value.low for _, value in curve], [value.high for _, value in curve], line.get_color())
    value = measure.read(dense, target)
    if isinstance(value, Estimate):
        ax.axhline(value.value, color="grey", label="dense")
    ax.set_yscale(measure.scale)
    if measure.scale == LOG:
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    ax.yaxis.set_major_formatter(lambda tick, _: measure.form(tick))
    ax.minorticks_off()
    ax.set_xlabel("sparsity, %")
    ax.set_ylabel(measure.heading("", one_text=True))
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16))
    return figure


@mpl.rc_context(LOOK)
def svg(figure: Figure) -> str:
    """Return a chart as SVG, byte-identical for equal charts."""
    content = io.StringIO()
    figure.savefig(content, format="svg", metadata={"Date": None}, bbox_inches="tight")
    return content.getvalue()
