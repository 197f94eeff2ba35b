"""The report's chapters in their order, and the content that they make of the rows."""

from collections.abc import Callable
from typing import NamedTuple

from wanda_dvc.report.chapters import (
    certainty,
    left_out,
    made,
    perplexity,
    protocol,
    published,
    size,
    structure,
    time,
    words,
    zero_shot,
)
from wanda_dvc.report.pages import Content, Heading, Text, code, slug
from wanda_dvc.report.rows import Collected
from wanda_dvc.report.section import Section, differences, sections


class Chapter(NamedTuple):
    """A heading, and the functions that write below it."""

    heading: str  # "": directly below the section's title
    parts: tuple[Callable[[Section], Content], ...]


CHAPTERS = (
    Chapter("", (protocol.content,)),
    Chapter("In words", (words.content,)),
    Chapter("Perplexity", (perplexity.content,)),
    Chapter("Zero-shot accuracy", (zero_shot.content,)),
    Chapter("How sure it is", (certainty.content,)),
    Chapter("Beside what was published", (published.content,)),
    Chapter("What was removed, and where", (structure.content, size.content)),
    Chapter("What it took", (time.content,)),
    Chapter("How each row was made", (made.content,)),
)


def content(collected: Collected) -> Content:
    """The whole report: every chapter for each section, then what is not in it."""
    found = sections(collected.rows)
    parts: Content = []
    if len(found) > 1:
        differing = ", ".join(code(key) for key in differences([section.rows for section in found]))
        parts.append(
            Text(
                f"The experiments were measured in {len(found)} ways, which differ in {differing}. Each has a section "
                "of its own; numbers of different sections may not be compared."
            )
        )
    for count, section in enumerate(found, start=1):
        number = f"-{count}" if len(found) > 1 else ""
        parts.append(Heading(2, section.title, f"model-{slug(section.title)}{number}"))
        for chapter in CHAPTERS:
            if chapter.heading:
                parts.append(Heading(3, chapter.heading + section.mark, slug(chapter.heading) + number))
            for write in chapter.parts:
                parts += write(section)
    return parts + left_out.content(collected)
