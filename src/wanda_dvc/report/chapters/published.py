"""The chapter that sets the rows beside published ones of the same protocol."""

from typing import Any, NamedTuple

from wanda_dvc.report.formatting import DASH, number
from wanda_dvc.report.measures import Measured, pruned
from wanda_dvc.report.pages import Content, Table, Text, code, literal
from wanda_dvc.report.published import Source, sources
from wanda_dvc.report.rows import Row
from wanda_dvc.report.section import Section


class _Candidate(NamedTuple):
    """A published number beside a row that could be compared with it."""

    source: Source
    entry: dict[str, Any]
    measure: str  # `perplexity` or a task
    row: Row
    different: list[str]  # the settings that forbid it; empty: it may be compared


def content(section: Section) -> Content:
    """The numbers side by side; or which published row comes nearest, and in what it differs."""
    candidates = _candidates(section)
    table = [_beside(section, one) for one in candidates if not one.different]
    if table:
        caption = "Published rows of the same protocol; accuracies in percent. A dash: not measured here."
        headers = ["", "source", "measure", "published", "here", "here / published"]
        return [Table(caption, headers, [list(row) for row in dict.fromkeys(table)])]
    nearest = min(candidates, key=lambda one: len(one.different))
    return [
        Text(
            "No published row that this report knows has the protocol of these experiments, so none is set beside "
            f"them. The nearest is {nearest.source.source}: {nearest.entry['method']}, {nearest.measure}; it differs "
            f"in {', '.join(code(key) for key in nearest.different)}."
        )
    ]


def _candidates(section: Section) -> list[_Candidate]:
    found = []
    for source in sources():
        for entry in source.rows:
            for measure in [key for key in entry if key == "perplexity" or key in section.tasks]:
                for row in section.rows:
                    different = source.differences(row.settings(), measure, entry)
                    found.append(_Candidate(source, entry, measure, row, different))
    return found


def _beside(section: Section, one: _Candidate) -> tuple[str, ...]:
    dense = one.entry["method"] == "dense"
    measured = Measured(one.row, "dense") if dense else pruned(one.row)
    published, own = one.entry[one.measure], _own(measured, one.measure)
    both = isinstance(published, float | int) and isinstance(own, float)
    return (
        "dense" if dense else literal(section.label(one.row)),
        one.source.source,
        one.measure,
        _as(one.measure, published),
        _as(one.measure, own),
        f"{own / published:.3f}" if both else DASH,
    )


def _own(measured: Measured, measure: str) -> float | str | None:
    if measure == "perplexity":
        return measured.perplexity
    value = measured.accuracy(measure)
    return None if value is None else 100 * value


def _as(measure: str, value: float | str | None) -> str:
    return number(value) if measure == "perplexity" or not isinstance(value, float) else f"{value:.2f}"
