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
from wanda_dvc.results.measures import LOG, Measure, Results, Value

# Curves differ in colour and marker, for colour-blind eyes. The colours are Okabe and Ito's.
COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]
CURVES = cycler(color=COLORS, marker=["o", "s", "D", "^", "v", "P"])
LOOK: dict[Any, Any] = {  # whatever the reader's matplotlibrc says
    "axes.prop_cycle": CURVES, "axes.grid": True, "text.parse_math": False, "svg.hashsalt": "wanda-dvc",
}  # fmt: skip


@mpl.rc_context(LOOK)
def chart(
    measure: Measure, target: str, curves: Mapping[str, Sequence[tuple[float, Results]]], dense: Results
) -> Figure:
    """Draw a measure against sparsity: a curve with intervals for each label, and a line of the dense model.

    Values that are not finite are left out.
    """
    figure = Figure(figsize=(6, 3.5))
    ax = figure.subplots()
    for label, points in curves.items():
        values = [_number(measure.read(results, target)) for _, results in points]
        # Unknown ends are NaN: no bar, because max(0, NaN) is 0. matplotlib leaves out an infinite end.
        below = [max(0, value.value - value.low) for value in values]
        above = [max(0, value.high - value.value) for value in values]
        x = [100 * sparsity for sparsity, _ in points]
        ax.errorbar(x, [value.value for value in values], (below, above), label=label, capsize=3)
    ax.axhline(_number(measure.read(dense, target)).value, color="grey", label="dense")
    if measure.drawn == LOG:
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter(LogFormatter(minor_thresholds=(2, 0.5)))  # plain numbers
        ax.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    else:  # an accuracy
        ax.yaxis.set_major_formatter(PercentFormatter(1))
    ax.set_xlabel("sparsity, %")
    ax.set_ylabel(measure.title)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16))
    return figure


def _number(value: Value) -> Estimate:
    return value if isinstance(value, Estimate) else Estimate(math.nan)


@mpl.rc_context(LOOK)
def svg(figure: Figure) -> str:
    """Return a chart as SVG in base64, byte-identical for equal charts."""
    content = io.BytesIO()
    figure.savefig(content, format="svg", metadata={"Date": None}, bbox_inches="tight")
    return base64.b64encode(content.getvalue()).decode()
