"""Draw the pictures of the documentation from committed figures: python scripts/pictures.py.

It writes docs/pictures/NAME-{light,dark}.svg. They are drawn from the tables under docs/results/.
"""

import itertools
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import figures as measured
import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs/results"
PICTURES = ROOT / "docs/pictures"

Colours = Mapping[str, str]
COLOURS = {  # light, dark; Okabe and Ito's, dark enough for text, lighter in dark mode
    "paper": ("#ffffff", "#161616"),
    "shade": ("#f3f3f3", "#2a2d33"),
    "ink": ("#1a1a1a", "#e8e8e8"),
    "muted": ("#6b6b6b", "#a0a0a0"),
    "line": ("#d5d5d5", "#404040"),
    "blue": ("#0072b2", "#56b4e9"),
    "orange": ("#d55e00", "#ff8c42"),
    "green": ("#007a5a", "#2fc39a"),
    "pink": ("#b4568c", "#e08fc0"),
    "yellow": ("#8a6d00", "#f0c94a"),
    "sky": ("#3f93c4", "#9ad4f5"),
}
MODES: dict[str, Colours] = {
    mode: {name: pair[place] for name, pair in COLOURS.items()} for place, mode in enumerate(("light", "dark"))
}

Curve = list[tuple[float, float]]


# --- the tables of docs/results ---


def table(path: str, heading: str) -> list[dict[str, str]]:
    """Return the rows of the first table after a heading of a page, by column."""
    text = (RESULTS / path).read_text(encoding="utf-8")
    rows = [
        [cell.strip(" *") for cell in line.strip().strip("|").split("|")]
        for line in re.split(r"\n(?!\|)", text[text.index(f"{heading}\n") :].partition("\n|")[2])[0].splitlines()
    ]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


def number(cell: str) -> float:
    """Return the first number of a cell: of `42.9579 / 42.9582` and of `55,145`."""
    found = re.match(r"[\d,.]+", cell)
    assert found, cell
    return float(found[0].replace(",", ""))


# --- plots ---


# Each method's name in the picture, its colour and marker.
METHODS = {
    "magnitude": ("orange", "s"),
    "Wanda": ("blue", "o"),
    "Wanda, least squares": ("pink", "^"),
    "ADMM, least squares": ("green", "D"),
    "ADMM, Fisher": ("yellow", "P"),
    "ADMM, block training": ("ink", "v"),
}


# The recipes of docs/results/methods.json that are drawn, by their name in the picture, and its columns.
DRAWN = {
    "wanda-refit": "Wanda, least squares",
    "admm": "ADMM, least squares",
    "fisher": "ADMM, Fisher",
    "blockwise": "ADMM, block training",
}
SETTINGS = ("50 %", "60 %", "70 %", "2:4")


# The shares at which one linear was pruned, with colour and marker.
SHARES = {0.1: ("green", "^"), 0.3: ("blue", "o"), 0.5: ("orange", "s")}


def methods_curves() -> tuple[float, dict[str, Curve], dict[str, float]]:
    """Return the dense perplexity, each method's curve of (sparsity in percent, perplexity), and each method's 2:4."""
    curves: dict[str, Curve] = {name: [] for name in METHODS}
    pattern: dict[str, float] = {}

    def add(name: str, sparsity: str, perplexity: float) -> None:
        if sparsity.endswith("%"):
            curves[name].append((float(round(number(sparsity))), perplexity))
        elif sparsity == "2:4":
            pattern[name] = perplexity

    own = table("reference.md", "## The paper's own procedure")
    for row in own:
        if found := re.match(r"magnitude (\d+ %|2:4)", row["what"]):
            add("magnitude", found[1], number(row["ours"]))
    for row in table("reference.md", "## What the cached statistics cost"):
        add("Wanda", row["sparsity"], number(row["dense"]))
    figures = json.loads((RESULTS / "methods.json").read_text(encoding="utf-8"))
    for row in figures["recipes"]:
        if row["recipe"] in DRAWN:
            for column in SETTINGS:
                add(DRAWN[row["recipe"]], column, row["SmolLM2-135M"][column])
    dense = number(own[0]["ours"])
    return dense, curves, pattern


