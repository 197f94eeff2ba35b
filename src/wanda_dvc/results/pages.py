"""A report's page: one self-contained HTML file of Markdown and pictures, which matplotlib draws as SVG.

Outside text (a model's, task's or experiment's name, a setting) passes `markup.inline` before it enters the Markdown.
"""

import base64
import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from textwrap import wrap
from typing import Any

import matplotlib as mpl
import numpy as np
from markdown_it import MarkdownIt
from markdown_it.common.utils import escapeHtml
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator, PercentFormatter

from wanda_dvc.errors import UserError
from wanda_dvc.results.intervals import Estimate
from wanda_dvc.study.files import write_text

SIGN = "Written by wanda-dvc report"  # in each page and picture
PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>$title</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>*{box-sizing:border-box}
body{margin:0 auto;max-width:66rem;padding:1rem;color:#1a1a1a;font:1rem/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
table{display:block;overflow-x:auto;border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .6rem;border-bottom:1px solid #d5d5d5;text-align:left;vertical-align:top;min-width:4rem}
h2{margin-top:2.5rem;border-bottom:1px solid #d5d5d5}img{width:100%;max-width:44rem}
</style></head>
<body><h1>$title</h1>
$body
<p>$sign.</p></body></html>
""")
# Series also differ in marker and dash, for colour-blind eyes. The colours are Okabe and Ito's, dark enough for text.
COLOURS = ("#0072b2", "#d55e00", "#007a5a", "#b4568c", "#8a6d00", "#3f93c4")
MARKERS, DASHES = "osD^vPX*", ("-", "--", ":", "-.")
LEGEND = 64  # characters of a legend's line
LOOK: dict[Any, Any] = {  # for any settings of matplotlib
    "text.parse_math": False,  # a name with dollar signs is not a formula
    "font.size": 9, "axes.grid": True, "axes.grid.axis": "y", "grid.color": "#d5d5d5", "svg.hashsalt": SIGN,
}  # fmt: skip
Content = list[str | tuple[str, Figure]]  # blocks of Markdown; charts with their titles


@mpl.rc_context(LOOK)
def write(output: Path, title: str, content: Content) -> None:
    """Write the page, byte-identical for equal content. UserError if another program's file is in its place."""
    is_file = output.is_file() and not output.is_symlink()
    if os.path.lexists(output) and not (is_file and SIGN in output.read_text(encoding="utf-8", errors="replace")):
        raise UserError(f"{output}: `wanda-dvc report` did not write it; move it, or choose another --output")
    markdown = MarkdownIt("js-default")  # HTML in the Markdown stays text
    parts = []
    for part in content:
        if isinstance(part, str):
            parts.append(markdown.render(part))
        else:
            chart, svg = part[1], io.BytesIO()
            chart.savefig(svg, format="svg", metadata={"Date": None, "Creator": SIGN})
            picture = base64.b64encode(svg.getvalue()).decode()
            parts.append(f'<p><img alt="{escapeHtml(part[0])}" src="data:image/svg+xml;base64,{picture}"></p>')
    write_text(output, PAGE.substitute(title=escapeHtml(title), body="\n".join(parts), sign=SIGN))


@mpl.rc_context(LOOK)
def curves(series: Mapping[str, Sequence[tuple[float, Estimate]]], label: str, *, level: float, log: bool) -> Figure:
    """Draw a measure against sparsity: a curve with intervals for each series of points (sparsity, value).

    Values that are NaN are left out. `level` is the dense model's value, `log` is of the vertical axis.
    """
    columns = 1 if max(map(len, series)) > LEGEND // 2 else 2
    lines = 1 + sum(len(wrap(name, LEGEND)) for name in series) / columns  # of the legend
    figure = Figure(figsize=(5.2, 2.3 + 0.19 * lines), layout="constrained")  # a page shows it at most twice its size
    ax = figure.subplots()
    shown = [level]
    if not math.isnan(level):
        ax.axhline(level, color="#6b6b6b", linewidth=1.2, label="dense")
    for index, (name, points) in enumerate(series.items()):
        x, y, low, high = np.array([(100 * sparsity, *value[:3]) for sparsity, value in points]).T
        color, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
        dashes, title = DASHES[index % len(DASHES)], "\n".join(wrap(name, LEGEND))
        ends = np.maximum(0, [y - low, high - y])
        ax.errorbar(x, y, ends, color=color, marker=marker, linestyle=dashes, elinewidth=2.5, label=title)
        shown += [*y, *low, *high]
    values = [value for value in shown if value > 0]
    if log and values:
        ax.set_yscale("log")
        ticks = sorted({float(f"{tick:.3g}") for tick in np.geomspace(min(values), max(values), 5)})
        ax.set_yticks(ticks, [f"{tick:,g}" for tick in ticks])
        ax.yaxis.set_minor_locator(NullLocator())
    if not log:  # an accuracy
        ax.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    ax.margins(0.08)
    ax.set_xlabel("sparsity, %")
    ax.set_ylabel(label)
    figure.legend(loc="outside lower center", ncols=columns)
    return figure
