"""Text from outside (a model's, a file's or a method's name) in Markdown, so that it stays text; and numbers."""

import re

MARKUP = re.compile(r"[\\`*<>\[\]|#&~]")


def inline(text: object) -> str:
    """Return a text for a line of Markdown or a cell of a table, with its markup escaped."""
    return MARKUP.sub(r"\\\g<0>", _line(text))


def code(text: object) -> str:
    """Return a text as inline code, also in a cell of a table."""
    line = _line(text).replace("|", "\\|")
    longest = max((len(run) for run in re.findall("`+", line)), default=0)
    fence = "`" * (longest + 1)
    return f"{fence}{line}{fence}" if not longest else f"{fence} {line} {fence}"


def number(perplexity: float | str | None) -> str:
    """Spell a perplexity; a dash where there is none."""
    if perplexity is None:
        return "–"
    return perplexity if isinstance(perplexity, str) else f"{perplexity:,.2f}"


def _line(text: object) -> str:
    """Return the text in one line, without what no reader sees."""
    return "".join(letter if letter.isprintable() else " " for letter in str(text)).strip() or "–"
