"""The chapter on the origin of each row, and the commands to repeat it."""

from wanda_dvc.plan import CHOICES
from wanda_dvc.report.formatting import setting
from wanda_dvc.report.pages import Content, bullets, fenced, table
from wanda_dvc.report.rows import Row
from wanda_dvc.report.section import OF_PRUNING, Section
from wanda_dvc.results.card import how_to_repeat
from wanda_dvc.study.markup import code, inline


def content(section: Section) -> Content:
    """Return the rows' origins, their shared parameters, and the commands to repeat them."""
    headers = ["", "experiment", "commit", "its own parameters"]
    origins = [[section.name(row), *_origin(section, row)] for row in section.ordered]
    own = {*OF_PRUNING, *section.varying}
    everywhere = set[str].intersection(*({*row.settings} for row in section.rows))  # rows may have other texts
    shared = [
        [key, code(setting(value))] for key, value in section.settings.items() if key in everywhere and key not in own
    ]
    parts: Content = [
        table("The origin of each row.", headers, origins, numbers=False),
        table("The parameters that all rows share.", ["parameter", "value"], shared, numbers=False),
    ]
    for row in section.ordered:
        commands, by_hand = how_to_repeat(row.params)
        parts += [f"To repeat {section.name(row)}, in a fresh clone:", fenced(commands)]
        parts += [by_hand.strip()] if by_hand else []
        parts += [bullets([inline(note) for note in row.notes])] if row.notes else []
    return parts


def _origin(section: Section, row: Row) -> list[str]:
    given = row.params.model_dump(mode="json", include={"recipe", *CHOICES, "allocation_strength"})
    settings = {name: value for name, value in given.items() if value is not None}
    settings |= {key: section.value(row, key) for key in ("sparsity", "pattern", *section.varying)}
    return [
        inline(", ".join([row.name, *row.also])),
        row.commit[:10] if row.commit else "not committed",
        inline(", ".join(f"{key}={value}" for key, value in settings.items())),
    ]
