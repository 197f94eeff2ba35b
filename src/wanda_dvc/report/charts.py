"""The report's pictures as SVG, and the norms' picture as PNG.

A colour is drawn as a number that stands for its name, then replaced by a CSS custom property, so that a picture in a
page follows its light or dark mode. Series differ in marker and line style too, for readers who see no colours.
"""

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from textwrap import wrap
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import Locator

# Okabe and Ito's palette; in the dark its darker colours are lifted. Name: stand-in, light, dark.
COLOURS = {
    "ink": ("#010203", "#1a1a1a", "#e8e8e8"),
    "muted": ("#010204", "#6b6b6b", "#a0a0a0"),
    "line": ("#010205", "#d5d5d5", "#404040"),
    "c0": ("#0a0b00", "#0072b2", "#56b4e9"),
    "c1": ("#0a0b01", "#d55e00", "#ff8c42"),
    "c2": ("#0a0b02", "#009e73", "#2fd1a5"),
    "c3": ("#0a0b03", "#a8568a", "#e39ac4"),
    "c4": ("#0a0b04", "#b07a00", "#e6a91e"),
    "c5": ("#0a0b05", "#56b4e9", "#9ad4f5"),
}
INK, MUTED, LINE = (COLOURS[name][0] for name in ("ink", "muted", "line"))
MARKERS, DASHES = "osD^vPX*", ["-", "--", ":", "-."]
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', sans-serif"
# Inches. Pages show a picture at up to twice its size, and at its own size on a phone, where its text stays readable.
WIDTH = 5.2
LEGEND = 72  # letters of a legend's line


class Point(NamedTuple):
    """A place on a curve; without a value it is one that diverged."""

    x: float
    y: float | None
    low: float | None = None
    high: float | None = None


class Style(NamedTuple):
    """How a series is drawn."""

    color: str
    marker: str
    dash: str


def style(index: int) -> Style:
    """The style of a picture's series with this number."""
    colours = [stand_in for name, (stand_in, *_) in COLOURS.items() if name.startswith("c")]
    return Style(colours[index % len(colours)], MARKERS[index % len(MARKERS)], DASHES[index % len(DASHES)])


def variables(mode: int) -> str:
    """The colours as CSS declarations; mode 0 is light, 1 dark."""
    return "".join(f"--{name}:{values[1 + mode]};" for name, values in COLOURS.items())


def svg(figure: "Figure", name: str, title: str, description: str) -> str:
    """The picture as an SVG element for a page: text as text, colours as custom properties, ids of its own."""
    import matplotlib as mpl

    buffer = io.StringIO()
    _without_math(figure)
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "text.parse_math": False}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<[^>]*>", lambda tag: _own_tag(tag[0], name), text)  # names between tags stay as they are
    box = re.search(r'viewBox="([^"]+)"', text)
    assert box
    head = (
        f'<svg viewBox="{box[1]}" role="img" aria-labelledby="{name}-t {name}-d">'
        f'<title id="{name}-t">{_escape(title)}</title><desc id="{name}-d">{_escape(description)}</desc>'
    )
    return head + text[text.index(">") + 1 :]


def _own_tag(tag: str, name: str) -> str:
    """A tag of the picture with ids of its own, the page's font and colours, and coordinates to a hundredth point."""
    tag = re.sub(r'(?<![-\w])id="([^"]+)"', rf'id="{name}-\1"', tag)
    tag = re.sub(r'(?:xlink:)?href="#([^"]+)"', rf'href="#{name}-\1"', tag)
    tag = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", tag)
    tag = re.sub(r"font: ([\d.]+)px [^;\"]+", rf"font: \1px {FONT}", tag)
    tag = re.sub(r"(\d\.\d\d)\d+", r"\1", tag)
    for colour, (stand_in, *_) in COLOURS.items():
        tag = tag.replace(stand_in, f"var(--{colour})")
    return tag