def methods(colours: Colours) -> Figure:
    """Draw perplexity against sparsity for several methods, and beside it the same for 2:4."""
    dense, curves, pattern = methods_curves()
    figure = Figure(figsize=(8.2, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[3, 1.25])
    _perplexity_axes(left, colours, dense)
    _perplexity_axes(right, colours, dense)
    for name, curve in curves.items():
        colour, marker = METHODS[name]
        _curve(left, curve, dense if curve[0][0] <= 30 else None, colours[colour], marker)
        low = name == "ADMM, block training"  # close to the curve above
        _label(left, f"{name} {curve[-1][1]:,.0f}", curve[-1], (8, -10 if low else -3), colours[colour])
    for name, (colour, marker) in METHODS.items():
        if name not in pattern:  # it has no patterns
            continue
        value, shift = pattern[name], {"ADMM, least squares": 0, "ADMM, Fisher": -10}.get(name)  # close to one another
        right.plot([0], [value], color=colours[colour], marker=marker, markersize=6)
        offset, side = ((9, -3), "left") if shift is None else ((-9, shift), "right")
        _label(right, f"{value:,.0f}", (0, value), offset, colours[colour], side)
    left.set_xlim(-2, 104)
    left.set_xticks([0, 30, 50, 70], ["0 %", "30 %", "50 %", "70 %"])
    right.set_xlim(-0.5, 1)
    right.set_xticks([0], ["2:4"])
    right.set_xlabel("pattern", color=colours["ink"])
    right.set_ylabel("")
    right.tick_params(labelleft=False)
    return figure


def loss(colours: Colours) -> Figure:
    """Draw by linear, pruned alone, the measured change of the loss against the predicted change."""
    models = json.loads((RESULTS / "loss-by-linear.json").read_text(encoding="utf-8"))["models"]
    figure = Figure(figsize=(8.2, 4.1), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, model in zip(panels, models, strict=True):
        _plain(axes, colours)
        axes.set_xscale("symlog", linthresh=1e-4)
        axes.set_yscale("symlog", linthresh=1e-3)
        axes.plot([0, 1], [0, 1], color=colours["muted"], linestyle="--", linewidth=1.2)
        for share, (colour, marker) in SHARES.items():
            points = [(row["now"], row["measured"]) for row in model["rows"] if row["share"] == share]
            x, y = zip(*points, strict=True)
            axes.plot(x, y, marker, color=colours[colour], markersize=5, label=f"{100 * share:.0f} % of its weights")
        axes.set_title(model["model"], color=colours["ink"], fontsize=10)
        axes.set_xlabel("predicted change of the loss, nats", color=colours["ink"])
        axes.minorticks_off()
    panels[0].set_ylabel("measured change, nats", color=colours["ink"])
    panels[0].legend(frameon=False, labelcolor=colours["ink"], loc="upper left")
    return figure


# The measures drawn against the mean accuracy, and the recipes' colours and markers.
AGAINST = ("layer error", "perplexity, WikiText-2", "divergence, embedded text")
LOOKS = {
    "magnitude-rows": METHODS["magnitude"],
    "wanda": METHODS["Wanda"],
    "wanda-refit": METHODS["Wanda, least squares"],
    "sparsegpt": ("ink", "v"),
    "admm": METHODS["ADMM, least squares"],
    "fisher": METHODS["ADMM, Fisher"],
    "wanda-paper": ("blue", "x"),
}


def distance(colours: Colours) -> Figure:
    """Draw accuracy and changed answers of each pruned model against its layer error, perplexity and divergence."""
    rows = measured.distances()
    figure = Figure(figsize=(8.2, 5.6), layout="constrained")
    panels = figure.subplots(2, 3, sharex="col", sharey="row")
    drawn = itertools.product(("accuracy, three tasks", "changed answers, three tasks"), AGAINST)
    for axes, (outcome, name) in zip(panels.flat, drawn, strict=True):
        _plain(axes, colours)
        axes.set_xscale("log")
        points = measured.pairs(rows, name, outcome)
        for recipe, (colour, marker) in LOOKS.items():
            own = [(value, 100 * mean) for value, mean, row in points if row["recipe"] == recipe]
            if own:
                x, y = zip(*own, strict=True)
                axes.plot(x, y, marker, color=colours[colour], markersize=5, label=recipe)
        if "dense" in rows and axes in panels[0]:
            dense = 100 * measured.accuracy(rows["dense"], measured.THREE)
            axes.axhline(dense, color=colours["muted"], linestyle="--", linewidth=1.2)
        title = f"rank correlation {measured.signed(measured.rank_correlation(points))}" if len(points) > 2 else ""
        axes.set_title(title, color=colours["ink"], fontsize=10)
        if axes in panels[1]:
            axes.set_xlabel(name, color=colours["ink"])
        if axes in panels[:, 0]:
            axes.set_ylabel(f"{outcome}, %", color=colours["ink"])
        values = [value for value, *_ in points]
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(values) < 100 * min(values) else (1,)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.minorticks_off()
    named = dict(zip(*reversed(panels[0, 0].get_legend_handles_labels()), strict=True))
    look: dict[str, Any] = {"frameon": False, "labelcolor": colours["ink"], "handletextpad": 0.2, "columnspacing": 1.2}
    figure.legend(named.values(), named, loc="outside lower center", ncols=len(named), **look)
    return figure


def _plain(axes: Axes, colours: Colours) -> Axes:
    """Leave of a plot's frame the bottom line and horizontal lines behind the points."""
    axes.set_facecolor("none")
    axes.grid(axis="y", color=colours["line"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=colours["ink"], length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(colours["line"])
    return axes


def _perplexity_axes(axes: Axes, colours: Colours, dense: float) -> Axes:
    """Make axes of perplexity, in a log scale, over sparsity, with the dense model's line."""
    axes.set_yscale("log")
    axes.axhline(dense, color=colours["muted"], linestyle="--", linewidth=1.2)
    if axes.get_subplotspec() is None or axes.get_subplotspec().colspan.start == 0:  # type: ignore[union-attr]
        _label(axes, f"dense {dense:.2f}", (70, dense), (8, -14), colours["muted"])
    axes.set_ylim(4.5, 150_000)
    axes.set_xticks([0, 30, 50, 70], ["0 %", "30 %", "50 %", "70 %"])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.minorticks_off()
    axes.set_xlabel("sparsity of the linear layers", color=colours["ink"])
    axes.set_ylabel("perplexity, log scale", color=colours["ink"])
    return _plain(axes, colours)


def _curve(axes: Axes, curve: Curve, dense: float | None, colour: str, marker: str) -> None:
    """Draw a curve, from the dense model on where something was measured near it."""
    x, y = zip(*([] if dense is None else [(0, dense)]), *curve, strict=True)
    axes.plot(x, y, color=colour, marker=marker, linewidth=2, markersize=5)


def _label(  # noqa: PLR0913, PLR0917 - a text, its place and its look
    axes: Axes, text: str, at: tuple[float, float], away: tuple[float, float], colour: str, side: str = "left"
) -> None:
    """Write a label beside a point; `away` is in typographic points."""
    axes.annotate(text, at, away, textcoords="offset points", ha=side, color=colour)


FIGURES: dict[str, Callable[[Colours], Figure]] = {
    "methods": methods,
    "loss": loss,
    "distance": distance,
}


def save(folder: Path) -> None:
    """Write the SVG files of all figures into a folder; the same tables give the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    # Text stays text, and ids do not depend on the run.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "readme", "font.size": 10}):
        for name, draw in FIGURES.items():
            if name == "distance" and len(measured.pairs(measured.distances(), AGAINST[0])) < 3:
                continue  # benchmarks/distance.py has not run
            for mode, colours in MODES.items():
                path = folder / f"{name}-{mode}.svg"
                draw(colours).savefig(path, transparent=True, metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    save(PICTURES)
