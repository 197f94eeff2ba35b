"""`wanda-dvc report`: the experiments of a repository as one page of tables and pictures.

Experiments whose results may not be compared are in sections of their own. Each chapter is a function of a section.
"""

import json
import math
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

from wanda_dvc import __version__
from wanda_dvc.errors import UserError
from wanda_dvc.plan import CHOICES, UNSTRUCTURED
from wanda_dvc.results import published
from wanda_dvc.results.compare import DENSE, MISSING, Column, Tests, apart, cells, compare, headings
from wanda_dvc.results.experiments import Excluded, Experiment, collect
from wanda_dvc.results.intervals import Estimate
from wanda_dvc.results.listing import MEASURED_BY
from wanda_dvc.results.markup import DASH, inline, table
from wanda_dvc.results.measures import LOG, MODEL, TEXT, Measure, Results
from wanda_dvc.results.pages import Content, curves, write
from wanda_dvc.results.show import notes, recipe
from wanda_dvc.stages import check_outside
from wanda_dvc.study.folder import Study

# The settings of pruning in a row's name; they also determine the required statistics.
OF_PRUNING = (*CHOICES, "sparsity", "pattern", "calibration.statistics")
# The captions of the tables, by what a measure is measured on; `OF_TASKS` of a task, and of all.
CAPTIONS = {TEXT: "On {}; intervals over windows (t).", MODEL: "The pruned weights."}
OF_TASKS = "Accuracies over items, in percent; the mean counts tasks equally."
FOLDERS = re.compile(r"(?<![\w.:/~])/(?:[^\s/,:;()]+/)+")  # of an absolute path


def report(*, study: Study, output: Path, revs: list[str] | None = None) -> str:
    """Write `output`, a self-contained HTML page; return a message with its path."""
    output = check_outside(study, output.parent) / output.name  # before minutes of reading
    with tempfile.TemporaryDirectory(prefix="wanda-dvc-") as work:
        found, excluded = collect(study=study, revs=revs or [], work=Path(work))
        if not found:
            waiting = "".join(f"\n{name}: {text}" for name, text in excluded)
            raise UserError(f"{study.root}: no experiment with results{waiting or '; run `dvc repro`'}")
        write(output, f"Pruning study: {study.root.name}", page(found, excluded))
    return f"{output}: {len(found)} experiment{'s' * (len(found) != 1)}, {len(excluded)} excluded"


def page(experiments: list[Experiment], excluded: Excluded) -> Content:
    """Return the report below its title: every chapter for each section, then the excluded experiments."""
    sections = group(experiments)
    count = f"{len(experiments)} experiment{'s' * (len(experiments) != 1)}, {len(excluded)} excluded"
    parts: Content = [f"{count}; wanda-dvc {__version__}. Intervals in parentheses are at 95 %."]
    if len(sections) > 1:
        parts.append(
            f"The results were measured in {len(sections)} ways. Each has a section of its own; numbers of different "
            "sections may not be compared."
        )
    for section in sections:
        parts.append(f"## {inline(section.title)}")
        for heading, chapter in CHAPTERS.items():
            content = chapter(section)
            parts += [f"### {heading}", *content] if content else []
    notes = [(one.name, note) for one in experiments for note in one.notes]
    said = "\n".join(f"- {inline(name)}: {private(text)}" for name, text in (*excluded, *notes))
    return [*parts, "## Excluded", said or "Nothing: all experiments have finished, and all results are here."]


@dataclass(eq=False)
class Section:
    """Experiments that may be compared, by their name on the page, and the dense model that they share."""

    title: str  # the model, and how this section differs from the first one
    experiments: dict[str, Experiment]

    @cached_property
    def models(self) -> dict[str, Results]:
        """The dense model, each text measured by any of the experiments, and the pruned ones, by name."""
        dense = Results({})
        for one in self.experiments.values():
            dense.adopt(one.results[DENSE])
        pruned = {name: one.made for name, one in self.experiments.items()}
        return {DENSE: dense} | pruned if dense.metrics else pruned

    @cached_property
    def columns(self) -> dict[str, Column]:
        """The measures that any model has, on each of its texts or tasks, by heading."""
        return headings(list(self.models.values()), brief=False)

    @cached_property
    def tests(self) -> dict[tuple[str, str], Tests]:
        """The paired tests of each experiment against the dense model, and of recipes against each other."""
        pairs = [(name, DENSE) for name in self.experiments if DENSE in self.models]
        for (other, another), (name, one) in combinations(self.experiments.items(), 2):
            differing = {key for key, value in one.settings.items() if another.settings.get(key) != value}
            if differing and differing <= set(CHOICES):
                pairs.append((name, other))
        found = compare([(self.models[one], self.models[other]) for one, other in pairs])
        return dict(zip(pairs, found, strict=True))


