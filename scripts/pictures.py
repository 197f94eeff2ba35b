"""Draw the documentation's pictures from committed figures: python scripts/pictures.py writes docs/pictures/."""

from collections.abc import Mapping
from pathlib import Path

import figures
import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

PICTURES = Path(__file__).parents[1] / "docs/pictures"
COLOURS = {  # light, dark; Okabe and Ito's, dark enough for text, lighter in dark mode
    "ink": ("#1a1a1a", "#e8e8e8"),
    "muted": ("#6b6b6b", "#a0a0a0"),
    "line": ("#d5d5d5", "#404040"),
    "blue": ("#0072b2", "#56b4e9"),
    "orange": ("#d55e00", "#ff8c42"),
    "green": ("#007a5a", "#2fc39a"),
    "pink": ("#b4568c", "#e08fc0"),
}
MODES = {mode: {name: pair[place] for name, pair in COLOURS.items()} for place, mode in enumerate(("light", "dark"))}
# Each recipe's colour and marker.
MODEL_LOOKS = (("blue", "o"), ("orange", "P"), ("green", "D"), ("pink", "^"), ("muted", "s"))
LOOKS = {"wanda": ("blue", "o"), "wanda-refit": ("pink", "^"), "admm": ("green", "D"), "fisher": ("orange", "P")}


def sparsity(colours: Mapping[str, str]) -> Figure:
    """Draw perplexity against sparsity, one line per recipe, over the dense model's. The pages' tables have figures."""
    rows = figures.measured("recipes")
    dense = figures.value(rows[f"{figures.SMALL} dense"])
    figure, axes = empty(colours)
    axes.set_yscale("log")
    axes.plot((0, 70), (dense, dense), color=colours["muted"], linestyle="--", linewidth=1.2)
    axes.annotate("dense", (70, dense), (9, -3), textcoords="offset points", color=colours["muted"])
    for recipe, (colour, marker) in LOOKS.items():
        found = {at: figures.value(rows.get(f"{figures.SMALL} {recipe} {at}%")) for at in (50, 70)}
        curve = {0: dense} | {at: perplexity for at, perplexity in found.items() if perplexity is not None}
        x, y = zip(*curve.items(), strict=True)
        axes.plot(x, y, color=colours[colour], marker=marker, linewidth=2.2, markersize=5.5)
        end = max(curve)
        axes.annotate(recipe, (end, curve[end]), (9, -3), textcoords="offset points", color=colours[colour])
    axes.set_xlim(-2, 92)
    axes.set_ylim(13.5, 1500)
    axes.set_xticks([0, 50, 70], ["0 %", "50 %", "70 %"])
    axes.set_yticks([20, 50, 100, 200, 500, 1000])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.minorticks_off()
    axes.set_xlabel("sparsity", color=colours["ink"])
    axes.set_title("SmolLM2-135M: perplexity on WikiText-2, log scale", color=colours["ink"], fontsize=10)
    return figure


def frontier(colours: Mapping[str, str]) -> Figure:
    """Draw the divergence of the files of llama.cpp against their size, one line for each model."""
    rows, models = figures.measured("runtimes"), dict[str, list[tuple[str, float, float]]]()
    for name, row in rows.items():
        model, kind = name.rsplit(" ", 1)
        point = kind, row["value"]["bytes"] / 1e6, abs(row["value"]["divergence"]["mean"])
        models.setdefault(model.replace("%", " %").replace("200k", "trained"), []).append(point)
    figure, axes = empty(colours)
    for (model, points), (colour, marker) in zip(models.items(), MODEL_LOOKS, strict=True):
        kinds, sizes, divergences = zip(*sorted(points, key=lambda point: -point[1]), strict=True)
        axes.plot(sizes, divergences, color=colours[colour], marker=marker, linewidth=2.2, markersize=5.5)
        axes.annotate(model, (sizes[0], divergences[0]), (9, -3), textcoords="offset points", color=colours[colour])
        if model == "dense":
            for kind, size, divergence in zip(kinds, sizes, divergences, strict=True):
                place, grey = (size, divergence), colours["muted"]
                axes.annotate(kind, place, (5, 5), textcoords="offset points", fontsize=8, color=grey)
    axes.set_xlim(75, 345)
    axes.set_ylim(bottom=-0.06)
    axes.set_xlabel("file, MB", color=colours["ink"])
    axes.set_title("SmolLM2-135M in llama.cpp: divergence, nats", color=colours["ink"], fontsize=10)
    return figure


def empty(colours: Mapping[str, str]) -> tuple[Figure, Axes]:
    """Return a figure and its axes, without marks."""
    figure = Figure(figsize=(5.6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.set_facecolor("none")
    axes.grid(axis="y", color=colours["line"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=colours["ink"], length=0)
    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.spines["bottom"].set_color(colours["line"])
    return figure, axes


def save(folder: Path) -> None:
    """Write the SVG files into a folder; the same figures give the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    # Text stays text, and ids do not depend on the run.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "readme", "font.size": 10}):
        for mode, colours in MODES.items():
            for draw in (sparsity, frontier):
                path = folder / f"{draw.__name__}-{mode}.svg"
                draw(colours).savefig(path, transparent=True, metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    save(PICTURES)
