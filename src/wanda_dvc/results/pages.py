"""A report's files: Markdown, its pictures, and one self-contained HTML page that markdown-it makes of them.

Content is blocks of Markdown and pictures. Outside text (a model's, task's or experiment's name, a setting) passes
`markup.inline` or `markup.code` before it enters a block.
"""

import base64
import os
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import quote

from markdown_it import MarkdownIt
from markdown_it.common.utils import escapeHtml

from wanda_dvc.errors import UserError
from wanda_dvc.study.files import write_text
from wanda_dvc.study.markup import SIGN, inline

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>$title</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>*{box-sizing:border-box}
body{margin:0 auto;max-width:66rem;padding:1rem;color:#1a1a1a;font:1rem/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
table{display:block;overflow-x:auto;border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .6rem;border-bottom:1px solid #d5d5d5;text-align:left;vertical-align:top;min-width:4rem}
h2{margin-top:2.5rem;border-bottom:1px solid #d5d5d5}img{width:100%;max-width:44rem}
</style></head>
<body>$body</body></html>
""")


class Picture(NamedTuple):
    """A chart, and its caption in Markdown."""

    name: str
    title: str
    description: str
    figure: "Figure"


Content = list[str | Picture]  # a text is a block of Markdown


def write(output: Path, title: str, content: Content) -> Path:
    """Write the HTML page, the Markdown next to it, and its pictures into `NAME_files/`; return the Markdown's path.

    Only an earlier report's files are replaced or removed; UserError if another file has one of these names.
    """
    from wanda_dvc.results.charts import svg

    markdown, folder = output.with_suffix(".md"), output.with_name(f"{output.stem}_files")
    drawn = {f"{part.name}.svg": svg(part.figure) for part in content if isinstance(part, Picture)}
    for path in [output, markdown, *(folder / name for name in drawn)]:
        if os.path.lexists(path) and not _is_ours(path):
            raise UserError(f"{path}: `wanda-dvc report` did not write it; move it, or choose another --output")
    for path in folder.glob("*.svg"):
        if _is_ours(path):
            path.unlink()
    for name, picture in drawn.items():
        write_text(folder / name, picture)
    place = quote(folder.name)
    blocks = [
        part if isinstance(part, str) else f"![{part.title}]({place}/{part.name}.svg)\n\n{part.description}"
        for part in content
    ]
    text = "\n\n".join([f"# {inline(title)}", *blocks, f"{SIGN}."]) + "\n"
    write_text(markdown, text)
    write_text(output, as_html(text, title, drawn))
    return markdown


def _is_ours(path: Path) -> bool:
    """Whether an earlier report wrote a file: its pages have a sign, and its pictures have it as their creator."""
    is_file = path.is_file() and not path.is_symlink()
    return is_file and SIGN in path.read_text(encoding="utf-8", errors="replace")


def as_html(markdown: str, title: str, drawn: Mapping[str, str]) -> str:
    """Return the Markdown as one self-contained page; `drawn` has its pictures, as SVG, by file name."""
    parser = MarkdownIt("js-default")  # HTML in the Markdown stays text
    tokens = parser.parse(markdown)
    for image in [child for token in tokens for child in token.children or [] if child.type == "image"]:
        picture = drawn[str(image.attrs["src"]).rpartition("/")[2]]
        image.attrs["src"] = f"data:image/svg+xml;base64,{base64.b64encode(picture.encode()).decode()}"
    return PAGE.substitute(title=escapeHtml(title), body=parser.renderer.render(tokens, parser.options, {}))
