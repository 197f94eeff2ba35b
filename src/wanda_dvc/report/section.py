"""A section of the report: rows measured in the same way, whose numbers may be compared."""

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from wanda_dvc.report.allocations import is_uniform_of
from wanda_dvc.report.comparisons import Comparison, compare
from wanda_dvc.report.formatting import rank, setting, title
from wanda_dvc.report.measures import Measured, mean, pruned
from wanda_dvc.report.pages import literal
from wanda_dvc.report.rows import Row

OF_EVALUATION = ("model", "dtype", "perplexity.", "tasks.", "zero_shot.")
OF_CHOICE = ("method", "sparsity", "pattern")


@dataclass
class Section:
    """Rows with the same model, texts, tasks and dtype."""

    rows: list[Row]
    title: str = ""  # the model's name, and the settings in which sections of one model differ
    mark: str = ""  # follows each heading if there are several sections
    prefix: str = "s0-"  # of its pictures' names

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The first row's parameters; of those in OF_EVALUATION, every row's."""
        return self.rows[0].settings()

    @cached_property
    def tasks(self) -> list[str]:
        """The tasks' names, in the order of `tasks.names`."""
        return list(self.settings["tasks.names"])

    @cached_property
    def methods(self) -> list[str]:
        """The rows' methods, baselines first."""
        return sorted({str(row.params.filled.method) for row in self.rows}, key=rank)

    @cached_property
    def varying(self) -> list[str]:
        """The parameters beside method, sparsity and pattern in which the rows differ."""
        every = [row.settings() for row in self.rows]
        keys = [key for key in every[0] if not key.startswith(OF_EVALUATION) and key not in OF_CHOICE]
        return [key for key in keys if len({repr(one[key]) for one in every}) > 1]

    def series(self, row: Row) -> str:
        """The name of the curve that a row is on."""
        settings = row.settings()
        variant = ", ".join(f"{key}={settings[key]}" for key in self.varying)
        return title(settings["method"]) + _pattern(row) + (f" ({variant})" if variant else "")

    def label(self, row: Row) -> str:
        """A row's name, followed by its experiment's name if another row has the same parameters."""
        name = f"{self.series(row)} {sparsity(row)}" if row.params.pattern == "unstructured" else self.series(row)
        twins = [other for other in self.rows if other.settings() == row.settings()]
        return f"{name} [{row.name}]" if len(twins) > 1 else name

    def place(self, row: Row) -> tuple[float, str]:
        """What rows of different methods have in common if they may be compared: the sparsity, and all in words."""
        settings = row.settings()
        variant = "".join(f", {key}={settings[key]}" for key in self.varying)
        return settings["sparsity"], f"{sparsity(row)}{_pattern(row)}{variant}"

    @cached_property
    def curves(self) -> dict[str, list[Row]]:
        """The rows by curve, each curve by rising sparsity."""
        found: dict[str, list[Row]] = {}
        for row in sorted(self.rows, key=lambda row: (self.series(row), row.params.sparsity)):
            found.setdefault(self.series(row), []).append(row)
        return found

    @cached_property
    def ordered(self) -> list[Row]:
        """The rows, curve by curve."""
        return [row for on_curve in self.curves.values() for row in on_curve]

    def dense(self, name: str) -> Measured | None:
        """The dense model as measured by a row, preferably one that has the details too.

        `name`: `perplexity` or `zero_shot/TASK`.
        """
        with_metric = [row for row in self.rows if row.metric("dense", name)]
        with_details = [row for row in with_metric if row.details("dense", name)]
        row = next(iter(with_details or with_metric), None)
        return Measured(row, "dense") if row else None

    @cached_property
    def dense_perplexity(self) -> float | str | None:
        """The dense model's perplexity; None if no row measured it."""
        base = self.dense("perplexity")
        return base.perplexity if base else None

    @cached_property
    def dense_by_task(self) -> dict[str, Measured]:
        """The dense model by task, without the tasks that no row measured it on."""
        found = {task: self.dense(f"zero_shot/{task}") for task in self.tasks}
        return {task: measured for task, measured in found.items() if measured}

    @cached_property
    def dense_mean(self) -> float | None:
        """The dense model's mean accuracy; None unless it is known for every task."""
        dense = self.dense_by_task
        return mean([dense[task].accuracy(task) if task in dense else None for task in self.tasks])

    def mean(self, row: Row) -> float | None:
        """The pruned model's mean accuracy; None unless it is known for every task."""
        return mean([pruned(row).accuracy(task) for task in self.tasks])

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """Each row against the dense model, then method against method, all else equal."""
        names = ["perplexity", *(f"zero_shot/{task}" for task in self.tasks)]
        dense = {name: self.dense(name) for name in names}
        return compare(self._pairs(), self.tasks, {name: one.row if one else None for name, one in dense.items()})

    def against_dense(self, row: Row) -> Comparison:
        """The comparison of a row with the dense model."""
        return next(one for one in self.comparisons if one.first is row and one.second is None)

    def names(self, comparison: Comparison) -> tuple[str, str]:
        """What the two models of a comparison are called, for a text of the report."""
        second = comparison.second
        return literal(self.label(comparison.first)), literal(self.label(second)) if second else "dense"

    @cached_property
    def beside_uniform(self) -> list[tuple[Row, Row]]:
        """Pairs of rows of which the second has `allocation: uniform`, the first another, all else equal."""
        every = [(row, row.settings()) for row in self.ordered]
        pairs = itertools.permutations(every, 2)
        return [(row, other) for (row, own), (other, uniform) in pairs if is_uniform_of(uniform, own)]

    def _pairs(self) -> Iterator[tuple[Row, Row | None]]:
        """Pairs of rows; of two methods, the later one in the catalog comes first: it is the one in question."""
        yield from ((row, None) for row in self.ordered)
        yield from self.beside_uniform
        for one, other in itertools.combinations(self.ordered, 2):
            ranks = rank(str(one.params.filled.method)), rank(str(other.params.filled.method))
            if ranks[0] != ranks[1] and self.place(one) == self.place(other):
                yield (one, other) if ranks[0] > ranks[1] else (other, one)


