"""Draw the README's picture: perplexity against sparsity, from the committed report of the default's grid.

`python scripts/readme_picture.py` writes docs/pictures/perplexity-{light,dark}.svg. With `--png DIR` it also writes the
figures as PNG files into DIR, to look at.
"""

import argparse
import re
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

ROOT = Path(__file__).parents[1]
REPORT = ROOT / "docs/results/default-grid/report.md"
PICTURES = ROOT / "docs/pictures"

# Okabe and Ito's palette, as in the report; its darker colours are lifted on a dark ground.
MODES = {
    "light": {"ink": "#1a1a1a", "muted": "#6b6b6b", "line": "#d5d5d5", "Wanda": "#0072b2", "magnitude": "#d55e00"},
    "dark": {"ink": "#e8e8e8", "muted": "#a0a0a0", "line": "#404040", "Wanda": "#56b4e9", "magnitude": "#ff8c42"},
}
MARKERS = {"Wanda": "o", "magnitude": "s"}

Curve = list[tuple[float, float]]


def read_report(text: str) -> tuple[float, dict[str, Curve]]:
    """Return the dense perplexity and each method's curve of (sparsity in percent, perplexity)."""
    lines = text[text.index("### Perplexity\n") :].splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    header, rows = table[0], []
    for cells in table[2:]:  # after the line of dashes, to the end of this table
        if not re.fullmatch(r"\d+ %", cells[0]):
            break
        rows.append([float(re.sub(r"[ %,]", "", cell)) for cell in cells])
    dense = rows[0][header.index("dense")]
    return dense, {name: [(row[0], row[header.index(name)]) for row in rows] for name in MARKERS}


def draw(dense: float, curves: dict[str, Curve], colours: dict[str, str]) -> Figure:
    """Draw one figure with every point labelled, on a transparent ground."""
    figure = Figure(figsize=(7.4, 3.1), layout="constrained")
    axes = figure.subplots()
    axes.set_yscale("log")
    axes.axhline(dense, color=colours["muted"], linestyle="--", linewidth=1.2)
    axes.annotate(f"dense {dense:.2f}", (70, dense), (8, -14), textcoords="offset points", color=colours["muted"])
    for name, curve in curves.items():
        x, y = zip((0, dense), *curve, strict=True)
        axes.plot(x, y, color=colours[name], marker=MARKERS[name], linewidth=2, markersize=5)
        for sparsity, perplexity in curve[:-1]:
            under = name == "Wanda" and sparsity < 50  # where the curves are close, clear of both and of the dense line
            place, side = ((0, -18), "center") if under else ((-2, 8), "right")
            axes.annotate(
                f"{perplexity:,.2f}",
                (sparsity, perplexity),
                place,
                textcoords="offset points",
                ha=side,
                color=colours[name],
            )
        last = curve[-1]
        axes.annotate(f"{name} {last[1]:,.0f}", last, (8, -3), textcoords="offset points", color=colours[name])
    axes.set_xlim(-2, 90)
    axes.set_facecolor("none")
    axes.set_ylim(4.5, 150_000)
    axes.set_xticks([0, 30, 50, 70], ["0 %", "30 %", "50 %", "70 %"])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.minorticks_off()
    axes.set_xlabel("sparsity of the linear layers", color=colours["ink"])
    axes.set_ylabel("perplexity, log scale", color=colours["ink"])
    axes.grid(axis="y", color=colours["line"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=colours["ink"], length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(colours["line"])
    return figure


def main() -> None:
    """Write both SVG files, and PNG files where `--png` says so."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--png", type=Path, metavar="DIR")
    png = parser.parse_args().png
    dense, curves = read_report(REPORT.read_text(encoding="utf-8"))
    PICTURES.mkdir(parents=True, exist_ok=True)
    # Text stays text, and ids do not depend on the run: the same report gives the same bytes.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "readme", "font.size": 10}):
        for mode, colours in MODES.items():
            figure = draw(dense, curves, colours)
            path = PICTURES / f"perplexity-{mode}.svg"
            figure.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})
            if png is not None:
                ground = "#0d1117" if mode == "dark" else "#ffffff"
                figure.savefig(png / f"perplexity-{mode}.png", dpi=150, facecolor=ground)


if __name__ == "__main__":
    main()
