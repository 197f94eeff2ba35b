"""The report's pictures as SVG.

Pictures are drawn in the light colours. Each colour then becomes a CSS custom property, so that the picture follows
the reader's light or dark mode. Series also differ in marker and line style, for colour-blind readers.
"""

import io
import re
from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from textwrap import wrap
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, Locator, LogLocator, MaxNLocator, NullFormatter

from wanda_dvc.report.colours import LIGHT, SERIES, css

INK, MUTED, LINE = LIGHT["ink"], LIGHT["muted"], LIGHT["line"]
MARKERS, DASHES = "osD^vPX*", ("-", "--", ":", "-.")
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', sans-serif"
# Inches. Pages show a picture at up to twice its size, and at its own size on a phone, where its text stays readable.
WIDTH = 5.2
LEGEND = 72  # characters of a legend's line
OF_SPARSITY = "sparsity of the linears"
# The pictures' style, for any settings of matplotlib.
LOOK: dict[Any, Any] = {
    "text.parse_math": False,  # a name with dollar signs is not a formula
    "svg.fonttype": "none", "font.size": 9, "text.color": INK,
    "axes.labelcolor": INK, "axes.labelsize": 10, "axes.titlesize": 9, "axes.edgecolor": MUTED,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "axes.grid": True, "axes.grid.axis": "y", "grid.color": LINE, "grid.linewidth": 0.6,
    "xtick.color": INK, "ytick.color": INK, "legend.frameon": False, "legend.handlelength": 3,
}  # fmt: skip


class Point(NamedTuple):
    """A point on a curve, with its interval or range; without a value it has diverged."""

    x: float
    y: float | None
    low: float | None = None
    high: float | None = None
    name: str = ""  # the label next to it


Series = Mapping[str, Sequence[Point]]


# --- pictures as files ---


