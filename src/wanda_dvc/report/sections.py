"""A report's content, of the rows: tables, pictures, and in words what they show and how sure that is."""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple

from wanda_dvc.export.repeat import how_to_repeat
from wanda_dvc.pruning.patterns import parse_pattern
from wanda_dvc.report import charts, inference
from wanda_dvc.report.charts import Point
from wanda_dvc.report.inference import Estimate
from wanda_dvc.report.pages import Code, Content, Heading, Items, Picture, Table, Text
from wanda_dvc.report.published import sources
from wanda_dvc.report.rows import Collected, Row
from wanda_dvc.study.tensors import block_count
from wanda_dvc.views.norms import input_norms

METHOD = {"wanda": "Wanda"}
OF_EVALUATION = ("model", "dtype", "perplexity.", "tasks.", "zero_shot.")
OF_CHOICE = ("method", "sparsity", "pattern")
ALPHA = 0.05
DASH = "–"
MODEL_STAGES = ("calibrate", "mask", "apply", "perplexity", "zero-shot")


class Test(NamedTuple):
    """One paired test: of what, between which two, and its p-value."""

    first: str
    second: str
    measure: str
    p: float


@dataclass
class Section:
    """Rows measured in the same way, whose numbers may be compared: the same model, texts, tasks, dtype."""

    rows: list[Row]
    tests: list[Test] = field(default_factory=list)

    @cached_property
    def settings(self) -> dict[str, Any]:
        return self.rows[0].settings()

    @cached_property
    def title(self) -> str:
        name = self.settings["model"]
        return name.rsplit("/", 1)[-1] if name.startswith("/") else name

    @cached_property
    def tasks(self) -> list[str]:
        return self.settings["tasks.names"]

    @cached_property
    def varying(self) -> list[str]:
        """What else the rows differ in than method, sparsity and pattern."""
        every = [row.settings() for row in self.rows]
        keys = [key for key in every[0] if not key.startswith(OF_EVALUATION) and key not in OF_CHOICE]
        return [key for key in keys if len({repr(one[key]) for one in every}) > 1]

    def series(self, row: Row) -> str:
        """The curve that a row is on."""
        settings = row.settings()
        pattern = "" if settings["pattern"] == "unstructured" else f" {settings['pattern']}"
        variant = ", ".join(f"{key}={settings[key]}" for key in self.varying)
        return METHOD.get(settings["method"], settings["method"]) + pattern + (f" ({variant})" if variant else "")

    def label(self, row: Row) -> str:
        """What a row is called; its experiment's name too where another has the same parameters."""
        name = f"{self.series(row)} {sparsity(row)}" if row.params.pattern == "unstructured" else self.series(row)
        twins = [other for other in self.rows if other.settings() == row.settings()]
        return f"{name} [{row.name}]" if len(twins) > 1 else name

    @cached_property
    def curves(self) -> dict[str, list[Row]]:
        """Rows by curve, by sparsity."""
        found: dict[str, list[Row]] = {}
        for row in sorted(self.rows, key=lambda row: (self.series(row), row.params.sparsity)):
            found.setdefault(self.series(row), []).append(row)
        return found

    def dense(self, name: str) -> Row | None:
        """A row in which the dense model was measured too, with its details if any has them."""
        with_metric = [row for row in self.rows if row.metric("dense", name)]
        with_details = [row for row in with_metric if row.details("dense", name)]
        return next(iter(with_details or with_metric), None)

    def test(self, first: str, second: str, measure: str, p: float) -> Test:
        test = Test(first, second, measure, p)
        self.tests.append(test)
        return test

    @cached_property
    def adjusted(self) -> dict[Test, float]:
        """Holm's p-values over all tests of the section; to be asked once all are made."""
        return dict(zip(self.tests, inference.holm([test.p for test in self.tests]), strict=True))


def sections(rows: list[Row]) -> list[Section]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        key = repr([(name, value) for name, value in row.settings().items() if name.startswith(OF_EVALUATION)])
        found.setdefault(key, []).append(row)
    return [Section(rows) for rows in found.values()]


def sparsity(row: Row) -> str:
    return f"{100 * row.params.sparsity:g} %"


# --- the whole report ---


