"""The chapter on zero-shot accuracy: by task, and as a share of the dense model's."""

from wanda_dvc.engine.flips import ANSWERS, Flips
from wanda_dvc.report import charts
from wanda_dvc.report.charts import Point
from wanda_dvc.report.comparisons import beyond_noise
from wanda_dvc.report.formatting import DASH, percent
from wanda_dvc.report.measures import Measured
from wanda_dvc.report.pages import Content, Picture, table
from wanda_dvc.report.rows import Row
from wanda_dvc.report.section import Section
from wanda_dvc.results import inference
from wanda_dvc.study.markup import inline


def content(section: Section) -> Content:
    """The table and the pictures."""
    tasks, dense = section.tasks, section.dense.mean(section.tasks)
    if not tasks:
        return ["No zero-shot tasks: `tasks.names` is empty."]

    def retained(row: Row) -> Point | None:
        own, paired = row.pruned.mean(tasks), section.against_dense(row).mean
        if own is None or not dense:
            return None
        low, high = (max(0, 100 * (1 + end / dense)) for end in paired[1:3]) if paired else (None, None)
        return Point(100 * row.params.sparsity, 100 * own / dense, low, high)

    rows = []
    for name, model in section.models:
        own = model.mean(tasks)
        share = "" if model is section.dense else f"{100 * own / dense:.1f}" if own is not None and dense else DASH
        rows.append([name, *(percent(model.accuracies.get(task)) for task in tasks), percent(own), share])
    caption = "Accuracy in percent; the mean is over tasks, retained is the mean as a percentage of the dense model's."
    parts: Content = [table(caption, ["", *map(inline, tasks), "mean", "retained"], rows)]
    parts += _flips(section)
    if panels := _panels(section):
        levels = [_point(section.dense, task, place) for place, task in enumerate(tasks)]
        parts.append(
            Picture(
                f"{section.prefix}accuracy",
                "Accuracy by task",
                "A panel for each sparsity; bars are 95 % intervals (Wilson), the line is the dense model.",
                charts.accuracies(panels, tasks, levels, list(section.curves)),
            )
        )
    if shares := section.points(retained):
        parts.append(
            Picture(
                f"{section.prefix}retained",
                "Retained accuracy",
                "The mean over tasks as a percentage of the dense model's; bars are 95 % paired intervals of the "
                "difference: one that reaches the dense line is within noise.",
                charts.curves(shares, y_label="retained, %", level=("dense", 100.0), log=False),
            )
        )
    return parts


def _flips(section: Section) -> Content:
    """Return the table of changed answers, by task and metric; nothing without the models' answers."""
    asked = [(task, metric) for task in section.tasks for metric in ANSWERS]
    found = [(row, {key: row.pruned.flips(section.dense, *key) for key in asked}) for row in section.ordered]
    columns = [key for key in asked if any(flips[key] for _, flips in found)]
    if not columns:
        return []
    rows = []
    for row, flips in found:
        total = row.pruned.all_flips(section.dense, section.tasks)
        cells = [_flip(section, row, key, flips[key]) for key in columns]
        rows.append([section.name(row), *cells, percent(total.share if total else None)])
    caption = (
        "Answers that pruning changed: right → wrong / wrong → right / from one wrong choice to another; * where "
        "McNemar's exact test, adjusted, is below 0.05 (acc only). The last column is the percentage of all items, by "
        "acc."
    )
    names = [inline(task) + (f", {metric}" if metric != "acc" else "") for task, metric in columns]
    return [table(caption, ["", *names, "changed, %"], rows)]


def _flip(section: Section, row: Row, key: tuple[str, str], flips: Flips | None) -> str:
    """Return a cell of the table of changed answers."""
    if not flips:
        return DASH
    task, metric = key
    test = section.against_dense(row).tasks.get(task) if metric == "acc" else None
    return f"{flips.lost} / {flips.gained} / {flips.swapped}{' *' if beyond_noise(test) else ''}"


def _panels(section: Section) -> dict[str, dict[str, list[Point]]]:
    """By sparsity and curve, a point for each task."""
    found: dict[str, dict[str, list[Point]]] = {}
    for row in sorted(section.ordered, key=lambda row: row.params.sparsity):
        points = [_point(row.pruned, task, place) for place, task in enumerate(section.tasks)]
        if any(point.y is not None for point in points):
            found.setdefault(row.sparsity, {})[section.series(row)] = points
    return found


def _point(measured: Measured, task: str, place: int) -> Point:
    value, answers = measured.accuracies.get(task), measured.answers(task)
    if value is None or not answers:
        return Point(place, None if value is None else 100 * value)
    ends = inference.accuracy(list(answers.values()))
    return Point(place, 100 * value, 100 * ends.low, 100 * ends.high)
