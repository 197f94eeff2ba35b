"""The last chapter: what is not in the report, and why."""

from wanda_dvc.report.pages import Content, Heading, Items, Text, literal, slug
from wanda_dvc.report.rows import Collected

HEADING = "What is not in it"


def content(collected: Collected) -> Content:
    """The unfinished experiments, and the results that could not be read."""
    items = []
    for one in collected.unfinished:
        changes = f" ({literal(one.changes)})" if one.changes else ""
        items.append(f"{literal(one.name)}: {literal(one.state.lower())}{changes}")
    items += [f"{literal(note.name)}: {note.text}" for note in collected.notes]
    items += [f"{literal(row.name)}: {note}" for row in collected.rows for note in row.notes]
    heading = Heading(2, HEADING, slug(HEADING))
    if not items:
        everything = (
            "Nothing: every experiment that was asked for has finished, and everything that it recorded is here."
        )
        return [heading, Text(everything)]
    return [
        heading,
        Text("Experiments that have not finished or have failed, and results that could not be read:"),
        Items(items),
    ]
