"""A report's content, and the same content as one HTML page or as Markdown.

Texts hold inline code in `backticks`. A text from outside (a model's, task's or experiment's name, a setting) goes
through `literal` or `code`, so that its own backticks are shown as they are. Everything else that HTML or Markdown
would read as markup is escaped here, wherever it comes from.
"""

import html
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import quote

from tabulate import tabulate

from wanda_dvc.report import charts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BACKTICK = "\ue000"  # stands for a backtick that is no markup; Unicode assigns it to nobody
INLINE_CODE = re.compile(r"`([^`]+)`")


class Heading(NamedTuple):
    """A heading with the id that links name."""

    level: int
    text: str
    anchor: str


class Text(NamedTuple):
    """A paragraph."""

    text: str


class Items(NamedTuple):
    """A list with bullets."""

    items: list[str]


class Code(NamedTuple):
    """A block of code, as it is."""

    text: str


@dataclass(frozen=True)
class Table:
    """A table with its caption. The first column names the rows; `numbers` aligns the others to the right."""

    caption: str
    headers: list[str]
    rows: list[list[str]]
    numbers: bool = True


class Picture(NamedTuple):
    """A chart as an SVG element."""

    name: str
    title: str
    description: str  # for whoever sees no picture, and as its caption
    svg: str


Part = Heading | Text | Items | Code | Table | Picture
Content = list[Part]

STYLE = """
:root{color-scheme:light dark;--paper:#ffffff;--shade:#f4f4f4;%(light)s}
@media (prefers-color-scheme: dark){:root{--paper:#161616;--shade:#232323;%(dark)s}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:66rem;padding:1rem;background:var(--paper);color:var(--ink);
 font:1rem/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif;overflow-wrap:anywhere}
h1{font-size:1.6rem;line-height:1.2}h2{margin-top:2.5rem;border-bottom:1px solid var(--line);padding-bottom:.2rem}
h3{margin-top:1.8rem}
.box{overflow-x:auto;margin:1rem 0;max-width:100%%}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums;overflow-wrap:normal}
.caption{color:var(--muted);font-size:.9rem;margin:1.2rem 0 0}.caption+.box{margin-top:.3rem}
th,td{padding:.25rem .6rem;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}
thead th{border-bottom:2px solid var(--muted);vertical-align:bottom}
.numbers td{text-align:right;white-space:nowrap}.numbers thead th+th{text-align:right}
tbody th{font-weight:normal;min-width:8rem;position:sticky;left:0;background:var(--paper)}
td{overflow-wrap:anywhere;min-width:3.5rem}
pre{background:var(--shade);padding:.7rem;overflow-x:auto;font-size:.85rem;overflow-wrap:normal}
code{font-family:ui-monospace,Menlo,Consolas,monospace;font-size:.9em;background:var(--shade)}pre code{background:none}
figure{margin:1.2rem 0}figure .box{margin:0}
svg{display:block;width:100%%;max-width:44rem;height:auto}
figcaption{color:var(--muted);font-size:.9rem}figcaption b{color:var(--ink)}
a{color:var(--c0)}nav ul{columns:2;padding-left:1.2rem}
@media print{:root{color-scheme:light;--paper:#ffffff;--shade:#f4f4f4;%(light)s}
 body{max-width:none;padding:0;font-size:10pt}nav{display:none}
 .box{overflow:visible}table{font-size:8pt}pre{white-space:pre-wrap}
 .numbers td{white-space:normal}h2,h3{break-after:avoid}figure,tr,pre{break-inside:avoid}}
"""


def as_html(title: str, content: Content) -> str:
    """One page that needs nothing else."""
    style = STYLE % {"light": charts.variables(0), "dark": charts.variables(1)}
    chapters = [part for part in content if isinstance(part, Heading) and part.level == 2]
    links = "".join(f'<li><a href="#{part.anchor}">{_inline(part.text)}</a></li>' for part in chapters)
    body = "\n".join(_html(part) for part in content)
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{style}</style></head>\n'
        f"<body><main><h1>{html.escape(title)}</h1>\n<nav><ul>{links}</ul></nav>\n{body}\n</main></body></html>\n"
    )
    return page.replace(BACKTICK, "`")