def content(collected: Collected) -> Content:
    parts: Content = []
    found = sections(collected.rows)
    several = len(found) > 1
    if several:
        parts.append(
            Text(
                f"The experiments were measured in {len(found)} ways (model, texts, tasks or dtype differ). Each has a "
                "chapter of its own; numbers of different chapters may not be compared."
            )
        )
    for number, section in enumerate(found):
        prefix = f"s{number}-"
        parts += _chapter(section, f" ({number + 1})" if several else "", prefix)
    parts += _left_out(collected)
    return parts


def _chapter(section: Section, mark: str, prefix: str) -> Content:
    sure = _how_sure(section)  # makes the tests, which what is said first needs
    return [
        Heading(2, section.title + mark),
        *_protocol(section),
        Heading(3, f"In words{mark}"),
        _in_words(section),
        Heading(3, f"Perplexity{mark}"),
        *_perplexity(section, prefix),
        Heading(3, f"Zero-shot accuracy{mark}"),
        *_zero_shot(section, prefix),
        Heading(3, f"How sure it is{mark}"),
        *sure,
        Heading(3, f"Beside what was published{mark}"),
        *_published(section),
        Heading(3, f"What was removed, and where{mark}"),
        *_structure(section, prefix),
        Heading(3, f"What it took{mark}"),
        *_took(section, prefix),
        Heading(3, f"How each row was made{mark}"),
        *_made(section),
    ]


def _protocol(section: Section) -> Content:
    settings = section.settings
    windows = "all" if settings["perplexity.windows"] is None else f"the first {settings['perplexity.windows']}"
    limit = settings["zero_shot.limit"]
    texts = [
        f"Perplexity: {windows} windows of {settings['perplexity.length']} tokens of "
        f"`{settings['perplexity.text.source']}`, {settings['perplexity.text.split']}, rest "
        f"{settings['perplexity.rest']}; {settings['dtype']}.",
        f"Zero-shot: {', '.join(section.tasks)}; {f'the first {limit} items' if limit else 'all items'}, no examples "
        "in the prompt.",
    ]
    if settings["tasks.source"] == "samples":
        texts.append(
            "The tasks are samples written for wanda-dvc, not the benchmarks: they compare these models and nothing "
            "else."
        )
    same = {key: value for key, value in settings.items() if key.startswith("calibration.")}
    if not any(key in section.varying for key in same):
        texts.append(
            f"Calibration: {same['calibration.samples']} windows of {same['calibration.length']} tokens of "
            f"`{same['calibration.text.source']}`, {same['calibration.text.split']}, seed {same['calibration.seed']}."
        )
    if "propagation" not in section.varying:
        texts.append(f"`propagation: {settings['propagation']}`.")
    return [Items(texts)]


# --- perplexity ---


def _perplexity_of(row: Row, model: str) -> tuple[float | str | None, Estimate | None]:
    """The metric, and its interval from the windows' losses."""
    losses = row.details(model, "perplexity").get("losses")
    value = row.metric(model, "perplexity").get("perplexity")
    if not losses or not isinstance(value, float) or not all(isinstance(loss, float) for loss in losses):
        return value, None
    return value, inference.perplexity(losses, _predictions(row, model))


def _predictions(row: Row, model: str) -> list[int]:
    details = row.details(model, "perplexity")
    protocol = details["protocol"]
    whole = [protocol["length"] - 1] * protocol["windows"]
    return whole if protocol["rest"] == "dropped" else [*whole, protocol["rest"] - 1]


def _paired_ratio(first: Row, of_first: str, second: Row, of_second: str) -> Estimate | None:
    """None where one of them diverged, or was measured on other tokens, or its losses are not there."""
    one, other = first.details(of_first, "perplexity"), second.details(of_second, "perplexity")
    if not one or not other:
        return None
    keys = ("tokens_sha256", "windows", "length", "rest")
    if any(one["protocol"].get(key) != other["protocol"].get(key) for key in keys):
        return None
    losses = one["losses"], other["losses"]
    if not all(isinstance(loss, float) for loss in itertools.chain(*losses)):
        return None
    return inference.ratio(*losses, _predictions(first, of_first))