def group(experiments: Sequence[Experiment]) -> list[Section]:
    """Return the experiments in sections of comparable results; a protocol that is not known matches all."""
    groups: list[list[Experiment]] = []
    for one in experiments:
        if matching := [found for found in groups if not any(differing(one, other) for other in found)]:
            matching[0].append(one)
        else:
            groups.append([one])
    sections = []
    for found in groups:
        title = shown(found[0].params.model)
        keys = dict.fromkeys(key for one in groups[0] for key in differing(one, found[0]))
        title += f" (differs in {', '.join(keys)})" if keys else ""
        sections.append(Section(title, names(found)))
    return sections


def differing(one: Experiment, other: Experiment) -> list[str]:
    """Return what keeps the results of two experiments from being compared; [] if nothing does."""
    reasons = [*apart(one.results[DENSE], other.results[DENSE]).values(), *apart(one.made, other.made).values()]
    compared = MEASURED_BY if MISSING in reasons else ("model", "dtype")  # protocols say the rest, if they are here
    both = [key for key in one.settings if key in other.settings and key.startswith(compared)]
    found = [key for key in both if one.settings[key] != other.settings[key]] + reasons
    return [key for key in dict.fromkeys(found) if key != MISSING]


# --- names ---


def names(experiments: Sequence[Experiment]) -> dict[str, Experiment]:
    """Return the experiments by a name: recipe, pattern, sparsity, and the settings in which they differ."""
    found: dict[str, Experiment] = {}
    for one in sorted(experiments, key=lambda one: (recipe(one.params), one.params.pattern, one.settings["sparsity"])):
        name = curve(one, experiments) + ("" if ":" in one.params.pattern else f" {100 * one.settings['sparsity']:g} %")
        if name in found:
            name += f" [{one.name}]"
        found[name if name not in found else f"{name} [{one.commit}]"] = one
    return found


def curve(one: Experiment, experiments: Sequence[Experiment]) -> str:
    """Return the name without the sparsity."""
    pattern = "" if one.params.pattern == UNSTRUCTURED else f" {one.params.pattern}"
    others = [f"{key}={shown(one.settings[key])}" for key in varying(experiments)]
    return recipe(one.params) + pattern + (f" ({', '.join(others)})" if others else "")


def varying(experiments: Sequence[Experiment]) -> list[str]:
    """Return the settings in which experiments differ, but no setting of pruning or evaluation.

    A training is among them even if all experiments have it.
    """
    every = [one.settings for one in experiments]
    keys = [key for key in every[0] if not key.startswith(MEASURED_BY) and key not in OF_PRUNING]
    trained = "recovery.tokens" if every[0].get("recovery.tokens") else ""
    return [key for key in keys if key == trained or len({repr(one.get(key)) for one in every}) > 1]


def shown(value: Any) -> str:
    """Return a setting as text; of a local path the last part: pages are shared."""
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if value is None or str(value).isspace():
        return json.dumps(value)
    return Path(value).name if str(value).startswith("/") else f"{value}"


def private(text: str) -> str:
    """Return a sentence without the folders of absolute paths."""
    return inline(FOLDERS.sub("", text))


# --- chapters ---


