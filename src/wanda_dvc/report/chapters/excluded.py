"""The last chapter: unfinished experiments, and results that could not be read."""

from wanda_dvc.report.pages import Content, bullets, heading
from wanda_dvc.report.rows import Collected
from wanda_dvc.study.markup import inline


def content(collected: Collected) -> Content:
    """The unfinished experiments, and the results that could not be read."""
    items = [f"{inline(note.name)}: {inline(note.text)}" for note in [*collected.unfinished, *collected.notes]]
    items += [f"{inline(row.name)}: {inline(note)}" for row in collected.rows for note in row.notes]
    title = heading(2, "Excluded")
    if not items:
        return [title, "Nothing: every experiment has finished, and all its results are here."]
    return [title, "Unfinished and failed experiments, and results that could not be read:", bullets(items)]