def _perplexity(section: Section, prefix: str) -> Content:
    base = section.dense("perplexity")
    dense = base.metric("dense", "perplexity")["perplexity"] if base else None
    methods = sorted({row.params.method for row in section.rows})
    keys = sorted({_place(section, row) for row in section.rows})
    improve = {"magnitude", "wanda"} <= set(methods)
    rows = []
    for place in keys:
        here = {row.params.method: row for row in section.rows if _place(section, row) == place}
        values = {m: row.metric("pruned", "perplexity").get("perplexity") for m, row in here.items()}
        cells = [place[1], number(dense), *(number(values.get(method)) for method in methods)]
        if improve:
            cells.append(_improvement(values.get("magnitude"), values.get("wanda")))
        rows.append(cells)
    headers = ["sparsity", "dense", *(METHOD.get(method, method) for method in methods)]
    headers += ["Wanda's improvement"] if improve else []
    parts: Content = [
        Table("Perplexity; the improvement is of Wanda over magnitude, 1 − Wanda / magnitude.", headers, rows)
    ]
    absolute: dict[str, list[Point]] = {}
    increase: dict[str, list[Point]] = {}
    for label, on_curve in section.curves.items():
        absolute[label], increase[label] = [], []
        for row in on_curve:
            value, interval = _perplexity_of(row, "pruned")
            if value is None:
                continue
            x = 100 * row.params.sparsity
            y = value if isinstance(value, float) else None
            absolute[label].append(Point(x, y, interval and interval.low, interval and interval.high))
            if isinstance(dense, float):
                paired = base and _paired_ratio(row, "pruned", base, "dense")
                ends = (paired.low, paired.high) if paired else (None, None)
                increase[label].append(Point(x, y / dense if y is not None else None, *ends))
    level = ("dense", dense) if isinstance(dense, float) else None
    lost = [
        section.label(row) for row in section.rows if row.metric("pruned", "perplexity").get("perplexity") == "diverged"
    ]
    said = f" Diverged, and so at the upper edge: {', '.join(lost)}." if lost else ""
    parts.append(
        _picture(
            prefix + "perplexity", "Perplexity against sparsity",
            f"Log scale; bars are 95 % intervals over windows.{said}",
            lambda: charts.curves(absolute, y_label="perplexity, log scale", level=level, log=True),
        )
    )  # fmt: skip
    if any(increase.values()):
        parts.append(
            _picture(
                prefix + "increase", "Increase over dense",
                f"How many times the dense model's perplexity; log scale, bars are 95 % paired intervals.{said}",
                lambda: charts.curves(increase, y_label="pruned / dense, log scale", level=("dense", 1.0), log=True),
            )
        )  # fmt: skip
    return parts


def _place(section: Section, row: Row) -> tuple[float, str]:
    """What the methods of one line of the table share."""
    settings = row.settings()
    pattern = "" if settings["pattern"] == "unstructured" else f" {settings['pattern']}"
    variant = "".join(f", {key}={settings[key]}" for key in section.varying)
    return settings["sparsity"], f"{sparsity(row)}{pattern}{variant}"


def _improvement(magnitude: float | str | None, wanda: float | str | None) -> str:
    if isinstance(magnitude, float) and isinstance(wanda, float):
        percent = 100 * (1 - wanda / magnitude)
        return (f"{percent:.2f} %" if 99 < percent < 100 else f"{percent:.1f} %").replace("-", "−")
    return f"{DASH} (magnitude diverged)" if magnitude == "diverged" and isinstance(wanda, float) else DASH


# --- zero-shot ---


def _answers(row: Row, model: str, task: str) -> dict[Any, bool]:
    """Which items were answered rightly."""
    return {item["item"]: item["acc"] > 0.5 for item in row.details(model, f"zero_shot/{task}").get("items", [])}


def _accuracy(row: Row, model: str, task: str) -> float | None:
    return row.metric(model, f"zero_shot/{task}").get("acc")


def _mean(section: Section, row: Row, model: str) -> float | None:
    values = [_accuracy(row, model, task) for task in section.tasks]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def _dense_rows(section: Section) -> dict[str, Row]:
    """By task, a row that has the dense model's answers."""
    found = {task: section.dense(f"zero_shot/{task}") for task in section.tasks}
    return {task: row for task, row in found.items() if row}


def _dense_mean(section: Section) -> float | None:
    values = [_accuracy(row, "dense", task) for task, row in _dense_rows(section).items()]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(section.tasks) else None


