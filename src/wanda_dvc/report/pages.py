"""A report's pages: Markdown, written once, and its HTML page, made by markdown-it.

A chapter's content is blocks of Markdown and pictures. Outside text (a model's, task's or experiment's name, a setting)
passes `markup.inline` or `markup.code` before it enters a block. All HTML of the page comes from the library.
"""

import os
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import quote

from markdown_it import MarkdownIt
from markdown_it.common.utils import escapeHtml
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from markdown_it.utils import EnvType, OptionsDict
from tabulate import tabulate

from wanda_dvc.errors import UserError
from wanda_dvc.reading import check_place
from wanda_dvc.report.colours import css
from wanda_dvc.study.files import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INTERVALS = "Intervals are at 95 %."
# The mark of a file written by a report.
SIGNS = {".html": "background:var(--paper)", ".md": INTERVALS, ".svg": 'fill="var(--paper)"'}


class Picture(NamedTuple):
    """A chart, and its caption in Markdown."""

    name: str
    title: str
    description: str
    figure: "Figure"


Content = list[str | Picture]  # a text is a block of Markdown


# --- blocks of Markdown ---


def heading(level: int, text: str) -> str:
    """A heading."""
    return f"{'#' * level} {text}"


def bullets(items: list[str]) -> str:
    """A list."""
    return "\n".join(f"- {item}" for item in items)


def fenced(text: str) -> str:
    """A block of code, verbatim."""
    fence = max(["```", *(run + "`" for run in re.findall("`{3,}", text))], key=len)
    return f"{fence}\n{text}\n{fence}"


def table(caption: str, headers: list[str], rows: list[list[str]], *, numbers: bool = True) -> str:
    """A table below its caption. The first column names the rows; `numbers` aligns the others to the right."""
    align = ["left", *(["right" if numbers else "left"] * (len(headers) - 1))]
    return f"{caption}\n\n{tabulate(rows, headers, tablefmt='pipe', disable_numparse=True, colalign=align)}"


# --- files ---


def write(output: Path, content: Content) -> Path:
    """Write the HTML page, the Markdown next to it, and its pictures into `NAME_files/`; return the Markdown's path.

    Only an earlier report's files are replaced or removed; UserError if another file has one of these names.
    """
    from wanda_dvc.report.charts import standalone, svg

    markdown, folder = output.with_suffix(".md"), output.with_name(f"{output.stem}_files")
    drawn = {f"{part.name}.svg": svg(part.figure, part.name) for part in content if isinstance(part, Picture)}
    check_place(folder)
    for path in [output, markdown, folder, *(folder / name for name in drawn)]:
        if os.path.lexists(path) and (path.is_symlink() or not (path.is_dir() if path is folder else _is_ours(path))):
            kind = "link" if path.is_symlink() else "directory" if path.is_dir() else "file"
            raise UserError(
                f"{path}: found a {kind} that `wanda-dvc report` did not write; move it, or choose another --output"
            )
    for path in folder.glob("s*.svg"):
        if not path.is_symlink() and _is_ours(path):
            path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in drawn.items():
        write_text(folder / name, standalone(picture))
    text = as_markdown(content, folder.name)
    write_text(markdown, text)
    write_text(output, as_html(text, drawn))
    return markdown


def _is_ours(path: Path) -> bool:
    return path.is_file() and SIGNS[path.suffix] in path.read_text(encoding="utf-8", errors="replace")


def as_markdown(content: Content, folder: str) -> str:
    """Return the complete report as Markdown; `folder`, next to it, holds the pictures."""
    return "\n\n".join(part if isinstance(part, str) else _image(part, quote(folder)) for part in content) + "\n"


def _image(picture: Picture, folder: str) -> str:
    return f"![{picture.title}]({folder}/{picture.name}.svg)\n\n**{picture.title}.** {picture.description}"


# --- the HTML page ---

PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>$title</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>$colours
*{box-sizing:border-box}
body{margin:0 auto;max-width:66rem;padding:1rem;background:var(--paper);color:var(--ink);
 font:1rem/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif;overflow-wrap:anywhere}
