"""The chapter on where each row comes from and how to repeat it."""

from wanda_dvc.report.formatting import DASH, seconds, setting_as_code
from wanda_dvc.report.pages import Code, Content, Items, Table, Text, literal
from wanda_dvc.report.rows import Row, peak_memory
from wanda_dvc.report.runs import runs
from wanda_dvc.report.section import OF_CHOICE, Section
from wanda_dvc.study.repeat import how_to_repeat
from wanda_dvc.study.times import machine_of


def content(section: Section) -> Content:
    """The rows' origins, the parameters that they share, and the commands that repeat them."""
    own = {*OF_CHOICE, *section.varying}
    headers = ["", "experiment", "commit", "its own parameters", "its own time", "peak anonymous memory", "machine"]
    origins = [[literal(section.label(row)), *_origin(row, own)] for row in section.ordered]
    shared = [[key, setting_as_code(value)] for key, value in section.settings.items() if key not in own]
    parts: Content = [
        Table("Where each row comes from.", headers, origins, numbers=False),
        Table("The parameters that all rows share.", ["parameter", "value"], shared, numbers=False),
    ]
    for row in section.ordered:
        commands, by_hand = how_to_repeat(row.params)
        parts += [Text(f"To repeat {literal(section.label(row))}, in a fresh clone:"), Code(commands)]
        parts += [Text(by_hand.strip())] if by_hand else []
        parts += [Items(row.notes)] if row.notes else []
    return parts


def _origin(row: Row, own: set[str]) -> list[str]:
    times, settings = row.times(), row.settings()
    known = runs(row.params.tasks.names)
    mine = sum(time["seconds"] for run, time in times.items() if known[run].own)
    return [
        literal(", ".join([row.name, *row.also])),
        row.commit[:10] if row.commit else "not committed",
        literal(", ".join(f"{key}={settings[key]}" for key in settings if key in own)),
        f"{seconds(mine)} s" if times else DASH,
        peak_memory(times) or DASH,
        literal("; ".join(sorted({machine_of(time) for time in times.values()}))) or DASH,
    ]
