"""The chapter that sets the rows beside published ones of the same protocol."""

from wanda_dvc.report.formatting import DASH
from wanda_dvc.report.measures import Measured
from wanda_dvc.report.pages import Content, table
from wanda_dvc.report.published import DENSE, sources
from wanda_dvc.report.section import Section
from wanda_dvc.study.markup import code, inline, number


def content(section: Section) -> Content:
    """The numbers side by side; or which published row comes nearest, and in what it differs."""
    found, others = [], []
    for source in sources():
        for entry in source.rows:
            for measure in [key for key in entry if key == "perplexity" or key in section.tasks]:
                for row in section.rows:
                    different = source.differences(row.settings, measure, entry)
                    if different:
                        others.append((len(different), f"{source.source}: {entry['method']}, {measure}", different))
                        continue
                    is_dense, published = entry["method"] == DENSE, entry[measure]
                    own = _own(row.dense if is_dense else row.pruned, measure)
                    both = isinstance(published, float | int) and isinstance(own, float)
                    cells = ("dense" if is_dense else section.name(row), source.source, inline(measure))
                    ratio = f"{own / published:.3f}" if both else DASH
                    found.append((*cells, _as(measure, published), _as(measure, own), ratio))
    if found:
        caption = "Published rows of the same protocol; accuracies in percent. A dash: not measured here."
        headers = ["", "source", "measure", "published", "here", "here / published"]
        return [table(caption, headers, [list(cells) for cells in dict.fromkeys(found)])]
    _, nearest, different = min(others, key=lambda other: other[0])
    return [
        "No published row that this report knows has the protocol of these experiments, so none is set beside them. "
        f"The nearest is {nearest}; it differs in {', '.join(map(code, different))}."
    ]


def _own(measured: Measured, measure: str) -> float | str | None:
    if measure == "perplexity":
        return measured.perplexity
    value = measured.accuracies.get(measure)
    return None if value is None else 100 * value


def _as(measure: str, value: float | str | None) -> str:
    return number(value) if measure == "perplexity" or not isinstance(value, float) else f"{value:.2f}"