def _zero_shot(section: Section, prefix: str) -> Content:
    dense_rows, dense_mean = _dense_rows(section), _dense_mean(section)
    dense = {task: _accuracy(row, "dense", task) for task, row in dense_rows.items()}
    table = [["dense", *(percent(dense.get(task)) for task in section.tasks), percent(dense_mean), ""]]
    retained: dict[str, list[Point]] = {}
    panels: dict[str, dict[str, list[Point]]] = {}
    for label, on_curve in section.curves.items():
        for row in on_curve:
            mean = _mean(section, row, "pruned")
            kept = 100 * mean / dense_mean if mean is not None and dense_mean else None
            cells = [percent(_accuracy(row, "pruned", task)) for task in section.tasks]
            table.append([section.label(row), *cells, percent(mean), f"{kept:.1f}" if kept is not None else DASH])
            if kept is not None and dense_mean:
                paired = _paired_mean(section, row, "pruned", None)
                ends = [100 * (1 + end / dense_mean) for end in (paired.low, paired.high)] if paired else [None, None]
                retained.setdefault(label, []).append(Point(100 * row.params.sparsity, kept, *ends))
            points = [_accuracy_point(row, "pruned", task, i) for i, task in enumerate(section.tasks)]
            if any(point.y is not None for point in points):
                panels.setdefault(sparsity(row), {})[label] = points
    headers = ["", *section.tasks, "mean", "retained"]
    caption = "Accuracy in percent; the mean is over tasks, retained is the mean as a percentage of the dense model's."
    parts: Content = [Table(caption, headers, table)]
    points = [_accuracy_point(row, "dense", task, section.tasks.index(task)) for task, row in dense_rows.items()]
    ordered = dict(sorted(panels.items(), key=lambda item: float(item[0].split()[0])))
    if ordered:
        parts.append(
            _picture(
                prefix + "accuracy", "Accuracy by task",
                "A panel for each sparsity; bars are 95 % intervals (Wilson), the line is the dense model.",
                lambda: charts.accuracies(ordered, section.tasks, points, list(section.curves)),
            )
        )  # fmt: skip
    if retained:
        parts.append(
            _picture(
                prefix + "retained", "Retained accuracy",
                "The mean over tasks as a percentage of the dense model's; bars are 95 % paired intervals of the "
                "difference: one that reaches the dense line is within noise.",
                lambda: charts.curves(retained, y_label="retained, %", level=("dense", 100.0), log=False),
            )
        )  # fmt: skip
    return parts


def _accuracy_point(row: Row, model: str, task: str, x: int) -> Point:
    value = _accuracy(row, model, task)
    if value is None:
        return Point(x, None)
    answers = _answers(row, model, task)
    if not answers:
        return Point(x, 100 * value)
    interval = inference.accuracy(list(answers.values()))
    return Point(x, 100 * value, 100 * interval.low, 100 * interval.high)


# --- how sure ---


def _both(section: Section, task: str, first: Row, model: str, second: Row | None) -> tuple[list[bool], list[bool]]:
    """The answers to the items that both gave one to; `second` None: the dense model."""
    other, of_other = (second, "pruned") if second else (_dense_rows(section).get(task), "dense")
    if other is None:
        return [], []
    name = f"zero_shot/{task}"
    hashes = [
        row.details(which, name).get("protocol", {}).get("task", {}).get("sha256")
        for row, which in ((first, model), (other, of_other))
    ]
    if hashes[0] != hashes[1]:
        return [], []
    mine, theirs = _answers(first, model, task), _answers(other, of_other, task)
    shared = [item for item in mine if item in theirs]
    return [mine[item] for item in shared], [theirs[item] for item in shared]


def _paired_mean(section: Section, first: Row, model: str, second: Row | None) -> Estimate | None:
    """The difference of the means over tasks, on the items that both answered; None unless it is so for every task."""
    differences = []
    for task in section.tasks:
        mine, theirs = _both(section, task, first, model, second)
        if not mine:
            return None
        differences.append([float(a) - float(b) for a, b in zip(mine, theirs, strict=True)])
    return inference.mean_of_tasks(differences)


def _pairs(section: Section) -> Iterator[tuple[Row, Row | None]]:
    """Each row against the dense model; then method against method, all else equal."""
    for on_curve in section.curves.values():
        for row in on_curve:
            yield row, None
    ordered = [row for on_curve in section.curves.values() for row in on_curve]
    for first, second in itertools.combinations(ordered, 2):
        if first.params.method != second.params.method and _place(section, first) == _place(section, second):
            pair = (first, second) if first.params.method == "wanda" else (second, first)
            yield pair


