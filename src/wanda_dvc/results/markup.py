"""Escapes outside text (names of models, files, experiments) for Markdown."""

import re
from collections.abc import Sequence

from tabulate import tabulate

DASH = "–"  # not measured, or not comparable
# Characters with a meaning in Markdown; an underscore only at the edge of a word.
MARKUP = re.compile(r"[\\`*<>\[\]|#&~]|(?<![^\W_])_|_(?![^\W_])")


def inline(text: object) -> str:
    """Return a text with its markup escaped, for a line of Markdown or a cell of a table."""
    return MARKUP.sub(r"\\\g<0>", one_line(text))


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table for a terminal, which is also valid Markdown. No number is parsed; only a bare `|` is escaped."""
    escaped = [[re.sub(r"(?<!\\)\|", r"\\|", str(cell)) for cell in row] for row in (headers, *rows)]
    return tabulate(escaped[1:], escaped[0], tablefmt="github", disable_numparse=True)


def one_line(text: object) -> str:
    """Return the text in one line, without invisible characters."""
    return "".join(letter if letter.isprintable() else " " for letter in str(text)).strip() or DASH
