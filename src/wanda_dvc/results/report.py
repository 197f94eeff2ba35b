"""`wanda-dvc report`: the experiments of a repository as one page of tables and charts, by the template report.html.

Experiments whose results may not be compared are in sections of their own.
"""

import json
import math
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import files
from itertools import combinations
from pathlib import Path
from typing import Any

from jinja2 import Environment
from matplotlib.figure import Figure

from wanda_dvc import __version__
from wanda_dvc.errors import UserError
from wanda_dvc.plan import CHOICES, UNSTRUCTURED
from wanda_dvc.results.chart import chart, svg
from wanda_dvc.results.compare import DENSE, MISSING, Column, cells, compare, headings, not_comparable
from wanda_dvc.results.experiments import Excluded, Experiment, collect
from wanda_dvc.results.intervals import Estimate
from wanda_dvc.results.listing import MEASURED_BY
from wanda_dvc.results.markup import DASH, one_line
from wanda_dvc.results.measures import LOG, PER_MODEL, PER_TEXT, Measure, Results
from wanda_dvc.results.published import published_rows
from wanda_dvc.results.show import notes, recipe
from wanda_dvc.stages import check_outside
from wanda_dvc.study.files import Json, write_text
from wanda_dvc.study.folder import Study

SIGN = "Written by wanda-dvc report"  # in each page
# The settings of pruning in a row's name; they also determine the required statistics.
OF_PRUNING = (*CHOICES, "sparsity", "pattern", "calibration.statistics")
PAIRED = (
    "On the same windows and items: ratio of perplexities, differences of the other measures. p-values are adjusted "
    "for the {} tests of this section; intervals are not. Windows of one text count as independent, so intervals of "
    "single perplexities are slightly too narrow. A test covers these items, this text and one calibration; another "
    "seed is another experiment."
)
FOLDERS = re.compile(r"(?<![\w.:/~])/(?:[^\s/,:;()]+/)+")  # of an absolute path


def report(*, study: Study, output: Path, revs: list[str] | None = None) -> str:
    """Write `output`, a self-contained HTML page; return a message with its path.

    UserError without any results, or if another program's file is in its place.
    """
    output = check_outside(study, output.parent) / output.name  # before minutes of reading
    is_file = output.is_file() and not output.is_symlink()
    if os.path.lexists(output) and not (is_file and SIGN in output.read_text(encoding="utf-8", errors="replace")):
        raise UserError(f"{output}: `wanda-dvc report` did not write it; move it, or choose another --output")
    with tempfile.TemporaryDirectory(prefix="wanda-dvc-") as work:
        experiments, excluded = collect(study=study, revs=revs or [], work=Path(work))
        if not experiments:
            waiting = "".join(f"\n{name}: {reason}" for name, reason in excluded)
            raise UserError(f"{study.root}: no experiment with results{waiting or '; run `dvc repro`'}")
        write_text(output, page(f"Pruning study: {study.root.name}", experiments, excluded))
    return f"{output}: {_count(experiments, excluded)}"


def page(title: str, experiments: Sequence[Experiment], excluded: Excluded) -> str:
    """Return the page in HTML, byte-identical for equal results."""
    source = (files("wanda_dvc.results") / "report.html").read_text(encoding="utf-8")
    template = Environment(autoescape=True, trim_blocks=True).from_string(source)
    reasons = [*excluded, *((experiment.name, note) for experiment in experiments for note in experiment.notes)]
    return template.render(
        title=title,
        count=_count(experiments, excluded),
        version=__version__,
        sections=group(experiments),
        excluded=[f"{name}: {private(reason)}" for name, reason in reasons],
        sign=SIGN,
    )


def _count(experiments: Sequence[Experiment], excluded: Excluded) -> str:
    return f"{len(experiments)} experiment{'' if len(experiments) == 1 else 's'}, {len(excluded)} excluded"


# --- sections ---


@dataclass
class Table:
    """A table of a section, with charts of its measures."""

    heading: str  # of the tables from here on; "" continues those above
    caption: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    charts: list[tuple[str, str]] = field(default_factory=list)  # their titles, and SVG in base64