def svg(figure: Figure, name: str) -> str:
    """Return the picture as an SVG element for a page: real text, colours as custom properties, unique ids."""
    buffer = io.StringIO()
    with mpl.rc_context(LOOK | {"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
    _, box, drawn = re.split(r'<svg[^>]* viewBox="([^"]+)"[^>]*>', text)
    drawn = re.sub(r"<[^>]*>", lambda tag: _own_tag(tag[0], name), drawn)  # names between tags stay as they are
    return f'<svg viewBox="{box}" role="img">{drawn}'


def _own_tag(tag: str, name: str) -> str:
    """Return a tag of the picture with unique ids, the page's font and colours, and coordinates to 0.01 point."""
    tag = tag.replace("xlink:", "")
    tag = re.sub(r'\bid="|href="#|url\(#', rf"\g<0>{name}_", tag)
    tag = re.sub(r"font: ([\d.]+)px [^;\"]+", rf"font: \1px {FONT}", tag)
    tag = re.sub(r"(\d\.\d\d)\d+", r"\1", tag)
    for colour, light in LIGHT.items():
        tag = tag.replace(light, f"var(--{colour})")
    return tag


def standalone(picture: str) -> str:
    """Return the picture as a separate SVG file, with its own colours and background."""
    ground = f'<style>{css()}</style><rect width="100%" height="100%" fill="var(--paper)"/>'
    head, bracket, drawn = picture.partition(">")
    return f'{head} xmlns="http://www.w3.org/2000/svg"{bracket}{ground}{drawn}\n'


# --- shared by pictures ---


def _panels(count: int = 1, height: float = 3.1) -> tuple[Figure, list[Axes]]:
    """Make a figure of `count` panels in two columns with a shared vertical axis; `height` is a panel's, in inches."""
    columns, bands = min(2, count), -(-count // 2)
    figure = Figure(figsize=(WIDTH, height * bands), layout="constrained")
    panels = list(figure.subplots(bands, columns, squeeze=False, sharey=True).flat)
    for spare in panels[count:]:
        spare.set_visible(False)
    return figure, panels[:count]


def _style(index: int) -> dict[str, Any]:
    """Return the colour, marker and dash of a picture's series by index."""
    parts = {"color": [LIGHT[name] for name in SERIES], "marker": MARKERS, "linestyle": DASHES}
    return {part: next(islice(cycle(values), index, None)) for part, values in parts.items()}


def _legend(figure: Figure, order: Sequence[str] = ()) -> Figure:
    """Draw one legend for all axes, with as many columns as its longest label allows; labels of `order` are last."""
    unique: dict[str, Any] = {}
    for ax in figure.axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            unique.setdefault(label, handle)
    labels = sorted(unique, key=lambda label: order.index(label) if label in order else -1)
    if labels:
        columns = max(1, min(4, LEGEND // (max(map(len, labels)) + 8)))
        figure.set_figheight(figure.get_figheight() + 0.22 * -(-len(labels) // columns))
        shown = ["\n".join(wrap(label, LEGEND - 8)) for label in labels]
        figure.legend([unique[label] for label in labels], shown, loc="outside lower center", ncols=columns)
    return figure


def _log_scale(ax: Axes, values: Sequence[float]) -> None:
    """Set a log axis around all values above 0, with readable numbers as ticks."""
    known = [value for value in values if value > 0]
    if not known:
        return
    low, high = min(known), max(known)
    ax.set_yscale("log")
    ax.set_ylim(low / (high / low) ** 0.08 / 1.05, high * (high / low) ** 0.12 * 1.05)
    low, high = ax.get_ylim()
    steps = [(1, 2, 5)] if high / low < 100 else [(1,), (1, 2, 5)]
    locators: list[Locator] = [LogLocator(subs=subs, numticks=12) for subs in steps]
    # A narrow range holds too few of 1, 2, 5 and 10.
    locators.append(MaxNLocator(nbins=7, steps=[1, 2, 2.5, 5, 10]))
    enough = (one for one in locators if sum(low <= tick <= high for tick in one.tick_values(low, high)) >= 3)
    ax.yaxis.set_major_locator(next(enough, locators[-1]))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
    ax.yaxis.set_minor_formatter(NullFormatter())


def _tick(value: float) -> str:
    return f"{value:,.0f}" if 1 <= value < 1e6 and float(value).is_integer() else f"{value:.3g}"


# --- the report's pictures ---


@mpl.rc_context(LOOK)
def curves(
    series: Series, *, y_label: str, x_label: str = OF_SPARSITY, level: tuple[str, float] | None = None, log: bool
) -> Figure:
    """Draw curves with intervals; diverged points are at the upper edge, with a label.

    Points of one sparsity are drawn side by side.
    """
    figure, [ax] = _panels()
    points = [point for on_curve in series.values() for point in on_curve]
    if log:
        values = [value for point in points for value in point[1:4] if value is not None]
        _log_scale(ax, [*values, *([level[1]] if level else [])])
    if level:
        ax.axhline(level[1], color=MUTED, linewidth=1.2, label=level[0])
    ticks = sorted({point.x for point in points})
    for index, (label, on_curve) in enumerate(series.items()):
        look = _style(index)
        shift = 0.35 * (index - (len(series) - 1) / 2) if x_label == OF_SPARSITY else 0
        there = [(point.x + shift, point.y, *point[2:]) for point in on_curve if point.y is not None]
        ax.plot([x for x, *_ in there], [y for _, y, *_ in there], **look, markersize=6, linewidth=1.5, label=label)
        for x, y, low, high, name in there:
            if low is not None and high is not None:
                ax.vlines(x, low, high, color=look["color"], linewidth=2.5, alpha=0.55)
            if name:
                ax.annotate(name, (x, y), (5, 5), textcoords="offset points", fontsize=8, color=look["color"])
        for x in [point.x + shift for point in on_curve if point.y is None]:
            _mark_diverged(ax, x, label, index, left=x < (ticks[0] + ticks[-1]) / 2)
    if x_label == OF_SPARSITY:
        ax.set_xticks(ticks, [f"{tick:g} %" for tick in ticks])
    ax.margins(x=0.12)
    ax.set_xlabel(x_label)
    ax.set_ylabel(y_label)
    return _legend(figure)


def _mark_diverged(ax: Axes, x: float, label: str, index: int, *, left: bool) -> None:
    """Mark and label a point at the upper edge, with the labels of several series below one another."""
    look, edge = _style(index), ax.get_xaxis_transform()
    ax.plot([x], [1], marker=look["marker"], color=look["color"], markersize=8, transform=edge, clip_on=False)
    place = (8 if left else -8, -3 - 12 * index)
    words: dict[str, Any] = {"ha": "left" if left else "right", "va": "top", "color": look["color"]}
    ax.annotate(f"{label} diverged", (x, 1), place, xycoords=edge, textcoords="offset points", **words)


@mpl.rc_context(LOOK)
def by_block(
    series: Mapping[str, Sequence[tuple[int, float, float, float]]], *, y_label: str, top: float | None = None
) -> Figure:
    """Draw a measure by block: the mean and the range of its linears."""
    figure, [ax] = _panels()
    for index, (label, points) in enumerate(series.items()):
        look, (blocks, means, lows, highs) = _style(index), zip(*points, strict=True)
        ax.plot(blocks, means, **look, markersize=3.5, linewidth=1.2, label=label)
        ax.fill_between(blocks, lows, highs, color=look["color"], alpha=0.2, linewidth=0)
    ax.set_ylim(0, top)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("block")
    ax.set_ylabel(y_label)
    return _legend(figure)


@mpl.rc_context(LOOK)
def accuracies(panels: Mapping[str, Series], tasks: list[str], dense: list[Point], order: list[str]) -> Figure:
    """Draw accuracy in percent by task, a panel for each sparsity; `x` is the task's index."""
    figure, grid = _panels(len(panels), height=2.6)
    for ax, (title, series) in zip(grid, panels.items(), strict=True):
        ax.set_title(title, fontsize=10)
        for point in dense:
            if point.y is not None:
                ax.hlines(point.y, point.x - 0.42, point.x + 0.42, color=INK, linewidth=1.6, label="dense")
        for place, (name, points) in enumerate(series.items()):
            look = _style(order.index(name)) | {"linestyle": "none"}
            offset = (place - (len(series) - 1) / 2) * 0.5 / max(1, len(series) - 1)
            for x, y, low, high, _ in points:
                if y is not None:
                    ax.plot([x + offset], [y], **look, markersize=5, label=name)
                if low is not None and high is not None:
                    ax.vlines(x + offset, low, high, color=look["color"], linewidth=1.3)
        ax.set_xticks(range(len(tasks)), tasks, rotation=45, ha="right", rotation_mode="anchor")
        ax.set_xlim(-0.6, len(tasks) - 0.4)
    for ax in grid[::2]:
        ax.set_ylabel("accuracy, %")
    return _legend(figure, order)
