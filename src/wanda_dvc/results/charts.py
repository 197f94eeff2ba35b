"""The report's pictures, drawn by matplotlib as SVG. Series also differ in marker and dash, for colour-blind eyes."""

import io
from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from textwrap import wrap
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from wanda_dvc.study.markup import SIGN

COLOURS = ("#0072b2", "#d55e00", "#007a5a", "#b4568c", "#8a6d00", "#3f93c4")  # Okabe and Ito's, dark enough for text
MARKERS, DASHES = "osD^vPX*", ("-", "--", ":", "-.")
MUTED, LINE = "#6b6b6b", "#d5d5d5"
LEGEND = 72  # characters of a legend's line
LOOK: dict[Any, Any] = {  # for any settings of matplotlib
    "text.parse_math": False,  # a name with dollar signs is not a formula
    "font.size": 9, "axes.labelsize": 10, "axes.edgecolor": MUTED, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.grid.axis": "y", "grid.color": LINE, "grid.linewidth": 0.6,
    "legend.frameon": False, "legend.handlelength": 3, "svg.hashsalt": SIGN,
}  # fmt: skip


class Point(NamedTuple):
    """A point on a curve with its interval; without a value it has diverged."""

    x: float
    y: float | None
    low: float | None = None
    high: float | None = None


def svg(figure: Figure) -> str:
    """Return the picture as an SVG file, byte-identical for equal figures."""
    buffer = io.StringIO()
    with mpl.rc_context(LOOK):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": SIGN})
    return buffer.getvalue()


@mpl.rc_context(LOOK)
def curves(
    series: Mapping[str, Sequence[Point]], *, label: str, level: tuple[str, float] | None = None, log: bool = False
) -> Figure:
    """Draw a measure against sparsity in percent, with intervals; diverged points are labelled at the upper edge.

    Points of one sparsity are drawn side by side. `level` is a named horizontal line.
    """
    figure, [[ax]] = _figure(1)
    points = [point for on_curve in series.values() for point in on_curve]
    if log:
        values = [value for point in points for value in point[1:] if value is not None]
        _log_scale(ax, [*values, *([level[1]] if level else [])])
    if level:
        ax.axhline(level[1], color=MUTED, linewidth=1.2, label=level[0])
    ticks = sorted({point.x for point in points})
    for index, (name, on_curve) in enumerate(series.items()):
        look, shift = _look(index), 0.35 * (index - (len(series) - 1) / 2)
        there = [point._replace(x=point.x + shift) for point in on_curve if point.y is not None]
        xs, ys = [point.x for point in there], [point.y for point in there]
        ax.plot(xs, ys, **look, markersize=6, linewidth=1.5, label=name)  # type: ignore[arg-type]
        for x, _, low, high in there:
            if low is not None and high is not None:
                ax.vlines(x, low, high, color=look["color"], linewidth=2.5, alpha=0.55)
        for x in [point.x + shift for point in on_curve if point.y is None]:
            _mark_diverged(ax, x, name, index, left=x < (ticks[0] + ticks[-1]) / 2)
    ax.set_xticks(ticks, [f"{tick:g} %" for tick in ticks])
    ax.margins(x=0.12)
    ax.set_xlabel("sparsity of the linears")
    ax.set_ylabel(label)
    return _legend(figure)


@mpl.rc_context(LOOK)
def by_block(measures: Mapping[str, Mapping[str, Sequence[tuple[int, float, float, float]]]]) -> Figure:
    """Draw a panel for each measure and in it a curve for each model: its mean and range over a block's linears."""
    figure, rows = _figure(len(measures))
    order = list(dict.fromkeys(name for series in measures.values() for name in series))  # a model has one colour
    for [ax], (label, series) in zip(rows, measures.items(), strict=True):
        for name, points in series.items():
            look, (blocks, means, lows, highs) = _look(order.index(name)), zip(*points, strict=True)
            ax.plot(blocks, means, **look, markersize=3.5, linewidth=1.2, label=name)
            ax.fill_between(blocks, lows, highs, color=look["color"], alpha=0.2, linewidth=0)
        ax.set_ylim(bottom=0)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_ylabel(label)
    rows[-1][0].set_xlabel("block")
    return _legend(figure)


def _figure(panels: int) -> tuple[Figure, list[list[Axes]]]:
    """Make a figure of panels above each other. A page shows it at most twice its size, a phone at its own size."""
    figure = Figure(figsize=(5.2, 2.9 * panels), layout="constrained")
    return figure, figure.subplots(panels, 1, squeeze=False).tolist()


def _look(index: int) -> dict[str, Any]:
    """Return the colour, marker and dash of a series by index."""
    parts = {"color": COLOURS, "marker": MARKERS, "linestyle": DASHES}
    return {part: next(islice(cycle(values), index, None)) for part, values in parts.items()}


def _legend(figure: Figure) -> Figure:
    """Draw one legend for all panels, with as many columns as its longest label allows."""
    handles: dict[str, Any] = {}
    for ax in figure.axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if handles:
        columns = max(1, min(4, LEGEND // (max(map(len, handles)) + 8)))
        figure.set_figheight(figure.get_figheight() + 0.22 * -(-len(handles) // columns))
        shown = ["\n".join(wrap(label, LEGEND - 8)) for label in handles]
        figure.legend(list(handles.values()), shown, loc="outside lower center", ncols=columns)
    return figure


def _log_scale(ax: Axes, values: Sequence[float]) -> None:
    """Set a log axis around all values above 0, with three readable ticks or more."""
    known = [value for value in values if value > 0]
    if not known:
        return
    low, high = min(known), max(known)
    ax.set_yscale("log")
    ax.set_ylim(low / (high / low) ** 0.08 / 1.05, high * (high / low) ** 0.12 * 1.05)
    low, high = ax.get_ylim()
    ax.yaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 2.5, 5, 10]))  # for a narrow range
    for subs in [(1, 2, 5)] if high / low < 100 else [(1, 2, 5), (1,)]:  # the sparsest that suffices
        locator = LogLocator(subs=subs, numticks=12)
        if sum(low <= tick <= high for tick in locator.tick_values(low, high)) >= 3:
            ax.yaxis.set_major_locator(locator)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
    ax.yaxis.set_minor_formatter(NullFormatter())


def _tick(value: float) -> str:
    return f"{value:,.0f}" if 1 <= value < 1e6 and float(value).is_integer() else f"{value:.3g}"


def _mark_diverged(ax: Axes, x: float, name: str, index: int, *, left: bool) -> None:
    """Mark and label a point at the upper edge, with the labels of several series below one another."""
    look, edge = _look(index), ax.get_xaxis_transform()
    ax.plot([x], [1], marker=look["marker"], color=look["color"], markersize=8, transform=edge, clip_on=False)
    place, side = (8 if left else -8, -3 - 12 * index), "left" if left else "right"
    words: dict[str, Any] = {"ha": side, "va": "top", "color": look["color"]}
    ax.annotate(f"{name} diverged", (x, 1), place, xycoords=edge, textcoords="offset points", **words)
