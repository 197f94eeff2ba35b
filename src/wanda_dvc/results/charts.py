"""The report's pictures, drawn by matplotlib as SVG. Series also differ in marker and dash, for colour-blind eyes."""

import io
import math
from collections.abc import Mapping, Sequence
from textwrap import wrap
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from wanda_dvc.study.markup import SIGN

COLOURS = ("#0072b2", "#d55e00", "#007a5a", "#b4568c", "#8a6d00", "#3f93c4")  # Okabe and Ito's, dark enough for text
MARKERS, DASHES = "osD^vPX*", ("-", "--", ":", "-.")
MUTED, LINE = "#6b6b6b", "#d5d5d5"
LEGEND = 64  # characters of a legend's line
LOOK: dict[Any, Any] = {  # for any settings of matplotlib
    "text.parse_math": False,  # a name with dollar signs is not a formula
    "font.size": 9, "axes.labelsize": 10, "axes.edgecolor": MUTED, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.grid.axis": "y", "grid.color": LINE, "grid.linewidth": 0.6,
    "legend.frameon": False, "legend.handlelength": 3, "svg.hashsalt": SIGN,
}  # fmt: skip


class Point(NamedTuple):
    """A point on a curve, with its interval if known. A value that is NaN has diverged."""

    x: float
    y: float
    low: float = math.nan
    high: float = math.nan


def svg(figure: Figure) -> str:
    """Return the picture as an SVG file, byte-identical for equal figures."""
    buffer = io.StringIO()
    with mpl.rc_context(LOOK):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": SIGN})
    return buffer.getvalue()


@mpl.rc_context(LOOK)
def curves(
    series: Mapping[str, Sequence[Point]],
    *,
    across: str,
    label: str,
    level: tuple[str, float] | None = None,
    log: bool = False,
) -> Figure:
    """Draw a curve for each series, with intervals; diverged points are labelled at the upper edge.

    `across` and `label` name the axes, `level` is a named horizontal line, `log` is of the vertical axis.
    """
    figure = Figure(figsize=(5.2, 2.9), layout="constrained")  # a page shows it at most twice its size
    ax = figure.subplots()
    if level:
        ax.axhline(level[1], color=MUTED, linewidth=1.2, label=level[0])
    every = np.array([point for points in series.values() for point in points])
    for index, (name, points) in enumerate(series.items()):
        look: dict[str, Any] = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}
        x, y, low, high = np.array(points).T
        ends = np.maximum(0, [y - low, high - y])
        dashes, title = DASHES[index % len(DASHES)], "\n".join(wrap(name, LEGEND))
        ax.errorbar(x, y, ends, **look, linestyle=dashes, linewidth=1.5, elinewidth=2.5, label=title)
        for place in x[np.isnan(y)]:
            side = "left" if place < every[:, 0].mean() else "right"
            words: dict[str, Any] = {"ha": side, "va": "top", "color": look["color"], "in_layout": False}
            ax.annotate(
                f"{name} diverged", (place, 1), (0, -12 * index), ax.get_xaxis_transform(), "offset points", **words
            )
    values = [value for value in (*every[:, 1:].flat, *(level or ())[1:]) if value > 0]
    if log and values:
        ax.set_yscale("log")
        ticks = sorted({float(f"{tick:.3g}") for tick in np.geomspace(min(values), max(values), 5)})
        ax.set_yticks(ticks, [f"{tick:,g}" for tick in ticks])
        ax.yaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    ax.margins(0.08)
    ax.set_xlabel(across)
    ax.set_ylabel(label)
    figure.legend(loc="outside lower center", ncols=1 if max(map(len, series)) > LEGEND // 2 else 2)
    return figure
