"""The fenced blocks of a page of the documentation."""

import re
from collections.abc import Iterator
from typing import NamedTuple

from conftest import ROOT


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    text: str


def blocks(page: str) -> Iterator[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    for fenced in re.finditer(r"^( *)```(\S*)[^\n]*\n(.*?)^\1```\s*$", text, flags=re.MULTILINE | re.DOTALL):
        yield Block(fenced[2], fenced[3])


def without_blocks(text: str) -> str:
    return re.sub(r"^( *)```.*?^\1```\s*$", "", text, flags=re.MULTILINE | re.DOTALL)