def _without_math(figure: "Figure") -> None:
    """Show a name with dollar signs as it is, not as a formula."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        text.set_parse_math(False)


def png(figure: "Figure", target: Path) -> None:
    """The picture as a PNG file, in the light colours."""
    from matplotlib.artist import Artist
    from matplotlib.colors import to_hex, to_rgba

    light = {stand_in: colour for stand_in, colour, _ in COLOURS.values()}

    def lit(artist: Artist) -> None:
        for part in ("color", "facecolor", "edgecolor", "markerfacecolor", "markeredgecolor"):
            if not hasattr(artist, f"get_{part}") or not hasattr(artist, f"set_{part}"):
                continue
            value = getattr(artist, f"get_{part}")()
            value = value[0] if getattr(value, "ndim", 1) == 2 and len(value) else value
            if isinstance(value, str) and value in ("none", "auto"):
                continue
            try:
                stand_in = to_hex(value)
            except ValueError:
                continue
            if stand_in in light:
                getattr(artist, f"set_{part}")((*to_rgba(light[stand_in])[:3], to_rgba(value)[3]))
        for child in artist.get_children():
            lit(child)

    lit(figure)
    figure.savefig(target, dpi=160, facecolor="white")


def standalone(picture: str) -> str:
    """The same as a file of its own, with its colours and a ground of its own."""
    rules = (
        f":root{{{variables(0)}--paper:#ffffff}}"
        f"@media (prefers-color-scheme: dark){{:root{{{variables(1)}--paper:#161616}}}}"
    )
    style_element = f'<style>{rules}</style><rect width="100%" height="100%" fill="var(--paper)"/>'
    picture = picture.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    end = picture.index("</desc>") + len("</desc>")
    return picture[:end] + style_element + picture[end:] + "\n"


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _figure(rows: int = 1, columns: int = 1, height: float = 3.1, **words: Any) -> "tuple[Figure, Any]":
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"axes.labelsize": 10}):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False, **words)
    for ax in axes.flat:
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            ax.spines[side].set_color(MUTED)
        ax.tick_params(which="both", colors=INK, labelsize=9)
        ax.grid(axis="y", color=LINE, linewidth=0.6)
        ax.set_axisbelow(True)
        for text in (ax.xaxis.label, ax.yaxis.label, ax.title):
            text.set_color(INK)
            text.set_fontsize(10)
    return figure, axes


def _legend(figure: "Figure", axes: "Iterable[Axes]", order: Sequence[str] = ()) -> None:
    """One legend for all axes, in as many columns as its longest label allows; labels of `order` come last."""
    unique: dict[str, Any] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            unique.setdefault(label, handle)
    labels = sorted(unique, key=lambda label: order.index(label) if label in order else -1)
    if not labels:
        return
    columns = max(1, min(4, LEGEND // (max(map(len, labels)) + 8)))
    figure.set_figheight(figure.get_figheight() + 0.22 * -(-len(labels) // columns))
    figure.legend(
        [unique[label] for label in labels], ["\n".join(wrap(label, LEGEND - 8)) for label in labels],
        loc="outside lower center", ncols=columns, frameon=False,
        labelcolor=INK, fontsize=9, handlelength=3,
    )  # fmt: skip


def _plain_log(ax: "Axes") -> None:
    """A log axis whose ticks are numbers that people read."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    low, high = ax.get_ylim()
    ax.set_yscale("log")
    ax.set_ylim(low, high)
    narrow = high / max(low, 1e-12) < 100
    steps = [(1, 2, 5)] if narrow else [(1,), (1, 2, 5)]
    locators: list[Locator] = [LogLocator(subs=subs, numticks=12) for subs in steps]
    # A narrow range holds too few of 1, 2, 5 and 10.
    locators.append(MaxNLocator(nbins=7, steps=[1, 2, 2.5, 5, 10]))
    enough = (one for one in locators if sum(low <= tick <= high for tick in one.tick_values(low, high)) >= 3)
    ax.yaxis.set_major_locator(next(enough, locators[-1]))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _plain(value)))
    ax.yaxis.set_minor_formatter(NullFormatter())


def _plain(value: float) -> str:
    return f"{value:,.0f}" if 1 <= value < 1e6 and float(value).is_integer() else f"{value:.3g}"


