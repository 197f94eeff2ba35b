"""A section of the report: rows with the same protocol and comparable numbers."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from wanda_dvc.params import OTHER_SOURCE, SAME_SOURCE
from wanda_dvc.plan import CHOICES
from wanda_dvc.report.charts import Point
from wanda_dvc.report.comparisons import Comparison, compare
from wanda_dvc.report.formatting import distinct
from wanda_dvc.report.measures import Measured
from wanda_dvc.report.rows import Row
from wanda_dvc.study.markup import inline

OF_EVALUATION = ("model", "dtype", "perplexity.", "tasks.", "zero_shot.")
# The settings of pruning in a row's name; they also determine the required statistics.
OF_PRUNING = (*CHOICES, "allocation_strength", "sparsity", "pattern", "calibration.statistics")


@dataclass(eq=False)
class Section:
    """Rows with the same model, texts, tasks and dtype."""

    rows: list[Row]
    evaluation: dict[str, Any]  # the protocol: parameters, and known hashes of files
    title: str = ""  # the model's name, and the settings in which sections of one model differ
    mark: str = ""  # follows each heading if there are several sections
    prefix: str = "s0-"  # of its pictures' names

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The first row's parameters; of those in OF_EVALUATION, every row's."""
        return self.rows[0].settings

    @cached_property
    def texts(self) -> list[str]:
        """The texts' names, in the order of `perplexity.texts`; a text that only some rows have is at the end."""
        return list(dict.fromkeys(text for row in self.rows for text in row.params.perplexity.texts))

    def on(self, text: str) -> "Section":
        """Return the section with the results on one text, of the rows that have it."""
        rows = [row.on(text) for row in self.rows if text in row.params.perplexity.texts]
        prefix = self.prefix if text == self.texts[0] else f"{self.prefix}{text}-"
        return Section(rows, self.evaluation, self.title, self.mark, prefix)

    def about(self, text: str) -> str:
        """Return a text's name, and whether it has the calibration's source; "" for the only text."""
        if len(self.texts) == 1:
            return ""
        kinds = {row.params.is_calibrations(text) for row in self.rows if text in row.params.perplexity.texts}
        return inline(text) + (f" ({SAME_SOURCE if kinds.pop() else OTHER_SOURCE})" if len(kinds) == 1 else "")

    @cached_property
    def tasks(self) -> list[str]:
        """The tasks' names, in the order of `tasks.names`."""
        return list(self.settings["tasks.names"])

    @cached_property
    def recipes(self) -> list[str]:
        """The rows' recipes, in the catalog's order: baselines first."""
        return [text for *_, text in sorted({row.recipe for row in self.rows})]

    @cached_property
    def varying(self) -> list[str]:
        """The parameters in which the rows differ, without parameters of pruning."""
        every = [row.settings for row in self.rows]
        keys = [key for key in every[0] if not key.startswith(OF_EVALUATION) and key not in OF_PRUNING]
        return [key for key in keys if len({repr(one[key]) for one in every}) > 1]

    def value(self, row: Row, key: str) -> str:
        """Return a row's parameter as text, different from the other rows' different values."""
        return distinct(row.settings[key], (other.settings[key] for other in self.rows))

    def series(self, row: Row) -> str:
        """Return the name of a row's curve."""
        variant = ", ".join(f"{key}={self.value(row, key)}" for key in self.varying)
        return row.recipe[-1] + row.pattern + (f" ({variant})" if variant else "")

    @cached_property
    def _labels(self) -> dict[int, str]:
        plain = [self.series(row) + ("" if ":" in row.pattern else f" {row.sparsity}") for row in self.rows]
        labels = plain
        for tag in (lambda row: row.name, lambda row: str(row.commit)[:7]):  # one name may be of several commits
            twins = Counter(labels)
            labels = [
                f"{label} [{tag(row)}]" if twins[label] > 1 else label
                for row, label in zip(self.rows, labels, strict=True)
            ]
        return {id(row): label for row, label in zip(self.rows, labels, strict=True)}

    def label(self, row: Row) -> str:
        """A row's name for a picture, followed by its experiment's name if another row has the same parameters."""
        return self._labels[id(row)]

    def name(self, row: Row | None) -> str:
        """A row's name for a text; None is the dense model."""
        return inline(self.label(row)) if row else "dense"

    def names(self, comparison: Comparison) -> str:
        """The names of the two models of a comparison."""
        return f"{self.name(comparison.first)} against {self.name(comparison.second)}"

    def place(self, row: Row) -> tuple[float, str]:
        """Return the sparsity and other values shared by comparable rows of different recipes, in words."""
        variant = "".join(f", {key}={self.value(row, key)}" for key in self.varying)
        removed = "" if row.removed is None else f", {100 * row.removed:.1f} % of all parameters"
        return row.params.sparsity, f"{row.sparsity}{row.pattern}{removed}{variant}"

    @cached_property
    def curves(self) -> dict[str, list[Row]]:
        """The rows by curve, each curve by rising sparsity."""
        found: dict[str, list[Row]] = {}
        for row in sorted(self.rows, key=lambda row: (row.recipe, self.series(row), row.params.sparsity)):
            found.setdefault(self.series(row), []).append(row)
        return found

    @cached_property
    def ordered(self) -> list[Row]:
        """The rows, curve by curve."""
        return [row for on_curve in self.curves.values() for row in on_curve]

    def points(self, of: Callable[[Row], Point | None]) -> dict[str, list[Point]]:
        """Return the existing points of rows, by curve."""
        found = {label: [point for row in rows if (point := of(row))] for label, rows in self.curves.items()}
        return {label: points for label, points in found.items() if points}

    @cached_property
    def dense(self) -> Measured:
        """The dense model, measured by any of the rows."""
        return Measured.merged(row.dense for row in self.rows)

    @cached_property
    def models(self) -> list[tuple[str, Measured]]:
        """The dense model, if it was measured, and each row's, with their names for a text."""
        dense = [("dense", self.dense)] if self.dense.perplexity is not None or self.dense.accuracies else []
        return [*dense, *((self.name(row), row.pruned) for row in self.ordered)]

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """Each row against the dense model, then recipe against recipe, all else equal."""
        return compare(self._pairs(), self.tasks, self.dense)

    def against_dense(self, row: Row) -> Comparison:
        """The comparison of a row with the dense model."""
        return next(one for one in self.comparisons if one.first is row and one.second is None)

    def _pairs(self) -> Iterator[tuple[Row, Row | None]]:
        """Yield pairs of rows; of two recipes, the later in the catalog is first, as the candidate."""
        yield from ((row, None) for row in self.ordered)
        for one, other in itertools.combinations(self.ordered, 2):
            if one.recipe != other.recipe and self.place(one) == self.place(other):
                yield other, one