def sparsity(row: Row) -> str:
    """A row's sparsity in percent."""
    return f"{100 * row.params.sparsity:g} %"


def _pattern(row: Row) -> str:
    return "" if row.params.pattern == "unstructured" else f" {row.params.pattern}"


def sections(rows: list[Row]) -> list[Section]:
    """Group the rows by how they were measured, and name each section by what it differs in from the others."""
    groups = grouped(rows)
    differing = differences(groups)
    models = {group[0].params.model for group in groups}
    short = Counter(_short(model) for model in models)
    made = []
    for count, group in enumerate(groups):
        measured = evaluation(group)
        model = measured["model"]
        name = _short(model) if short[_short(model)] == 1 else model
        others = "; ".join(f"{key}={setting(measured.get(key))}" for key in differing if key != "model")
        full = f"{name} ({others})" if others else name
        mark = full if "model" in differing else others
        made.append(Section(group, literal(full), literal(f" ({mark})" if mark else ""), f"s{count}-"))
    return made


def grouped(rows: list[Row]) -> list[list[Row]]:
    """The rows by how they were measured. What is not known of a row tells it from no other."""
    groups: list[tuple[list[Row], dict[str, Any]]] = []
    for row in rows:
        own = evaluation([row])
        for group, known in groups:
            if all(own[key] == known[key] for key in own.keys() & known.keys()):
                group.append(row)
                known |= own
                break
        else:
            groups.append(([row], own))
    return [group for group, _ in groups]


def evaluation(group: list[Row]) -> dict[str, Any]:
    """How the rows of a group were measured: the parameters, and the files by as much as is known of them."""
    found: dict[str, Any] = {}
    for row in group:
        found |= {key: value for key, value in row.settings().items() if key.startswith(OF_EVALUATION)}
        found |= row.inputs()
    return found


def differences(groups: list[list[Row]]) -> list[str]:
    """The parameters and files of evaluation in which the groups differ."""
    every = [evaluation(group) for group in groups]
    keys = dict.fromkeys(key for one in every for key in one)
    return [key for key in keys if len({repr(one[key]) for one in every if key in one}) > 1]


def _short(model: str) -> str:
    """A Hub id as it is; of a directory, its last part."""
    return model.rsplit("/", 1)[-1] if model.startswith("/") else model