def curves(
    series: Mapping[str, Sequence[Point]], *, y_label: str, level: tuple[str, float] | None, log: bool
) -> "Figure":
    """Values by sparsity in percent, with intervals; points that diverged are at the upper edge, with a label."""
    figure, axes = _figure()
    ax = axes[0, 0]
    known = [value for points in series.values() for p in points for value in (p.y, p.low, p.high) if value is not None]
    known += [level[1]] if level else []
    if log and known:
        low, high = min(known), max(known)
        ax.set_ylim(low / (high / low) ** 0.08 / 1.05, high * (high / low) ** 0.12 * 1.05)
        _plain_log(ax)
    if level:
        ax.axhline(level[1], color=MUTED, linewidth=1.2, label=level[0])
    ticks = sorted({point.x for points in series.values() for point in points})
    shift = 0.35
    for index, (label, points) in enumerate(series.items()):
        color, marker, dash = style(index)
        moved = [(point, point.x + (index - (len(series) - 1) / 2) * shift) for point in points]
        there = [(x, point) for point, x in moved if point.y is not None]
        ax.plot(
            [x for x, _ in there], [point.y for _, point in there], color=color, marker=marker, linestyle=dash,
            markersize=6, linewidth=1.5, label=label,
        )  # fmt: skip
        for x, point in there:
            if point.low is not None and point.high is not None:
                ax.vlines(x, point.low, point.high, color=color, linewidth=2.5, alpha=0.55)
        for point, x in moved:
            if point.y is None:
                edge = ax.get_xaxis_transform()
                ax.plot([x], [1], marker=marker, color=color, markersize=8, transform=edge, clip_on=False)
                left = point.x < (ticks[0] + ticks[-1]) / 2
                ax.annotate(
                    f"{label} diverged", (x, 1), xycoords=edge, xytext=(8 if left else -8, -3 - 12 * index),
                    textcoords="offset points", ha="left" if left else "right", va="top", color=color, fontsize=9,
                )  # fmt: skip
    ax.set_xticks(ticks, [f"{tick:g} %" for tick in ticks])
    ax.margins(x=0.12)
    ax.set_xlabel("sparsity of the linears")
    ax.set_ylabel(y_label)
    _legend(figure, [ax])
    return figure


def accuracies(
    panels: dict[str, dict[str, list[Point]]], tasks: list[str], dense: list[Point], order: list[str]
) -> "Figure":
    """Accuracy in percent by task, a panel for each sparsity; `x` is the task's number."""
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = _figure(rows, columns, height=0.5 + 2.4 * rows, sharey=True)
    for ax, (title, series) in zip(axes.flat, panels.items(), strict=False):
        ax.set_title(title, fontsize=10, color=INK)
        for point in dense:
            if point.y is not None:
                ax.hlines(point.y, point.x - 0.42, point.x + 0.42, color=INK, linewidth=1.6, label="dense")
        for name, points in series.items():
            color, marker, _ = style(order.index(name))
            offset = (list(series).index(name) - (len(series) - 1) / 2) * 0.5 / max(1, len(series) - 1)
            for point in points:
                if point.y is None:
                    continue
                x = point.x + offset
                ax.plot(
                    [x], [point.y], color=color, marker=marker, linestyle="none", markersize=5, label=name,
                )  # fmt: skip
                if point.low is not None and point.high is not None:
                    ax.vlines(x, point.low, point.high, color=color, linewidth=1.3)
        ax.set_xticks(range(len(tasks)), tasks, rotation=45, ha="right", rotation_mode="anchor")
        ax.set_xlim(-0.6, len(tasks) - 0.4)
    for ax in list(axes.flat)[len(panels) :]:
        ax.set_visible(False)
    for ax in axes[:, 0]:
        ax.set_ylabel("accuracy, %")
    _legend(figure, axes.flat, order)
    return figure


