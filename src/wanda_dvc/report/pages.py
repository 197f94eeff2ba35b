"""A report's content, and the same content as one HTML page or as Markdown. Inline code stands in `backticks`."""

import html
import re
from dataclasses import dataclass
from typing import NamedTuple

from tabulate import tabulate

from wanda_dvc.report.charts import variables


class Heading(NamedTuple):
    level: int
    text: str


class Text(NamedTuple):
    text: str


class Items(NamedTuple):
    items: list[str]


class Code(NamedTuple):
    text: str


@dataclass(frozen=True)
class Table:
    """The first column names the rows; all others are aligned to the right if `numbers`."""

    caption: str
    headers: list[str]
    rows: list[list[str]]
    numbers: bool = True


class Picture(NamedTuple):
    name: str
    title: str
    description: str  # for whoever sees no picture, and as its caption
    svg: str


Content = list[Heading | Text | Items | Code | Table | Picture]

STYLE = """
:root{color-scheme:light dark;--paper:#ffffff;--shade:#f4f4f4;%(light)s}
@media (prefers-color-scheme: dark){:root{--paper:#161616;--shade:#232323;%(dark)s}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:66rem;padding:1rem;background:var(--paper);color:var(--ink);
 font:1rem/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif;overflow-wrap:anywhere}
h1{font-size:1.6rem;line-height:1.2}h2{margin-top:2.5rem;border-bottom:1px solid var(--line);padding-bottom:.2rem}
h3{margin-top:1.8rem}
.box{overflow-x:auto;margin:1rem 0}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums;overflow-wrap:normal}
.caption{color:var(--muted);font-size:.9rem;margin:1.2rem 0 0}.caption+.box{margin-top:.3rem}
th,td{padding:.25rem .6rem;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}
thead th{border-bottom:2px solid var(--muted);vertical-align:bottom}
.numbers td{text-align:right;white-space:nowrap}.numbers thead th+th{text-align:right}
tbody th{font-weight:normal;white-space:nowrap}
pre{background:var(--shade);padding:.7rem;overflow-x:auto;font-size:.85rem;overflow-wrap:normal}
code{font-family:ui-monospace,Menlo,Consolas,monospace;font-size:.9em;background:var(--shade)}pre code{background:none}
figure{margin:1.2rem 0}figure .box{margin:0}
svg{display:block;width:100%%;min-width:34rem;height:auto}
figcaption{color:var(--muted);font-size:.9rem}figcaption b{color:var(--ink)}
a{color:var(--c0)}nav ul{columns:2;padding-left:1.2rem}
@media print{:root{color-scheme:light;--paper:#ffffff;--shade:#f4f4f4;%(light)s}
 body{max-width:none;padding:0;font-size:10pt}nav{display:none}
 .box{overflow:visible}svg{min-width:0}table{font-size:8pt}pre{white-space:pre-wrap}
 .numbers td,tbody th{white-space:normal}h2,h3{break-after:avoid}figure,tr,pre{break-inside:avoid}}
"""


def as_html(title: str, content: Content) -> str:
    """One page that needs nothing else."""
    style = STYLE % {"light": variables(0), "dark": variables(1)}
    chapters = [part.text for part in content if isinstance(part, Heading) and part.level == 2]
    links = "".join(f'<li><a href="#{_anchor(text)}">{html.escape(text)}</a></li>' for text in chapters)
    body = "\n".join(_html(part) for part in content)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{style}</style></head>\n'
        f"<body><main><h1>{html.escape(title)}</h1>\n<nav><ul>{links}</ul></nav>\n{body}\n</main></body></html>\n"
    )


def as_markdown(title: str, content: Content, pictures: str) -> str:
    """`pictures`: the folder beside it in which the pictures are."""
    return "\n\n".join([f"# {title}", *(_markdown(part, pictures) for part in content)]) + "\n"


def _anchor(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _inline(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text, quote=False))


def _html(part: Heading | Text | Items | Code | Table | Picture) -> str:
    match part:
        case Heading(level, text):
            return f'<h{level} id="{_anchor(text)}">{_inline(text)}</h{level}>'
        case Text(text):
            return f"<p>{_inline(text)}</p>"
        case Items(items):
            return f"<ul>{''.join(f'<li>{_inline(item)}</li>' for item in items)}</ul>"
        case Code(text):
            return f"<pre><code>{html.escape(text, quote=False)}</code></pre>"
        case Picture():
            return (
                f'<figure><div class="box" tabindex="0">{part.svg}</div>'
                f"<figcaption><b>{_inline(part.title)}.</b> {_inline(part.description)}</figcaption></figure>"
            )
        case Table():
            head = "".join(f'<th scope="col">{_inline(cell)}</th>' for cell in part.headers)
            rows = "".join(f"<tr>{_row(row)}</tr>" for row in part.rows)
            kind = ' class="numbers"' if part.numbers else ""
            return (
                f'<p class="caption">{_inline(part.caption)}</p>'
                f'<div class="box" tabindex="0"><table{kind} aria-label="{html.escape(part.caption)}">'
                f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
            )


def _row(cells: list[str]) -> str:
    first, *others = (_inline(cell) for cell in cells)
    return f'<th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in others)}'


def _markdown(part: Heading | Text | Items | Code | Table | Picture, pictures: str) -> str:
    match part:
        case Heading(level, text):
            return f"{'#' * level} {text}"
        case Text(text):
            return text
        case Items(items):
            return "\n".join(f"- {item}" for item in items)
        case Code(text):
            return f"```\n{text}\n```"
        case Picture():
            return f"![{part.title}]({pictures}/{part.name}.svg)\n\n**{part.title}.** {part.description}"
        case Table():
            rows = [[cell.replace("|", "\\|") for cell in row] for row in part.rows]
            align = ["left", *(["right" if part.numbers else "left"] * (len(part.headers) - 1))]
            headers = [header.replace("|", "\\|") for header in part.headers]
            table = tabulate(rows, headers, tablefmt="github", disable_numparse=True, colalign=align)
            return f"{part.caption}\n\n{table}"