def sections(rows: list[Row]) -> list[Section]:
    """Group the rows by protocol, and name each section by its differences from the others.

    Unknown values match all values.
    """
    found: list[Section] = []
    for row in rows:
        own = {key: value for key, value in row.settings.items() if key.startswith(OF_EVALUATION)} | row.inputs()
        for section in found:
            if all(section.evaluation[key] == own[key] for key in own.keys() & section.evaluation.keys()):
                section.rows.append(row)
                section.evaluation |= own
                break
        else:
            found.append(Section([row], own, prefix=f"s{len(found)}-"))
    differing = differences(found)

    def value(section: Section, key: str) -> str:
        return distinct(section.evaluation.get(key), (one.evaluation.get(key) for one in found))

    for section in found:
        section.rows = [row.on(section.texts[0]) for row in section.rows]  # a row's own first text may be another
        name = value(section, "model")
        others = "; ".join(f"{key}={value(section, key)}" for key in differing if key != "model")
        full = f"{name} ({others})" if others else name
        mark = full if "model" in differing else others
        section.title, section.mark = inline(full), f" ({inline(mark)})" if mark else ""
    return found


def differences(sections: list[Section]) -> list[str]:
    """The parameters and files of evaluation in which the sections differ."""
    every = [section.evaluation for section in sections]
    keys = dict.fromkeys(key for one in every for key in one)
    return [key for key in keys if len({repr(one[key]) for one in every if key in one}) > 1]
