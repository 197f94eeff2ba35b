"""The chapter on zero-shot accuracy: by task, and as a share of the dense model's."""

from wanda_dvc.report import charts, inference
from wanda_dvc.report.charts import Point
from wanda_dvc.report.formatting import DASH, percent
from wanda_dvc.report.measures import Measured, pruned
from wanda_dvc.report.pages import Content, Table, Text, literal, picture
from wanda_dvc.report.rows import Row
from wanda_dvc.report.section import Section, sparsity


def content(section: Section) -> Content:
    """The table and the pictures."""
    if not section.tasks:
        return [Text("No tasks were asked: `tasks.names` is empty.")]
    parts: Content = [_table(section)]
    tasks, panels, retained = section.tasks, _panels(section), _retained(section)
    if panels:
        dense = [_point(measured, task, tasks.index(task)) for task, measured in section.dense_by_task.items()]
        parts.append(
            picture(
                section.prefix + "accuracy",
                "Accuracy by task",
                "A panel for each sparsity; bars are 95 % intervals (Wilson), the line is the dense model.",
                charts.accuracies(panels, tasks, dense, list(section.curves)),
            )
        )
    if retained:
        parts.append(
            picture(
                section.prefix + "retained",
                "Retained accuracy",
                "The mean over tasks as a percentage of the dense model's; bars are 95 % paired intervals of the "
                "difference: one that reaches the dense line is within noise.",
                charts.curves(retained, y_label="retained, %", level=("dense", 100.0), log=False),
            )
        )
    return parts


def _table(section: Section) -> Table:
    dense = section.dense_by_task
    of_dense = [dense[task].accuracy(task) if task in dense else None for task in section.tasks]
    rows = [["dense", *map(percent, of_dense), percent(section.dense_mean), ""]]
    for row in section.ordered:
        cells = [percent(pruned(row).accuracy(task)) for task in section.tasks]
        share = _share(section, row)
        kept = f"{share:.1f}" if share is not None else DASH
        rows.append([literal(section.label(row)), *cells, percent(section.mean(row)), kept])
    return Table(
        "Accuracy in percent; the mean is over tasks, retained is the mean as a percentage of the dense model's.",
        ["", *map(literal, section.tasks), "mean", "retained"],
        rows,
    )


def _share(section: Section, row: Row) -> float | None:
    """The row's mean accuracy in percent of the dense model's."""
    mean, dense = section.mean(row), section.dense_mean
    return 100 * mean / dense if mean is not None and dense else None


def _retained(section: Section) -> dict[str, list[Point]]:
    found: dict[str, list[Point]] = {}
    for label, on_curve in section.curves.items():
        for row in on_curve:
            share, dense = _share(section, row), section.dense_mean
            if share is None or not dense:
                continue
            paired = section.against_dense(row).mean
            ends = [max(0, 100 * (1 + end / dense)) for end in (paired.low, paired.high)] if paired else [None, None]
            found.setdefault(label, []).append(Point(100 * row.params.sparsity, share, *ends))
    return found


def _panels(section: Section) -> dict[str, dict[str, list[Point]]]:
    """By sparsity and curve, a point for each task."""
    found: dict[float, dict[str, list[Point]]] = {}
    named: dict[float, str] = {}
    for label, on_curve in section.curves.items():
        for row in on_curve:
            points = [_point(pruned(row), task, place) for place, task in enumerate(section.tasks)]
            if any(point.y is not None for point in points):
                named[row.params.sparsity] = sparsity(row)
                found.setdefault(row.params.sparsity, {})[label] = points
    return {named[key]: found[key] for key in sorted(found)}


def _point(measured: Measured, task: str, place: int) -> Point:
    value = measured.accuracy(task)
    if value is None:
        return Point(place, None)
    answers = measured.answers(task)
    if not answers:
        return Point(place, 100 * value)
    ends = inference.accuracy(list(answers.values()))
    return Point(place, 100 * value, 100 * ends.low, 100 * ends.high)