def _how_sure(section: Section) -> Content:
    absolute = []
    base = section.dense("perplexity")
    named = [("dense", base, "dense")] if base else []
    named += [(section.label(row), row, "pruned") for rows in section.curves.values() for row in rows]
    for label, row, model in named:
        value, interval = _perplexity_of(row, model)
        accurate = _mean_interval(section, row, model)
        absolute.append([label, number(value), _range(interval, number), *accurate])
    parts: Content = [
        Table(
            "Each number's own 95 % interval: of perplexity over its windows (t on the mean loss), of the mean "
            "accuracy over its items, in percent.",
            ["", "perplexity", "interval", "mean accuracy", "interval"],
            absolute,
        )
    ]
    measured: list[tuple[str, str, Estimate | None, Estimate | None, dict[str, inference.Disagreement]]] = []
    for first, second in _pairs(section):
        one, other = section.label(first), section.label(second) if second else "dense"
        against = second or base
        ratio = _paired_ratio(first, "pruned", against, "pruned" if second else "dense") if against else None
        mean = _paired_mean(section, first, "pruned", second)
        tasks = {}
        for task in section.tasks:
            mine, theirs = _both(section, task, first, "pruned", second)
            if mine:
                tasks[task] = inference.mcnemar(mine, theirs)
                section.test(one, other, task, tasks[task].p)
        if ratio:
            section.test(one, other, "perplexity", ratio.p)
        if mean:
            section.test(one, other, "mean", mean.p)
        measured.append((one, other, ratio, mean, tasks))
    summary, items = [], []
    for one, other, ratio, mean, tasks in measured:
        cells = [f"{one} against {other}"]
        cells += [f"{factor(ratio.value)} ×", _range(ratio, factor)] if ratio else [DASH, DASH]
        cells += [_verdict(section, one, other, "perplexity")]
        cells += [signed(mean.value), _range(mean, signed)] if mean else [DASH, DASH]
        cells += [_verdict(section, one, other, "mean")]
        summary.append(cells)
        shown = [
            f"{tasks[task].first} / {tasks[task].second}{_star(section, one, other, task)}" if task in tasks else DASH
            for task in section.tasks
        ]
        items.append([cells[0], *shown])
    headers = [
        "",
        "perplexity",
        "95 % interval",
        "p, adjusted",
        "mean accuracy, points",
        "95 % interval",
        "p, adjusted",
    ]
    tests = len(section.tests)
    parts.append(
        Table(
            "Paired: perplexity on the same windows as a ratio; the mean accuracy's difference on the items that both "
            "answered, in percentage points, tasks counting equally.",
            headers,
            summary,
        )
    )
    parts.append(
        Table(
            "Items that only the first got right / only the second; * where McNemar's exact test, adjusted, is below "
            "0.05.",
            ["", *section.tasks],
            items,
        )
    )
    parts.append(
        Text(
            f"{tests} tests were made in this chapter. All p-values are adjusted for that number (Holm); unadjusted, "
            f"about {max(1, round(ALPHA * tests))} of {tests} would fall below 0.05 if nothing differed at all. "
            "Intervals are not adjusted. Windows of one text are taken as independent, which they are not quite: the "
            "intervals of single perplexities are rather too narrow. What a test says, it says of these items and this "
            "text, with one calibration; another seed is another experiment."
        )
    )
    return parts


def _mean_interval(section: Section, row: Row, model: str) -> list[str]:
    tasks = []
    for task in section.tasks:
        of_task = _dense_rows(section).get(task) if model == "dense" else row
        answers = _answers(of_task, model, task) if of_task else {}
        tasks.append([float(right) for right in answers.values()])
    mean = _dense_mean(section) if model == "dense" else _mean(section, row, model)
    if mean is None or not all(tasks):
        return [percent(mean), DASH]
    return [percent(mean), _range(inference.mean_of_tasks(tasks), percent)]


def _find(section: Section, one: str, other: str, measure: str) -> float | None:
    for test, p in section.adjusted.items():
        if (test.first, test.second, test.measure) == (one, other, measure):
            return p
    return None


def _verdict(section: Section, one: str, other: str, measure: str) -> str:
    p = _find(section, one, other, measure)
    if p is None:
        return DASH
    shown = "< 0.001" if p < 0.001 else f"{p:.3f}"
    return shown if p < ALPHA else f"{shown}, within noise"


def _star(section: Section, one: str, other: str, measure: str) -> str:
    p = _find(section, one, other, measure)
    return " *" if p is not None and p < ALPHA else ""


