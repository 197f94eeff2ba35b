"""Text from outside (a model's, a file's or an experiment's name) in Markdown, so that it stays text; and numbers."""

import re
from collections.abc import Sequence

from tabulate import tabulate

# Signs that Markdown may read as markup; an underscore only at the edge of a word.
MARKUP = re.compile(r"[\\`*<>\[\]|#&~]|(?<![^\W_])_|_(?![^\W_])")


def inline(text: object) -> str:
    """Return a text for a line of Markdown or a cell of a table, with its markup escaped."""
    return MARKUP.sub(r"\\\g<0>", _line(text))


def code(text: object) -> str:
    """Return a text as inline code for a cell of a table; elsewhere Markdown shows the backslash before a `|`."""
    line = _line(text).replace("|", "\\|")
    longest = max((len(run) for run in re.findall("`+", line)), default=0)
    fence = "`" * (longest + 1)
    return f"{fence}{line}{fence}" if not longest else f"{fence} {line} {fence}"


def number(perplexity: float | str | None) -> str:
    """Spell a perplexity: two decimals, none from 1,000 on; `diverged` stays, and a dash is none."""
    if perplexity is None or isinstance(perplexity, str):
        return perplexity or "–"
    if perplexity < 1000:
        return f"{perplexity:.2f}"
    return f"{perplexity:,.0f}" if perplexity < 1e7 else f"{perplexity:.2e}"


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table for a terminal, which is Markdown too. Cells stay as they are: no number is parsed."""
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def _line(text: object) -> str:
    """Return the text in one line, without what no reader sees."""
    return "".join(letter if letter.isprintable() else " " for letter in str(text)).strip() or "–"
