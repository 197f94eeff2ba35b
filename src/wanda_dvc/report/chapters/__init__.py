"""The report's chapters in order, and their content for the rows."""

from collections.abc import Callable

from wanda_dvc.report.chapters import (
    continuations,
    divergence,
    excluded,
    perplexity,
    protocol,
    published,
    reproduction,
    structure,
    summary,
    uncertainty,
    zero_shot,
)
from wanda_dvc.report.pages import Content, heading
from wanda_dvc.report.rows import Collected
from wanda_dvc.report.section import Section, differences, sections
from wanda_dvc.study.markup import code

# A heading, and the function for its content. Without a heading: directly below the section's title.
CHAPTERS: dict[str, Callable[[Section], Content]] = {
    "": protocol.content,
    "Summary": summary.content,
    "Perplexity": perplexity.content,
    "Divergence from the dense model": divergence.content,
    "Zero-shot accuracy": zero_shot.content,
    "Continuations": continuations.content,
    "Uncertainty": uncertainty.content,
    "Published results": published.content,
    "Structure and size": structure.content,
    "Reproduction": reproduction.content,
}


def content(collected: Collected) -> Content:
    """Return the complete report: every chapter for each section, then the excluded experiments."""
    found = sections(collected.rows)
    parts: Content = []
    if len(found) > 1:
        differing = ", ".join(code(key) for key in differences(found))
        parts.append(
            f"The experiments were measured in {len(found)} ways, which differ in {differing}. Each has a section of "
            "its own; numbers of different sections may not be compared."
        )
    for section in found:
        parts.append(heading(2, section.title))
        for title, write in CHAPTERS.items():
            parts += [heading(3, title + section.mark)] if title else []
            parts += write(section)
    return parts + excluded.content(collected)