def _in_words(section: Section) -> Items:
    said = []
    base = section.dense("perplexity")
    for first, second in _pairs(section):
        one, other = section.label(first), section.label(second) if second else "dense"
        parts = []
        if first.metric("pruned", "perplexity").get("perplexity") == "diverged":
            parts.append("its perplexity diverged")
        elif second and second.metric("pruned", "perplexity").get("perplexity") == "diverged":
            parts.append(f"{other}'s perplexity diverged, its own did not")
        else:
            against = second or base
            ratio = _paired_ratio(first, "pruned", against, "pruned" if second else "dense") if against else None
            if ratio:
                noise = (_find(section, one, other, "perplexity") or 0) >= ALPHA
                parts.append(f"{factor(ratio.value)} × the perplexity ({'within' if noise else 'beyond'} noise)")
            else:
                parts.append("perplexities could not be compared window by window")
        mean = _paired_mean(section, first, "pruned", second)
        if mean:
            noise = (_find(section, one, other, "mean") or 0) >= ALPHA
            size = f"{signed(mean.value)} points of mean accuracy"
            parts.append(f"{size} ({'within noise' if noise else 'beyond noise'})")
        said.append(f"{one} against {other}: {'; '.join(parts)}.")
    return Items(said)


# --- published ---


def _published(section: Section) -> Content:
    rows, nearest = [], None
    for source in sources():
        for entry in source.rows:
            for measure in [key for key in entry if key == "perplexity" or key in section.tasks]:
                for row, different in [
                    (row, source.differences(row.settings(), measure, entry)) for row in section.rows
                ]:
                    if different:
                        if nearest is None or len(different) < len(nearest[-1]):
                            nearest = source.source, entry["method"], measure, different
                        continue
                    model = "dense" if entry["method"] == "dense" else "pruned"
                    own, shown = _own(section, row, model, measure), entry[measure]
                    label = "dense" if model == "dense" else section.label(row)
                    rows.append(
                        [label, source.source, measure, _as(measure, shown), _as(measure, own), _off(shown, own)]
                    )
    unique = list(dict.fromkeys(tuple(row) for row in rows))
    if unique:
        caption = "Published rows of the same protocol; accuracies in percent. A dash: not measured here."
        headers = ["", "source", "measure", "published", "here", "here / published"]
        return [Table(caption, headers, [list(row) for row in unique])]
    assert nearest
    return [
        Text(
            "No published row that this report knows has the protocol of these experiments, so none is set beside "
            f"them. The nearest is {nearest[0]}: {nearest[1]}, {nearest[2]}; it differs in "
            f"{', '.join(f'`{key}`' for key in nearest[3])}."
        )
    ]


def _own(section: Section, row: Row, model: str, measure: str) -> float | str | None:
    if measure == "perplexity":
        return row.metric(model, "perplexity").get("perplexity")
    value = _accuracy(row, model, measure)
    return None if value is None else 100 * value


def _as(measure: str, value: float | str | None) -> str:
    return number(value) if measure == "perplexity" or not isinstance(value, float) else f"{value:.2f}"


def _off(published: float | str, own: float | str | None) -> str:
    both = isinstance(published, float | int) and isinstance(own, float)
    return f"{own / published:.3f}" if both else DASH  # type: ignore[operator]


# --- sparsity, norms, bytes ---


def _structure(section: Section, prefix: str) -> Content:
    parts: Content = []
    series: dict[str, list[tuple[int, float, float, float]]] = {}
    for on_curve in section.curves.values():
        for row in on_curve:
            blocks: dict[int, list[tuple[int, int]]] = {}
            for line in row.plot("sparsity"):
                blocks.setdefault(int(line["block"]), []).append((int(line["zeros"]), int(line["weights"])))
            if blocks:
                series[section.label(row)] = [of_block(block, linears) for block, linears in sorted(blocks.items())]
    if series:
        parts.append(
            _picture(
                prefix + "sparsity", "Sparsity by block",
                "Measured on the pruned weights; the shade is from a block's least to its most pruned linear. Curves "
                "of one sparsity lie over each other.",
                lambda: charts.by_block(series),
            )
        )  # fmt: skip
    by_stats: dict[str, Row] = {}
    for row in section.rows:
        if block_count(row.study.stats):
            by_stats.setdefault(row.hashes.get("stats", row.name), row)
    for count, row in enumerate(by_stats.values()):
        inputs = input_norms(row.study.stats)
        found = sum(len(one.outliers) for one in inputs)
        total = sum(one.features * len(one.blocks) for one in inputs)
        named = f" of {section.series(row)}" if len(by_stats) > 1 else ""
        parts.append(
            _picture(
                f"{prefix}norms{count or ''}", f"Input norms by block and feature{named}",
                f"Above: the norms ‖X‖₂ of each distinct input. Below: which features are outliers, more than 6 times "
                f"their median ({found:,} of {total:,}, {100 * found / total:.2f} %). Wanda spares the weights that "
                "read them.",
                partial(charts.norms, inputs),
            )
        )  # fmt: skip
    return parts + _bytes(section, prefix)


