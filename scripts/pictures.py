"""Draw the pictures of the documentation from committed figures: python scripts/pictures.py.

It writes docs/pictures/NAME-{light,dark}.svg. With `--png DIR` it also writes them as PNG files into DIR, to look at.
The plots are drawn from docs/results/ and docs/experiments.md. A test compares the drawn stages with the table of
stages.
"""

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import FuncFormatter

from wanda_dvc.report.colours import DARK, LIGHT

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs/results"
PICTURES = ROOT / "docs/pictures"

Colours = Mapping[str, str]
MODES: dict[str, Colours] = {"light": LIGHT, "dark": DARK}

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
    "block": "ADMM, block training",
}
SETTINGS = ("50 %", "60 %", "70 %", "2:4")


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
        value, beside = pattern[name], {"ADMM, least squares": 0, "ADMM, Fisher": -10}.get(name)  # close to one another
        right.plot([0], [value], color=colours[colour], marker=marker, markersize=6)
        offset, side = ((9, -3), "left") if beside is None else ((-9, beside), "right")
        _label(right, f"{value:,.0f}", (0, value), offset, colours[colour], side)
    left.set_xlim(-2, 104)
    left.set_xticks([0, 30, 50, 70], ["0 %", "30 %", "50 %", "70 %"])
    right.set_xlim(-0.5, 1)
    right.set_xticks([0], ["2:4"])
    right.set_xlabel("pattern", color=colours["ink"])
    right.set_ylabel("")
    right.tick_params(labelleft=False)
    return figure


def layer_error(colours: Colours) -> Figure:
    """Draw the mean layer error of five models at 50 % against their perplexity."""
    rows = table("../experiments.md", "## 2026-11-26 · Methods: layer error against perplexity")
    figure = Figure(figsize=(7.4, 3.4), layout="constrained")
    axes = _plain(figure.subplots(), colours)
    for row in rows:
        error, perplexity = number(row["mean layer error"]), number(row["perplexity"])
        propagated = "propagated" in row["what, at 50 %"]
        colour = colours["orange" if propagated else "blue"]
        axes.plot([error], [perplexity], color=colour, marker="s" if propagated else "o", markersize=7)
        side = "right" if error > 3 else "left"
        _label(axes, row["what, at 50 %"], (error, perplexity), (-9 if side == "right" else 9, -4), colour, side)
    axes.set_xlim(1.4, 3.3)
    axes.set_ylim(26, 45)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
    axes.set_xlabel("mean layer error on the dense model's inputs", color=colours["ink"])
    axes.set_ylabel("perplexity", color=colours["ink"])
    axes.text(1.42, 43.9, "circles: solved from the dense model's inputs; squares: propagated", color=colours["muted"])
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


# --- drawings ---

Box = tuple[float, float, float, float]  # left, bottom, width, height


def pipeline(colours: Colours) -> Figure:
    """Draw the stages, what lies between them, and which of them run once, for each experiment, and for each model."""
    figure, axes = _canvas(8.4, 4.0, 105, 50)
    stages = {
        "locate": (2, 30, 13, 7), "download": (21, 30, 14, 7), "calibrate": (39, 30, 14, 7), "mask": (62, 30, 10, 7),
        "apply": (81, 30, 12, 7), "perplexity": (38, 3, 16, 7), "zero-shot": (62, 3, 16, 7),
    }  # fmt: skip
    for name, box in stages.items():
        _box(axes, box, name, colours, edge="blue")
    _box(axes, (21, 17, 63, 6), "models/dense, data/", colours)
    _box(axes, (87, 17, 16, 6), "models/pruned", colours)
    for x, name in ((57.5, "stats/"), (76.5, "masks/\nweights/")):
        axes.text(x, 34.3, name, ha="center", color=colours["muted"], fontsize=7.4)
    for start, end in (("locate", "download"), ("calibrate", "mask"), ("mask", "apply")):
        _arrow(axes, (stages[start][0] + stages[start][2], 33.5), (stages[end][0], 33.5), colours)
    _arrow(axes, (28, 30), (28, 23), colours)
    for x in (46, 67, 82.5):  # into calibrate, mask and apply
        _arrow(axes, (x, 23), (x, 30), colours)
    _arrow(axes, (91, 30), (91, 23), colours)
    for x in (43, 67):  # the dense model into perplexity and zero-shot, then the pruned one
        _arrow(axes, (x, 17), (x, 10), colours)
        _arrow(axes, (x + 7, 13.5), (x + 7, 10), colours)
    axes.plot([95, 95, 50], [17, 13.5, 13.5], color=colours["muted"], linewidth=1.2)
    for (left, right), text, colour in (
        ((2, 53), "once for a model and a text", "green"),
        ((62, 93), "for each experiment, in seconds", "orange"),
    ):
        axes.plot([left, right], [41, 41], color=colours[colour], linewidth=2)
        axes.text((left + right) / 2, 43, text, ha="center", color=colours[colour])
    axes.text(
        19, 6.5, "once for the dense model,\nand for each pruned one", ha="center", va="center", color=colours["orange"]
    )
    return figure