def by_block(
    series: dict[str, list[tuple[int, float, float, float]]], *, y_label: str, top: float | None = None
) -> "Figure":
    """A measure by block: the mean of its linears, and how far they lie apart."""
    figure, axes = _figure()
    ax = axes[0, 0]
    for index, (label, points) in enumerate(series.items()):
        color, marker, dash = style(index)
        blocks = [block for block, *_ in points]
        ax.plot(
            blocks, [mean for _, mean, _, _ in points], color=color, marker=marker, linestyle=dash, markersize=3.5,
            linewidth=1.2, label=label,
        )  # fmt: skip
        ax.fill_between(
            blocks, [low for *_, low, _ in points], [high for *_, high in points], color=color, alpha=0.2, linewidth=0
        )
    ax.set_ylim(0, top)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set_xlabel("block")
    ax.set_ylabel(y_label)
    _legend(figure, [ax])
    return figure


def times(bars: dict[str, dict[str, float]], stages: list[str]) -> "Figure":
    """Seconds by stage, one bar above the other; hatched differently too."""
    figure, axes = _figure(height=0.8 + 0.34 * len(bars))
    ax = axes[0, 0]
    ax.grid(False)
    ax.grid(axis="x", color=LINE, linewidth=0.6)
    hatches = ["", "///", "---", "xxx", "\\\\\\", "|||"]
    left = dict.fromkeys(bars, 0.0)
    for index, stage in enumerate(stages):
        widths = [bars[bar].get(stage, 0.0) for bar in bars]
        color = style(index).color
        # A thin outline of the page's own ink keeps neighbours apart in print.
        ax.barh(
            list(bars), widths, left=list(left.values()), color=color, edgecolor=INK, linewidth=0.5,
            hatch=hatches[index % len(hatches)], label=stage, height=0.62,
        )  # fmt: skip
        left = {bar: left[bar] + width for bar, width in zip(bars, widths, strict=True)}
    for bar, total in left.items():
        ax.annotate(
            f"{total:,.0f} s", (total, bar), xytext=(4, 0), textcoords="offset points", va="center", color=INK,
            fontsize=9,
        )  # fmt: skip
    ax.margins(x=0.1)
    ax.invert_yaxis()
    ax.set_xlabel("seconds")
    ax.set_yticks(range(len(bars)), ["\n".join(wrap(label, 28)) for label in bars])
    _legend(figure, [ax])
    return figure


class InputNorms(NamedTuple):
    """Distinct inputs of one label over all blocks: quantiles of norms, of experts the middle one, and outliers."""

    label: str
    blocks: list[int]
    low: list[float]  # the 5th percentile
    median: list[float]
    high: list[float]  # the 95th
    outliers: list[tuple[int, int, float, float]]  # block, feature, norm, and norm over the input's own median
    features: int  # of the widest
    total: int  # features of all of them