def of_block(block: int, linears: list[tuple[int, int]]) -> tuple[int, float, float, float]:
    """From each linear's zeros and weights: the block, its sparsity in percent, and its linears' least and most."""
    fractions = [100 * zeros / weights for zeros, weights in linears]
    mean = 100 * sum(zeros for zeros, _ in linears) / sum(weights for _, weights in linears)
    return block, mean, min(fractions), max(fractions)


def stored_bytes(row: Row) -> int | None:
    """The model's bytes were zeros left out; None if it isn't known.

    Unstructured: each linear as one bit a weight, and the values that stay. n:m: the values that stay, each with
    ⌈log₂ m⌉ bits for its place among m (2:4 as sparse tensor cores read it). All else as it is.
    """
    linears, dense = row.plot("sparsity"), row.sizes.get("models/dense")
    if not linears or not dense:
        return None
    pattern = parse_pattern(row.params.pattern)
    total = dense
    for line in linears:
        weights, zeros, size = int(line["weights"]), int(line["zeros"]), int(line["bytes"])
        kept = weights - zeros
        places = kept * math.ceil(math.log2(pattern[1])) if pattern else weights
        total += kept * (size // weights) + math.ceil(places / 8) - size
    return total


def _bytes(section: Section, prefix: str) -> Content:
    base = section.dense("perplexity")
    dense = base.metric("dense", "perplexity")["perplexity"] if base else None
    series: dict[str, list[tuple[float, float, str]]] = {}
    rows = []
    size = section.rows[0].sizes.get("models/dense")
    if size:
        rows.append(["dense", f"{size / 1e6:,.1f}", "100.0", number(dense)])
    for label, on_curve in section.curves.items():
        for row in on_curve:
            stored, value = stored_bytes(row), row.metric("pruned", "perplexity").get("perplexity")
            if stored is None:
                continue
            share = f"{100 * stored / row.sizes['models/dense']:.1f}"
            rows.append([section.label(row), f"{stored / 1e6:,.1f}", share, number(value)])
            if isinstance(value, float):
                series.setdefault(label, []).append(
                    (stored / 1e6, value, row.params.pattern.replace("unstructured", "") or sparsity(row))
                )
    if not rows:
        return []
    caption = (
        "What the model would take were zeros left out. Assumed: unstructured, one bit a weight for where they stand "
        "and the values that stay; n:m, the values that stay and ⌈log₂ m⌉ bits each for their place. The files that "
        "`apply` writes hold the zeros and are no smaller."
    )
    parts: Content = [Table(caption, ["", "MB", "% of dense", "perplexity"], rows)]
    if series:
        at_dense = (size / 1e6, dense) if size and isinstance(dense, float) else None
        parts.append(
            _picture(
                prefix + "bytes", "Quality against bytes",
                "Perplexity on a log scale against the model's size with its zeros left out; what diverged is not on "
                "it.",
                lambda: charts.against_bytes(at_dense, series),
            )
        )  # fmt: skip
    return parts


# --- time, and how ---


def _stage(run: str) -> str:
    return next((stage for stage in ("zero-shot", "perplexity", "download") if run.startswith(stage)), run)


def _took(section: Section, prefix: str) -> Content:
    stages = ["download", *MODEL_STAGES]
    bars: dict[str, dict[str, float]] = {"shared by the rows": {}}
    seen = set()
    for on_curve in section.curves.values():
        for row in on_curve:
            own = bars[section.label(row)] = {}
            for run, time in row.times().items():
                shared = run == "calibrate" or run.startswith("download") or "-dense" in run
                key = (run, time["key"])
                if shared and key in seen:
                    continue
                seen.add(key)
                bar = bars["shared by the rows"] if shared else own
                bar[_stage(run)] = bar.get(_stage(run), 0.0) + time["seconds"]
    bars = {label: bar for label, bar in bars.items() if bar}
    if not bars:
        return [Text("No times are at hand.")]
    used = [stage for stage in stages if any(stage in bar for bar in bars.values())]
    table = [
        [label, *(seconds(bar[stage]) if stage in bar else DASH for stage in used), seconds(sum(bar.values()))]
        for label, bar in bars.items()
    ]
    all_of = {stage: sum(bar.get(stage, 0.0) for bar in bars.values()) for stage in used}
    table.append(["all", *(seconds(all_of[stage]) for stage in used), seconds(sum(all_of.values()))])
    machines = sorted({f"{t['machine']}, {t['device']}" for row in section.rows for t in row.times().values()})
    caption = (
        "Seconds by stage, each run counted once; of a stage that was killed and went on, those since then. Measured "
        f"on {'; '.join(machines)}."
    )
    return [
        Table(caption, ["", *used, "all"], table),
        _picture(
            prefix + "time", "Time by stage",
            "What the rows share (downloads, calibration, the dense model's evaluation) was paid once.",
            lambda: charts.times(bars, used),
        ),
    ]  # fmt: skip


def _made(section: Section) -> Content:
    parts: Content = []
    own = {*OF_CHOICE, *section.varying}
    table = []
    for on_curve in section.curves.values():
        for row in on_curve:
            times = row.times()
            mine = sum(time["seconds"] for run, time in times.items() if run in ("mask", "apply") or "-pruned" in run)
            memory = max(
                (time["peak_anonymous_gb"] for time in times.values() if "peak_anonymous_gb" in time), default=None
            )
            machine = "; ".join(sorted({f"{time['machine']}, {time['device']}" for time in times.values()})) or DASH
            table.append(
                [
                    section.label(row),
                    ", ".join([row.name, *row.also]),
                    row.commit[:10] if row.commit else "not committed",
                    ", ".join(f"{key}={row.settings()[key]}" for key in row.settings() if key in own),
                    f"{seconds(mine)} s" if times else DASH,
                    f"{memory:.2f} GB" if memory else DASH,
                    machine,
                ]
            )
    headers = ["", "experiment", "commit", "its own parameters", "its own time", "peak anonymous memory", "machine"]
    parts.append(Table("Where each row comes from.", headers, table, numbers=False))
    shared = [[key, f"`{_shown(value)}`"] for key, value in section.settings.items() if key not in own]
    parts.append(Table("The parameters that all rows share.", ["parameter", "value"], shared, numbers=False))
    for on_curve in section.curves.values():
        for row in on_curve:
            commands, by_hand = how_to_repeat(row.params)
            parts += [Text(f"To repeat {section.label(row)}, in a fresh clone:"), Code(commands)]
            if by_hand:
                parts.append(Text(by_hand.strip()))
            parts += [Items(row.notes)] if row.notes else []
    return parts


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(value)
    return "null" if value is None else repr(value).strip("'") if isinstance(value, str) else f"{value}"


def _left_out(collected: Collected) -> Content:
    parts: Content = [Heading(2, "What is not in it")]
    items = [
        f"{one.name}: {one.state.lower()}" + (f" ({one.changes})" if one.changes else "")
        for one in collected.unfinished
    ]
    items += collected.notes
    items += [f"{row.name}: {note}" for row in collected.rows for note in row.notes]
    if items:
        return [
            *parts,
            Text("Experiments that have not finished or have failed, and what could not be read:"),
            Items(items),
        ]
    return [
        *parts,
        Text("Nothing: every experiment that was asked for has finished, and all that it recorded was at hand."),
    ]


# --- small things ---


def _picture(name: str, title: str, description: str, draw: Callable[[], Any]) -> Picture:
    return Picture(name, title, description, charts.svg(draw(), name, title, description))


def number(value: float | str | None) -> str:
    if value is None:
        return DASH
    if isinstance(value, str):
        return value
    return f"{value:,.2f}" if value < 1000 else f"{value:,.0f}" if value < 1e7 else f"{value:.2e}"


def seconds(value: float) -> str:
    """The same whatever the order in which it was summed up, of hundredths."""
    return f"{round(value, 2):,.1f}"


def factor(value: float) -> str:
    """How many times, to a thousandth where that is much."""
    return f"{value:.3f}" if value < 10 else f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def percent(value: float | None) -> str:
    return DASH if value is None else f"{100 * value:.1f}"


def signed(value: float) -> str:
    """A difference in percentage points."""
    return f"{100 * value:+.1f}".replace("-", "−")


def _range(interval: Estimate | None, shown: Callable[[float], str]) -> str:
    return f"{shown(interval.low)} to {shown(interval.high)}" if interval else DASH