def engine(colours: Colours) -> Figure:
    """Draw one pass through a checkpoint: blocks from disk, hidden states from file to file, sums from hooks."""
    figure, axes = _canvas(8.4, 3.9, 105, 48)
    axes.add_patch(
        FancyBboxPatch(
            (31, 6),
            43,
            38,
            boxstyle="round,pad=0,rounding_size=1.5",
            fill=False,
            edgecolor=colours["green"],
            linewidth=1.4,
            linestyle="--",
        )
    )
    axes.text(52.5, 45.3, "in memory", ha="center", color=colours["green"])
    _box(axes, (2, 32, 20, 9), "checkpoint\non disk, by block", colours)
    _box(axes, (36, 32, 33, 9), "block k + 1\na thread reads it meanwhile", colours)
    _box(axes, (36, 18, 33, 9), "block k\none window at a time", colours, edge="blue")
    _box(axes, (2, 18, 20, 9), "hidden states\nfile A", colours)
    _box(axes, (83, 18, 20, 9), "hidden states\nfile B", colours)
    _box(axes, (36, 8, 15, 6), "embeddings", colours)
    _box(axes, (54, 8, 15, 6), "norm, head", colours)
    _box(axes, (83, 32, 20, 9), "Σx², Σx, XᵀX\nstats/", colours, edge="orange")
    _arrow(axes, (22, 36.5), (36, 36.5), colours)
    _arrow(axes, (52.5, 32), (52.5, 27), colours)
    _arrow(axes, (22, 22.5), (36, 22.5), colours)
    _arrow(axes, (69, 22.5), (83, 22.5), colours)
    _arrow(axes, (69, 25.5), (83, 33.5), colours)
    axes.text(79, 28.2, "hooks", ha="left", color=colours["muted"], fontsize=8.5)
    axes.plot([93, 93, 12], [18, 3, 3], color=colours["muted"], linewidth=1.2)
    _arrow(axes, (12, 3), (12, 18), colours)
    axes.text(
        52.5,
        0.3,
        "after each block the two files swap; a killed run continues here",
        ha="center",
        color=colours["muted"],
        fontsize=8.5,
    )
    return figure


def _canvas(width: float, height: float, across: float, up: float) -> tuple[Figure, Axes]:
    """Make an empty drawing of so many inches, with coordinates of its own."""
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(0, across)
    axes.set_ylim(-1, up)
    return figure, axes


def _box(axes: Axes, box: Box, text: str, colours: Colours, edge: str = "muted") -> None:
    """Draw a box with text; the text of one with a blue edge, which computes, is bold."""
    left, bottom, width, height = box
    style = "round,pad=0,rounding_size=1"
    axes.add_patch(
        FancyBboxPatch(
            (left, bottom), width, height, boxstyle=style, facecolor=colours["shade"], edgecolor=colours[edge]
        )
    )
    weight = "bold" if edge == "blue" else "normal"
    axes.text(
        left + width / 2, bottom + height / 2, text, ha="center", va="center", color=colours["ink"], weight=weight
    )


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colours: Colours) -> None:
    arrow = {"arrowstyle": "-|>", "color": colours["muted"], "shrinkA": 0, "shrinkB": 0, "linewidth": 1.2}
    axes.annotate("", end, start, arrowprops=arrow)


FIGURES: dict[str, Callable[[Colours], Figure]] = {
    "methods": methods,
    "layer-error": layer_error,
    "pipeline": pipeline,
    "engine": engine,
}


def save(folder: Path, names: Sequence[str] = (), png: Path | None = None) -> None:
    """Write the SVG files of some figures (by default all) into a folder; the same tables give the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    # Text stays text, and ids do not depend on the run.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "readme", "font.size": 10}):
        for name in names or FIGURES:
            for mode, colours in MODES.items():
                figure = FIGURES[name](colours)
                path = folder / f"{name}-{mode}.svg"
                figure.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})
                if png is not None:
                    ground = "#0d1117" if mode == "dark" else "#ffffff"
                    figure.savefig(png / f"{name}-{mode}.png", dpi=110, facecolor=ground)


def main() -> None:
    """Write all SVG files, and PNG files where `--png` says so."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--png", type=Path, metavar="DIR")
    save(PICTURES, png=parser.parse_args().png)


if __name__ == "__main__":
    main()