@dataclass(eq=False)
class ComparableExperiments:
    """A section of the page: experiments that may be compared, by name, and the dense model that they share."""

    title: str  # the model, and how this section differs from the first one
    experiments: dict[str, Experiment]

    @cached_property
    def models(self) -> dict[str, Results]:
        """The dense model, with each text that any of the experiments has, and the pruned models, by name."""
        metrics, details = Json(), Json()
        for experiment in self.experiments.values():
            dense = experiment.results[DENSE]
            for name in dense.metrics.keys() - metrics.keys():
                metrics[name], details[name] = dense.metrics[name], dense.details(name)
        pruned = {name: experiment.final for name, experiment in self.experiments.items()}
        return {DENSE: Results(dict(sorted(metrics.items())), None, details)} | pruned if metrics else pruned

    @cached_property
    def columns(self) -> dict[str, Column]:
        """The measures that any model has, on each of its texts or tasks, by heading."""
        return headings(list(self.models.values()), brief=False)

    def protocol(self) -> list[str]:
        """The texts, tasks, calibration and libraries of all results."""
        params = {name: experiment.params for name, experiment in self.experiments.items()}
        sentences = [private(note) for note in notes(params, self.models)]
        experiments = list(self.experiments.values())
        if not any(key.startswith("calibration.") for key in varying(experiments)):
            calibration = [
                f"{key.removeprefix('calibration.')}={short(value)}"
                for key, value in experiments[0].settings.items()
                if key.startswith("calibration.")
            ]
            sentences.append(f"Calibration: {', '.join(calibration)}.")
        libraries: dict[str, str] = {}
        for results in self.models.values():
            for name in results.metrics:
                for protocol in results.protocols(name):
                    libraries |= protocol.get("libraries", {})
        if libraries:
            sentences.append(f"Libraries: {', '.join(f'{name} {version}' for name, version in libraries.items())}.")
        return [one_line(sentence) for sentence in sentences]

    def tables(self) -> Iterator[Table]:
        """Yield the results on each text, on the tasks and of the weights, the tests, published figures and origins."""
        captions: dict[str, dict[str, Column]] = {}
        for heading, (measure, target) in self.columns.items():
            if measure.per == PER_TEXT:
                caption = f"On {target}; intervals over windows (t)."
            elif measure.per == PER_MODEL:
                caption = "The pruned weights."
            else:
                caption = "Accuracies over items, in percent; the mean counts tasks equally."
            captions.setdefault(caption, {})[heading] = measure, target
        for place, (caption, columns) in enumerate(captions.items()):
            rows = [[name, *cells(results, columns)] for name, results in self.models.items()]
            rows = [row for row in rows if set(row[1:]) != {DASH}]
            charts = [(heading, svg(figure)) for heading, figure in self.charts(columns)]
            yield Table("" if place else "Results", caption, ["", *columns], rows, charts)
        yield from self.tests()
        rows = published_rows(self.experiments)
        if rows:
            headers = ["", "source", "measure", "published", "here", "here / published"]
            yield Table("Published figures", "Of the same protocol; accuracies in percent.", headers, rows)
        rows = []
        for name, experiment in self.experiments.items():
            commit = experiment.commit[:10] if experiment.commit else "not committed"
            rows.append([name, ", ".join([experiment.name, *experiment.also]), commit])
        yield Table("Experiments", "The experiment and commit of each row.", ["", "experiment", "commit"], rows)

    def tests(self) -> Iterator[Table]:
        """Yield the paired tests: of each experiment against the dense model, and of recipes against each other."""
        pairs = [(name, DENSE) for name in self.experiments if DENSE in self.models]
        for (base, first), (name, second) in combinations(self.experiments.items(), 2):
            different = {key for key, value in second.settings.items() if first.settings.get(key) != value}
            if different and different <= set(CHOICES):
                pairs.append((name, base))
        results = compare([(self.models[name], self.models[base]) for name, base in pairs])
        tested = {key for tests in results for key in tests}
        columns = {key: column for key, column in self.columns.items() if (column[0].name, column[1]) in tested}
        if not columns:
            return
        rows = []
        for (name, base), tests in zip(pairs, results, strict=True):
            values = [measure.test_text(tests.get((measure.name, target))) for measure, target in columns.values()]
            rows.append([f"{name} against {base}", *values])
        yield Table("Paired comparisons", PAIRED.format(sum(map(len, results))), ["", *columns], rows)

    def charts(self, columns: Mapping[str, Column]) -> Iterator[tuple[str, Figure]]:
        """Yield the titles and charts of measures against sparsity."""
        for heading, (measure, target) in columns.items():
            series = self.series(measure, target) if measure.drawn else {}
            if series:
                dense = measure.read(self.models[DENSE], target) if DENSE in self.models else None
                level = dense.value if isinstance(dense, Estimate) else math.nan
                figure = chart(series, measure.title, level=level, log=measure.drawn == LOG)
                yield f"{heading} against sparsity", figure

    def series(self, measure: Measure, target: str) -> dict[str, list[tuple[float, Estimate]]]:
        """Return the points of each curve of a chart: sparsity and value, NaN for a model that diverged."""
        experiments = sorted(self.experiments.values(), key=lambda experiment: experiment.settings["sparsity"])
        curves: dict[str, list[tuple[float, Estimate]]] = {}
        for experiment in experiments:
            value = measure.read(experiment.final, target)
            if value is not None:
                point = value if isinstance(value, Estimate) else Estimate(math.nan)
                points = curves.setdefault(curve_label(experiment, experiments), [])
                points.append((experiment.settings["sparsity"], point))
        return curves