def norms(inputs: list[InputNorms]) -> "Figure":
    """Above, the norms by block; below, which features the outliers are. A column for each distinct input."""
    columns = min(2, len(inputs))
    bands = -(-len(inputs) // columns)
    figure, axes = _figure(2 * bands, columns, height=0.4 + 3.8 * bands)
    for position, one in enumerate(inputs):
        band, column = divmod(position, columns)
        above, below = axes[2 * band, column], axes[2 * band + 1, column]
        color, hot = style(0).color, style(1).color
        above.fill_between(one.blocks, one.low, one.high, color=color, alpha=0.3, linewidth=0, label="5 to 95 %")
        above.plot(one.blocks, one.median, color=color, linewidth=1.3, label="median of the features")
        words = {"color": hot, "marker": "^", "linestyle": "none", "markersize": 3.5}
        above.plot([b for b, *_ in one.outliers], [n for _, _, n, _ in one.outliers], label="outlier", **words)
        values = [value for value in [*one.low, *one.high, *(norm for _, _, norm, _ in one.outliers)] if value > 0]
        if values:
            above.set_ylim(min(values) / 1.4, max(values) * 1.4)
            _plain_log(above)
        below.plot([f for _, f, *_ in one.outliers], [b for b, *_ in one.outliers], **words)
        below.set_xlim(-0.02 * one.features, 1.02 * one.features)
        below.set_ylim(max(one.blocks) + 0.8, min(one.blocks) - 0.8)
        if not one.outliers:
            below.text(
                0.5, 0.5, "no outlier", transform=below.transAxes, ha="center", va="center", color=MUTED, fontsize=9
            )
        above.set_title("\n".join(one.label.split(", ")[:3]), fontsize=9)
        above.set_xlabel("block")
        below.set_xlabel("feature")
        above.xaxis.get_major_locator().set_params(integer=True, nbins=4)
        below.xaxis.get_major_locator().set_params(integer=True, nbins=4)
        below.yaxis.get_major_locator().set_params(integer=True)
        if column == 0:
            above.set_ylabel("‖X‖₂, log scale")
            below.set_ylabel("block")
    for spare in range(len(inputs), bands * columns):
        band, column = divmod(spare, columns)
        axes[2 * band, column].set_visible(False)
        axes[2 * band + 1, column].set_visible(False)
    _legend(figure, axes.flat)
    return figure


def block_norms(inputs: list[tuple[str, list[float]]], times: float) -> "Figure":
    """The norms of one block by feature, an axes for each distinct input; above `times` the median is an outlier."""
    columns = min(2, len(inputs))
    bands = -(-len(inputs) // columns)
    figure, axes = _figure(bands, columns, height=0.6 + 2.2 * bands)
    for ax, (label, norm) in zip(axes.flat, inputs, strict=False):
        line = times * median(norm)
        plain = [(feature, value) for feature, value in enumerate(norm) if value <= line]
        hot = [(feature, value) for feature, value in enumerate(norm) if value > line]
        for points, index, marker, name in ((plain, 0, ".", "feature"), (hot, 1, "^", "outlier")):
            words = {"color": style(index).color, "marker": marker, "linestyle": "none", "markersize": 3.5}
            ax.plot([feature for feature, _ in points], [value for _, value in points], label=name, **words)
        for level, dash, name in ((median(norm), "-", "median"), (line, "--", f"{times:g} × median")):
            ax.axhline(level, color=MUTED, linewidth=0.8, linestyle=dash, label=name)
        if values := [value for value in [*norm, line] if value > 0]:
            ax.set_ylim(min(values) / 1.4, max(values) * 1.4)
            _plain_log(ax)
        ax.set_title("\n".join(label.split(", ")[:3]), fontsize=9)
        ax.set_xlabel("feature")
        ax.xaxis.get_major_locator().set_params(integer=True, nbins=4)
    for ax in axes[:, 0]:
        ax.set_ylabel("‖X‖₂, log scale")
    for spare in list(axes.flat)[len(inputs) :]:
        spare.set_visible(False)
    _legend(figure, axes.flat)
    return figure


def perplexity_against(
    dense: tuple[float, float] | None, series: dict[str, list[tuple[float, float, str]]], *, x_label: str
) -> "Figure":
    """Perplexity against another measure, each point named."""
    figure, axes = _figure()
    ax = axes[0, 0]
    ys = [y for points in series.values() for _, y, _ in points] + ([dense[1]] if dense else [])
    if ys:
        ax.set_ylim(min(ys) / 1.25, max(ys) * 1.35)
        _plain_log(ax)
    for index, (label, points) in enumerate(series.items()):
        color, marker, dash = style(index)
        there = sorted(points)
        ax.plot(
            [x for x, *_ in there], [y for _, y, _ in there], color=color, marker=marker, linestyle=dash, linewidth=1.2,
            label=label,
        )  # fmt: skip
        for x, y, name in there:
            ax.annotate(
                name, (x, y), xytext=(5, 5), textcoords="offset points", fontsize=8, color=color,
            )  # fmt: skip
    if dense:
        ax.plot([dense[0]], [dense[1]], marker="*", markersize=11, color=INK, linestyle="none", label="dense")
    ax.margins(x=0.1)
    ax.set_xlabel(x_label)
    ax.set_ylabel("perplexity, log scale")
    _legend(figure, [ax])
    return figure