def protocol(section: Section) -> Content:
    """The texts, tasks, calibration and libraries of all results."""
    experiments = list(section.experiments.values())
    params = {name: one.params for name, one in section.experiments.items()}
    said = [private(note) for note in notes(params, section.models)]
    if not any(key.startswith("calibration.") for key in varying(experiments)):
        settings = {key[12:]: shown(value) for key, value in experiments[0].settings.items() if "calibration." in key}
        said.append(f"Calibration: {inline(', '.join(f'{key}={value}' for key, value in settings.items()))}.")
    details = [model.details(name) for model in section.models.values() for name in model.metrics]
    every = [one.get("protocol", {}) for found in details for one in found.get("tasks", {"": found}).values()]
    if libraries := {name: version for found in every for name, version in found.get("libraries", {}).items()}:
        said.append(f"Libraries: {inline(', '.join(f'{name} {version}' for name, version in libraries.items()))}.")
    return ["\n".join(f"- {item}" for item in said)]


def measured(section: Section) -> Content:
    """The tables of all measures, on each text, on the tasks and of the weights, each with its pictures."""
    groups: dict[str, dict[str, Column]] = {}
    for heading, (measure, on) in section.columns.items():
        groups.setdefault(CAPTIONS.get(measure.per, OF_TASKS).format(inline(on)), {})[heading] = measure, on
    parts: Content = []
    for caption, columns in groups.items():
        rows = [[inline(name), *cells(results, columns)] for name, results in section.models.items()]
        rows = [row for row in rows if set(row[1:]) != {DASH}]
        parts += [caption, table(["", *map(inline, columns)], rows)]
        for heading, (measure, on) in columns.items():
            parts += against_sparsity(section, heading, measure, on) if measure.drawn else []
    return parts


def against_sparsity(section: Section, heading: str, measure: Measure, on: str) -> Content:
    """The picture of a measure against sparsity; nothing without values."""
    experiments, series = list(section.experiments.values()), dict[str, list[tuple[float, Estimate]]]()
    for one in sorted(experiments, key=lambda one: one.settings["sparsity"]):
        if (value := measure.read(one.made, on)) is not None:
            known = value if isinstance(value, Estimate) else Estimate(math.nan)
            series.setdefault(curve(one, experiments), []).append((one.settings["sparsity"], known))
    if not series:
        return []
    dense = measure.read(section.models[DENSE], on) if DENSE in section.models else None
    level = dense.value if isinstance(dense, Estimate) else math.nan
    figure = curves(series, measure.title, level=level, log=measure.drawn == LOG)
    return [(f"{heading} against sparsity", figure), "Bars are 95 % intervals; the line is the dense model."]


def paired(section: Section) -> Content:
    """The paired tests of all comparisons, adjusted for their number."""
    tested = {key for tests in section.tests.values() for key in tests}
    columns = {heading: one for heading, one in section.columns.items() if (one[0].name, one[1]) in tested}
    if not columns:
        return []
    rows = []
    for (one, other), tests in section.tests.items():
        own = (measure.test_text(tests.get((measure.name, on))) for measure, on in columns.values())
        rows.append([f"{inline(one)} against {inline(other)}", *own])
    count = sum(map(len, section.tests.values()))
    caption = (
        "On the same windows and items: ratio of perplexities, differences of the other measures. p-values are "
        f"adjusted for the {count} tests of this section; intervals are not. Windows of one text count as "
        "independent, so intervals of single perplexities are slightly too narrow. A test covers these items, this "
        "text and one calibration; another seed is another experiment."
    )
    return [caption, table(["", *map(inline, columns)], rows)]


def of_published(section: Section) -> Content:
    """Published figures of the same protocol next to ours; nothing without any."""
    rows = [list(map(inline, cells)) for cells in published.comparisons(section.experiments)]
    caption = "Published figures of the same protocol; accuracies in percent."
    return [caption, table(published.HEADERS, rows)] if rows else []


def origins(section: Section) -> Content:
    """The experiment and commit of each row."""
    rows = [
        [inline(name), inline(", ".join([one.name, *one.also])), one.commit[:10] if one.commit else "not committed"]
        for name, one in section.experiments.items()
    ]
    return [table(["", "experiment", "commit"], rows)]


CHAPTERS: dict[str, Callable[[Section], Content]] = {
    "Protocol": protocol, "Results": measured, "Paired comparisons": paired, "Published figures": of_published,
    "Experiments": origins,
}  # fmt: skip
