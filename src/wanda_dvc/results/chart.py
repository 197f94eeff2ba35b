"""The report's charts, drawn by matplotlib."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler
from matplotlib.ticker import LogFormatter, PercentFormatter

from wanda_dvc.results.intervals import Estimate

# Curves differ in colour, marker and dash, for colour-blind eyes. The colours are Okabe and Ito's.
CURVES = cycler(
    color=["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"],
    marker=["o", "s", "D", "^", "v", "P"],
    linestyle=["-", "--", ":", "-.", "-", "--"],
)
LOOK: dict[Any, Any] = {  # whatever the reader's matplotlibrc says
    "axes.prop_cycle": CURVES, "axes.grid": True, "text.parse_math": False, "svg.hashsalt": "wanda-dvc",
}  # fmt: skip


@mpl.rc_context(LOOK)
def chart(series: Mapping[str, Sequence[tuple[float, Estimate]]], label: str, *, level: float, log: bool) -> Figure:
    """Draw a measure against sparsity: a curve with intervals for each series of points (sparsity, value).

    Values that are NaN are left out. `level` is the dense model's value, `log` is of the vertical axis.
    """
    figure = Figure(figsize=(6, 3.5))
    ax = figure.subplots()
    for name, points in series.items():
        values = [value for _, value in points]
        # Unknown ends are NaN: no bar, because max(0, NaN) is 0. matplotlib leaves out an infinite end.
        below = [max(0, value.value - value.low) for value in values]
        above = [max(0, value.high - value.value) for value in values]
        x = [100 * sparsity for sparsity, _ in points]
        ax.errorbar(x, [value.value for value in values], (below, above), label=name, capsize=3)
    if not math.isnan(level):
        ax.axhline(level, color="grey", label="dense")
    if log:
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter(LogFormatter(minor_thresholds=(2, 0.5)))  # plain numbers
        ax.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    else:  # an accuracy
        ax.yaxis.set_major_formatter(PercentFormatter(1))
    ax.set_xlabel("sparsity, %")
    ax.set_ylabel(label)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16))
    return figure


@mpl.rc_context(LOOK)
def svg(figure: Figure) -> str:
    """Return a chart as SVG in base64, byte-identical for equal charts."""
    content = io.BytesIO()
    figure.savefig(content, format="svg", metadata={"Date": None}, bbox_inches="tight")
    return base64.b64encode(content.getvalue()).decode()