h1{font-size:1.6rem;line-height:1.2}h2{margin-top:2.5rem;border-bottom:1px solid var(--line);padding-bottom:.2rem}
h3{margin-top:1.8rem}
.table{overflow-x:auto;margin:.3rem 0 1rem}p:has(+.table),p:has(>svg){margin:1.5rem 0 0}
p:has(+.table),p:has(>svg)+p{color:var(--muted);font-size:.9rem}p:has(>svg)+p{margin-top:.2rem}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums;overflow-wrap:normal}
th,td{padding:.25rem .6rem;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}
thead th{border-bottom:2px solid var(--muted);vertical-align:bottom}
tbody th{font-weight:normal;min-width:8rem;position:sticky;left:0;background:var(--paper)}
td{overflow-wrap:anywhere;min-width:3.5rem}td[style*=right]{white-space:nowrap}
pre{background:var(--shade);padding:.7rem;overflow-x:auto;font-size:.85rem;overflow-wrap:normal}
code{font-family:ui-monospace,Menlo,Consolas,monospace;font-size:.9em;background:var(--shade)}pre code{background:none}
svg{display:block;width:100%;max-width:44rem;height:auto}strong{color:var(--ink)}
a{color:var(--blue)}nav ul{columns:2;padding-left:1.2rem}
@media print{body{max-width:none;padding:0;font-size:10pt}nav{display:none}
 .table{overflow:visible}table{font-size:8pt}pre{white-space:pre-wrap}td[style*=right]{white-space:normal}
 h2,h3{break-after:avoid}svg,tr,pre{break-inside:avoid}}
</style></head>
<body><main>$body</main></body></html>
""")


def as_html(markdown: str, drawn: Mapping[str, str]) -> str:
    """Return the Markdown as one self-contained page; `drawn` has its pictures, as SVG, by file name."""
    parser = MarkdownIt("js-default", renderer_cls=_Page)  # HTML in the Markdown stays text
    tokens = parser.parse(markdown)
    headings: dict[str, tuple[str, str]] = {}  # tag and text, by id
    for position, (before, token) in enumerate(pairwise(tokens), start=1):
        if before.type == "heading_open":
            name = re.sub(r"[^a-z0-9]+", "-", token.content.lower()).strip("-") or "section"
            while name in headings:
                name += "-"
            before.attrSet("id", name)
            headings[name] = before.tag, _Page.plain(token)
        if before.type == "tr_open" and token.type == "td_open":  # the first cell of a row names it
            end = next(token for token in tokens[position:] if token.type == "td_close")
            token.tag = end.tag = "th"
            token.attrSet("scope", "row")
    links = "".join(f'<li><a href="#{name}">{text}</a></li>' for name, (tag, text) in headings.items() if tag == "h2")
    body = parser.renderer.render(tokens, parser.options, {"drawn": drawn})
    body = body.replace("</h1>", f"</h1>\n<nav><ul>{links}</ul></nav>", 1)
    return PAGE.substitute(title=next(iter(headings.values()))[1], colours=css(), body=body)


class _Page(RendererHTML):
    """Return markdown-it's HTML with inline pictures, scrolling tables, and no percent sign at the start of a line."""

    @staticmethod
    def plain(token: Token) -> str:
        """Return the text of an inline token, escaped."""
        return escapeHtml("".join(child.content for child in token.children or [])).replace(" %", "\u00a0%")

    def text(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: EnvType) -> str:
        return escapeHtml(tokens[idx].content).replace(" %", "\u00a0%")

    def image(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: EnvType) -> str:
        source = str(tokens[idx].attrs["src"]).rpartition("/")[2]
        picture: str = env["drawn"][source]
        return picture.replace("<svg", f'<svg aria-label="{self.plain(tokens[idx])}"', 1)

    def table_open(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: EnvType) -> str:
        return '<div class="table" tabindex="0"><table>\n'

    def table_close(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: EnvType) -> str:
        return "</table></div>\n"