def as_markdown(title: str, content: Content, pictures: str) -> str:
    """The same as Markdown; `pictures` is the folder beside it that holds the pictures."""
    parts = [f"# {_inline_markdown(literal(title))}", *(_markdown(part, quote(pictures)) for part in content)]
    return "\n\n".join(parts).replace(BACKTICK, "`") + "\n"


def literal(text: str) -> str:
    """A text from outside, whose backticks are no markup."""
    return text.replace("`", BACKTICK)


def code(text: str) -> str:
    """A text from outside as inline code."""
    return f"`{literal(text)}`" if text else ""


def slug(text: str) -> str:
    """A text as the id of a heading."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def picture(name: str, title: str, description: str, figure: "Figure") -> Picture:
    """A chart with its title and description."""
    return Picture(name, title, description, charts.svg(figure, name, title, description).replace(BACKTICK, "`"))


def _inline(text: str) -> str:
    text = html.escape(text, quote=False).replace(" %", "\u00a0%")  # no line begins with the sign
    return INLINE_CODE.sub(r"<code>\1</code>", text)


def _inline_markdown(text: str) -> str:
    """A text on one line of Markdown; only inline code is markup in it."""
    text = re.sub(r"\s*\n\s*", " ", text)
    plain, *rest = INLINE_CODE.split(text)
    parts = [_escaped(plain)]
    for inside, after in zip(rest[::2], rest[1::2], strict=True):
        runs = re.findall(f"{BACKTICK}+", inside)
        fence = "`" * (1 + max(map(len, runs), default=0))
        space = " " if runs else ""
        parts += [fence, space, inside, space, fence, _escaped(after)]
    return "".join(parts)


def _escaped(text: str) -> str:
    """Plain text in Markdown. A sign is left alone where Markdown does not read it as markup."""
    text = text.replace("\\", "\\\\").replace(BACKTICK, "`").replace("`", f"\\{BACKTICK}")
    text = re.sub(r"&(?=#?\w+;)", "&amp;", text)
    text = re.sub(r"<(?=[A-Za-z/!?])", "&lt;", text)
    text = text.replace("](", "]\\(")
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])|\*(?=\S)|(?<=\S)\*", r"\\\g<0>", text)


def _html(part: Part) -> str:
    match part:
        case Heading(level, text, anchor):
            return f'<h{level} id="{anchor}">{_inline(text)}</h{level}>'
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


def _markdown(part: Part, pictures: str) -> str:
    match part:
        case Heading(level, text, _):
            return f"{'#' * level} {_inline_markdown(text)}"
        case Text(text):
            return _inline_markdown(text)
        case Items(items):
            return "\n".join(f"- {_inline_markdown(item)}" for item in items)
        case Code(text):
            fence = max(["```", *(run + "`" for run in re.findall("`{3,}", text))], key=len)
            return f"{fence}\n{text}\n{fence}"
        case Picture():
            title, description = _inline_markdown(part.title), _inline_markdown(part.description)
            return f"![{title}]({pictures}/{part.name}.svg)\n\n**{title}.** {description}"
        case Table():
            rows = [[_cell(cell) for cell in row] for row in part.rows]
            align = ["left", *(["right" if part.numbers else "left"] * (len(part.headers) - 1))]
            headers = [_cell(header) for header in part.headers]
            table = tabulate(rows, headers, tablefmt="github", disable_numparse=True, colalign=align)
            return f"{_inline_markdown(part.caption)}\n\n{table}"


def _cell(text: str) -> str:
    return _inline_markdown(text).replace("|", "\\|")