def group(experiments: Sequence[Experiment]) -> list[ComparableExperiments]:
    """Return the experiments in sections of comparable results; a protocol that is not known matches all.

    An experiment joins the first section whose members all match it.
    """
    groups: list[list[Experiment]] = []
    for experiment in experiments:
        for members in groups:
            if not any(differences(experiment, member) for member in members):
                members.append(experiment)
                break
        else:
            groups.append([experiment])
    sections = []
    for members in groups:
        keys = dict.fromkeys(key for first in groups[0] for key in differences(first, members[0]))
        title = short(members[0].params.model) + (f" (differs in {', '.join(keys)})" if keys else "")
        sections.append(ComparableExperiments(title, names(members)))
    return sections


def differences(experiment: Experiment, base: Experiment) -> list[str]:
    """Return what keeps the results of two experiments from being compared; [] if nothing does."""
    reasons = [
        *not_comparable(experiment.results[DENSE], base.results[DENSE]).values(),
        *not_comparable(experiment.final, base.final).values(),
    ]
    compared = MEASURED_BY if MISSING in reasons else ("model", "dtype")  # protocols say the rest, if they are here
    keys = [key for key in experiment.settings if key in base.settings and key.startswith(compared)]
    keys = [key for key in keys if experiment.settings[key] != base.settings[key]]
    return [key for key in dict.fromkeys([*keys, *reasons]) if key != MISSING]


# --- names ---


def names(experiments: Sequence[Experiment]) -> dict[str, Experiment]:
    """Return the experiments by a name: recipe, pattern, sparsity, and the settings in which they differ."""
    named: dict[str, Experiment] = {}
    order = sorted(experiments, key=lambda x: (recipe(x.params), x.params.pattern, x.settings["sparsity"]))
    for experiment in order:
        name = curve_label(experiment, experiments)
        if ":" not in experiment.params.pattern:
            name += f" {100 * experiment.settings['sparsity']:g} %"
        if name in named:
            name += f" [{experiment.name}]"
        named[name if name not in named else f"{name} [{experiment.commit}]"] = experiment
    return named


def curve_label(experiment: Experiment, experiments: Sequence[Experiment]) -> str:
    """Return an experiment's name without the sparsity: the label of its curve."""
    name, pattern = recipe(experiment.params), experiment.params.pattern
    if pattern != UNSTRUCTURED:
        name += f" {pattern}"
    settings = ", ".join(f"{key}={short(experiment.settings[key])}" for key in varying(experiments))
    return f"{name} ({settings})" if settings else name


def varying(experiments: Sequence[Experiment]) -> list[str]:
    """Return the settings in which experiments differ, but no setting of pruning or evaluation.

    A training is among them even if all experiments have it.
    """
    keys = []
    for key, first in experiments[0].settings.items():
        values = {repr(experiment.settings.get(key)) for experiment in experiments}
        is_training = key == "recovery.tokens" and bool(first)
        if (len(values) > 1 or is_training) and not key.startswith(MEASURED_BY) and key not in OF_PRUNING:
            keys.append(key)
    return keys


def short(value: Any) -> str:
    """Return a setting as text; of a local path the last part: pages are shared."""
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if value is None or str(value).isspace():
        return json.dumps(value)
    return Path(value).name if str(value).startswith("/") else f"{value}"


def private(text: str) -> str:
    """Return a sentence without the folders of absolute paths."""
    return one_line(FOLDERS.sub("", text))
