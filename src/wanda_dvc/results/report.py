"""`wanda-dvc report`: the experiments of a repository as one page of tables and pictures.

Experiments whose results may not be compared are in sections of their own. Each chapter is a function of a section.
"""

import csv
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from wanda_dvc import __version__
from wanda_dvc.catalog import RECIPES, Recipe
from wanda_dvc.errors import UserError
from wanda_dvc.params import Params
from wanda_dvc.plan import CHOICES, UNSTRUCTURED
from wanda_dvc.reading import DIVERGED, check_place
from wanda_dvc.results import published
from wanda_dvc.results.compare import DENSE, Tests, compare, headings, reason
from wanda_dvc.results.experiments import Collected, Experiment, collect
from wanda_dvc.results.inference import ALPHA, Estimate
from wanda_dvc.results.measures import MEASURES, ON_TEXT, TEXT, Measure, Results, items, mean_accuracy, perplexity
from wanda_dvc.results.pages import Content, Picture, bullets, table, write
from wanda_dvc.study.markup import DASH, code, inline
from wanda_dvc.study.project import Project

OF_EVALUATION = ("model", "dtype", "perplexity.", "tasks.", "zero_shot.")
# The settings of pruning in a row's name; they also determine the required statistics.
OF_PRUNING = (*CHOICES, "allocation_strength", "sparsity", "pattern", "calibration.statistics")
FOLDERS = re.compile(r"(?<![\w.:/~])/(?:[^\s/,:;()]+/)+")  # of an absolute path
Column = tuple[Measure, str]  # a measure, and a text, a task or ""


def report(*, project: Project, output: Path, model: str | None = None, revs: list[str] | None = None) -> str:
    """Write `output` (HTML), a Markdown copy next to it, and a folder of pictures; return a message with the paths."""
    import matplotlib  # noqa: F401 - reports a missing library before any read

    check_place(output.with_name(f"{output.stem}_files"))  # before minutes of reading
    output = output.absolute()
    if output.suffix != ".html":
        raise UserError(
            f"--output: got {output.name}, expected a name that ends in .html; the .md file gets the same name"
        )
    with project.work({"kind": "report"}) as work:
        work.forget()  # left by a killed report
        work.path.mkdir(parents=True)
        collected = collect(project=project, model=model, revs=revs or [], work=work.path)
        if not collected.experiments:
            waiting = "".join(f"\n{note.name}: {note.text}" for note in [*collected.unfinished, *collected.notes])
            which = f" of a model named like {model}" if model else ""
            raise UserError(f"{project.root}: no experiment{which} with results; run `dvc repro`{waiting}")
        markdown = write(output, page(project.root.name, collected))
        work.forget()
    count, unfinished = len(collected.experiments), len(collected.unfinished)
    return f"{output}: {count} experiments, {unfinished} unfinished or failed; {markdown.name} says the same"


def page(title: str, collected: Collected) -> Content:
    """Return the complete report: every chapter for each section, then the excluded experiments."""
    sections = group(collected.experiments)
    count, unfinished = len(collected.experiments), len(collected.unfinished)
    parts: Content = [
        f"# Pruning study: {inline(title)}",
        f"{count} sets of settings with results, {unfinished} unfinished or failed; wanda-dvc {__version__}. "
        "Intervals in parentheses are at 95 %.",
    ]
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
    return [*parts, *excluded(collected)]


@dataclass(eq=False)
class Section:
    """Experiments that may be compared, by their name on the page, and the dense model that they share."""

    number: int
    experiments: dict[str, Experiment]
    differing: list[str]  # what the protocol differs in from the first section's

    @property
    def first(self) -> Experiment:
        """The first experiment; the settings in `OF_EVALUATION` are those of all."""
        return next(iter(self.experiments.values()))

    @property
    def title(self) -> str:
        """The model, and how this section differs from the first one."""
        model = shown(self.first.params.model)
        return f"{model} (differs in {', '.join(self.differing)})" if self.differing else model

    @cached_property
    def dense(self) -> Results:
        """The dense model, measured by any of the experiments."""
        return max((one.dense for one in self.experiments.values()), key=lambda dense: len(dense.metrics))

    @cached_property
    def models(self) -> dict[str, Results]:
        """The dense model, if it was measured, and the pruned ones, by name."""
        dense = {DENSE: self.dense} if self.dense.metrics else {}
        return dense | {name: one.pruned for name, one in self.experiments.items()}

    @cached_property
    def columns(self) -> dict[str, Column]:
        """The measures that any model has, on each of its texts or tasks, by heading."""
        return headings(list(self.models.values()), brief=False)

    def only(self, wanted: Callable[[Measure, str], bool]) -> dict[str, Column]:
        """Return some of the measures."""
        return {heading: column for heading, column in self.columns.items() if wanted(*column)}

    @cached_property
    def tests(self) -> dict[tuple[str, str], Tests]:
        """The paired tests of each experiment against the dense model, and of recipes against each other."""
        pairs = [(name, DENSE) for name in self.experiments if DENSE in self.models]
        for place, (name, one) in enumerate(self.experiments.items()):
            for other, another in list(self.experiments.items())[:place]:
                if rank(one.params) != rank(another.params) and _beside(one) == _beside(another):
                    pairs.append((name, other))
        found = compare([(self.models[one], self.models[other]) for one, other in pairs])
        return dict(zip(pairs, found, strict=True))


def group(experiments: Sequence[Experiment]) -> list[Section]:
    """Return the experiments in sections of comparable results; a protocol that is not known matches all."""
    groups: list[list[Experiment]] = []
    for one in experiments:
        for found in groups:
            if not any(apart(one, other) for other in found):
                found.append(one)
                break
        else:
            groups.append([one])
    first = groups[0][0]
    return [
        Section(number, names(found), apart(first, found[0]) if number else []) for number, found in enumerate(groups)
    ]


def apart(one: Experiment, other: Experiment) -> list[str]:
    """Return what keeps the results of two experiments from being compared; [] if nothing does."""
    found = [key for key in ("model", "dtype") if one.settings[key] != other.settings[key]]
    for first, second in ((one.dense, other.dense), (one.pruned, other.pruned)):
        for measure in [measure for measure in MEASURES if measure.test]:
            both = [on for on in measure.where(first) if on in measure.where(second)]
            found += [key for on in both if (key := reason(measure, first, second, on))]
    return [key for key in dict.fromkeys(found) if key != "missing details"]


# --- names ---


def rank(params: Params) -> tuple[int, int, str]:
    """Return the nearest recipe of the method: the number of differing choices, its place, and both in words."""
    plan, chosen = params.plan, params.filled
    choices = [name for name in CHOICES if plan.pattern == UNSTRUCTURED or name not in ("group", "allocation")]
    strength = plan.strength != plan.allocation.strength
    own = [(place, recipe) for place, recipe in enumerate(RECIPES.values()) if recipe.method == plan.method.name]
    found = []
    for place, recipe in own or [(len(RECIPES), Recipe(name=plan.method.name, about="", method=plan.method.name))]:
        words = [
            f"{name}={getattr(chosen, name)}" for name in choices if getattr(chosen, name) != getattr(recipe, name)
        ]
        words += [f"allocation_strength={plan.strength}"] * strength
        found.append((len(words), place, f"{recipe.name} ({', '.join(words)})" if words else recipe.name))
    return min(found)


def names(experiments: Sequence[Experiment]) -> dict[str, Experiment]:
    """Return the experiments by a name: recipe, sparsity, pattern, and the settings in which they differ."""
    found: dict[str, Experiment] = {}
    for one in sorted(experiments, key=lambda one: (rank(one.params)[1:], one.params.pattern, one.params.sparsity)):
        name = curve(one, experiments) + ("" if ":" in one.params.pattern else f" {100 * one.params.sparsity:g} %")
        for tag in ("", f" [{one.name}]", f" [{one.name} {str(one.commit)[:7]}]"):
            if name + tag not in found:
                found[name + tag] = one
                break
    return found


def curve(one: Experiment, experiments: Sequence[Experiment]) -> str:
    """Return the name without the sparsity."""
    pattern = "" if one.params.pattern == UNSTRUCTURED else f" {one.params.pattern}"
    every = [other.settings for other in experiments]
    others = [f"{key}={shown(one.settings[key], [x.get(key) for x in every])}" for key in varying(experiments)]
    return rank(one.params)[2] + pattern + (f" ({', '.join(others)})" if others else "")


def varying(experiments: Sequence[Experiment]) -> list[str]:
    """Return the settings in which experiments differ, without settings of pruning and evaluation."""
    every = [one.settings for one in experiments]
    keys = [key for key in every[0] if not key.startswith(OF_EVALUATION) and key not in OF_PRUNING]
    return [key for key in keys if len({repr(one.get(key)) for one in every}) > 1]


def _beside(one: Experiment) -> dict[str, Any]:
    """Return the settings that two experiments share if only their recipes differ."""
    return {key: value for key, value in one.settings.items() if key not in (*CHOICES, "allocation_strength")}


def shown(value: Any, among: Sequence[Any] = ()) -> str:
    """Return a setting as text; of a local path only as many last parts as tell it from others: pages are shared."""
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, str) and Path(value).is_absolute():
        others = [Path(other).parts for other in among if isinstance(other, str) and other != value]
        parts = Path(value).parts
        count = next(count for count in range(1, len(parts) + 1) if all(x[-count:] != parts[-count:] for x in others))
        return "/".join(parts[-count:])
    return "null" if value is None else f"{value}"


def private(text: str) -> str:
    """Return a sentence without the folders of absolute paths."""
    return inline(FOLDERS.sub("", text))


# --- chapters ---


def protocol(section: Section) -> Content:
    """The texts, tasks, calibration and libraries of all results."""
    params, experiments, said = section.first.params, list(section.experiments.values()), list[str]()
    readers = {text: one for one in reversed(experiments) for text in one.params.perplexity.texts}
    for name, one in sorted(readers.items()):
        found, text = one.pruned.details(ON_TEXT + name).get("protocol", {}), one.params.perplexity.texts[name]
        windows = found.get("windows", one.params.perplexity.windows)
        said.append(
            f"Perplexity on {inline(name)}: {windows} windows of {one.params.perplexity.length} tokens of "
            f"{inline(shown(text.source))}; {found.get('dtype', one.params.dtype)}. {one.params.about_text(name)}."
        )
    tasks, limit = ", ".join(params.tasks.names), params.items
    said.append(f"Zero-shot: {inline(tasks) or 'no tasks'}; {f'the first {limit} items' if limit else 'all items'}.")
    if params.tasks.names and params.tasks.source == "embedded":
        said.append("The tasks are samples written for wanda-dvc, not the benchmarks.")
    if not any(key.startswith("calibration.") for key in varying(experiments)):
        calibration = {key: shown(value) for key, value in section.first.settings.items() if "calibration." in key}
        said.append(f"Calibration: {inline(', '.join(f'{key[12:]}={value}' for key, value in calibration.items()))}.")
    libraries: dict[str, str] = {}
    for model in section.models.values():
        protocols = [model.details(ON_TEXT + name).get("protocol", {}) for name in model.texts]
        for found in [*protocols, *(model.answers(task).get("protocol", {}) for task in model.tasks)]:
            libraries |= found.get("libraries", {})
    if libraries:
        said.append(f"Libraries: {inline(', '.join(f'{name} {version}' for name, version in libraries.items()))}.")
    return [bullets(said)]


def summary(section: Section) -> Content:
    """A sentence for each comparison, with the brief measures."""
    said = []
    for (name, other), tests in section.tests.items():
        parts = []
        for heading, (measure, on) in section.columns.items():
            if not measure.brief:
                continue
            own, base = (measure.read(section.models[one], on) for one in (name, other))
            if test := tests.get((measure.name, on)):
                parts.append(f"{inline(heading)} {measure.test_text(test)}")
            elif measure.test and DIVERGED in (own, base):
                parts.append(f"{inline(heading)} {measure.text(own)} instead of {measure.text(base)}")
            elif other == DENSE and base is None and own is not None:  # a change against the dense model
                parts.append(f"{inline(heading)} {measure.text(own)}")
        said.append(f"{inline(name)} against {inline(other)}: {'; '.join(parts)}.")
    return [bullets(said)] if said else []


def on_texts(section: Section) -> Content:
    """A table and a picture of each text."""
    texts = dict.fromkeys(on for measure, on in section.columns.values() if measure.per == TEXT)
    return [part for text in texts for part in _on_text(section, text)]


def _on_text(section: Section, text: str) -> Content:
    columns = section.only(lambda measure, on: measure.per == TEXT and on == text)
    caption = f"On {inline(text)}; intervals over windows (t). Divergence is KL(dense ‖ pruned) of the predictions."
    curves = _curves(section, "perplexity", f"perplexity on {text}", lambda one: perplexity(one, text))
    return [_table(section, caption, columns), *curves]


def zero_shot(section: Section) -> Content:
    """The table of tasks, and the picture of the mean accuracy."""
    columns = section.only(lambda measure, _: measure.protocols is items)
    if not columns:
        return []
    caption = "Accuracies over items, in percent; the mean counts tasks equally. Answers that pruning changed, of all."
    title = "mean accuracy, %"
    return [_table(section, caption, columns), *_curves(section, "accuracy", title, lambda one: mean_accuracy(one, ""))]


def paired(section: Section) -> Content:
    """The paired tests of all comparisons, adjusted for their number."""
    every = [tests for tests in section.tests.values() if tests]
    columns = section.only(lambda measure, on: any((measure.name, on) in tests for tests in every))
    if not columns:
        return []
    rows = [
        [
            f"{inline(one)} against {inline(other)}",
            *(m.test_text(tests.get((m.name, on))) for m, on in columns.values()),
        ]
        for (one, other), tests in section.tests.items()
    ]
    count = sum(map(len, every))
    caption = (
        f"On the same windows and items: ratio of perplexities, difference of accuracies in points. * is p < {ALPHA} "
        f"after Holm's adjustment for the {count} tests of this section; intervals are not adjusted."
    )
    note = (
        "Windows of one text count as independent, so intervals of single perplexities are slightly too narrow. A test "
        "covers these items, this text and one calibration; another seed is another experiment."
    )
    return [table(caption, ["", *map(inline, columns)], rows), note]


def of_published(section: Section) -> Content:
    """Published figures of the same protocol next to ours."""
    rows, nearest = published.comparisons([(inline(name), one) for name, one in section.experiments.items()])
    caption = "Published figures of the same protocol; accuracies in percent."
    return [table(caption, published.HEADERS, rows) if rows else nearest]


def structure(section: Section) -> Content:
    """The measures of the pruned weights, and the picture of sparsity and layer error by block."""
    from wanda_dvc.results import charts

    columns = section.only(lambda measure, _: measure.per != TEXT and measure.protocols is not items)
    parts: Content = [_table(section, "The pruned weights.", columns)] if columns else []
    panels: dict[str, dict[str, list[tuple[int, float, float, float]]]] = {}
    for name, one in section.experiments.items():
        if "sparsity" in one.pruned.metrics:
            lines = [(int(x["block"]), float(x["zeros"]), float(x["weights"])) for x in _plot(one.study, "sparsity")]
            panels.setdefault("sparsity, %", {})[name] = by_block(lines)
        if one.pruned.details("layer_error").get("linears"):
            lines = [(int(x["block"]), float(x["error"]), 1.0) for x in _plot(one.study, "layer_error")]
            panels.setdefault("layer error, %", {})[name] = by_block(lines)
    drawn = {label: {name: points for name, points in series.items() if points} for label, series in panels.items()}
    drawn = {label: series for label, series in drawn.items() if series}
    if drawn:
        caption = "By block; the shade is the range over a block's linears. Layer error: ‖(W−Ŵ)X‖² / ‖WX‖²."
        figure = charts.by_block(drawn)
        parts.append(Picture(f"s{section.number}-blocks", "Sparsity and layer error by block", caption, figure))
    return parts


def origins(section: Section) -> Content:
    """The experiment, commit and settings of each row."""
    other = varying(list(section.experiments.values()))
    rows = []
    for name, one in section.experiments.items():
        given = one.params.model_dump(mode="json", include={"recipe", *CHOICES, "allocation_strength"})
        settings = {key: value for key, value in given.items() if value is not None}
        settings |= {key: one.settings[key] for key in ("sparsity", "pattern", *other)}
        words = ", ".join(f"{key}={shown(value)}" for key, value in settings.items())
        commit = one.commit[:10] if one.commit else "not committed"
        rows.append([inline(name), inline(", ".join([one.name, *one.also])), commit, code(words)])
    return [table("The origin of each row.", ["", "experiment", "commit", "settings"], rows, numbers=False)]


def excluded(collected: Collected) -> Content:
    """The unfinished experiments, and the results that could not be read."""
    notes = [(note.name, note.text) for note in [*collected.unfinished, *collected.notes]]
    notes += [(one.name, note) for one in collected.experiments for note in one.notes]
    said = [f"{inline(name)}: {private(text)}" for name, text in notes]
    return [
        "## Excluded",
        bullets(said) if said else "Nothing: all experiments have finished, and all results are here.",
    ]


CHAPTERS: dict[str, Callable[[Section], Content]] = {
    "Protocol": protocol,
    "Summary": summary,
    "Perplexity and divergence": on_texts,
    "Zero-shot accuracy": zero_shot,
    "Paired comparisons": paired,
    "Published figures": of_published,
    "Structure": structure,
    "Experiments": origins,
}


# --- parts of chapters ---


def _table(section: Section, caption: str, columns: dict[str, Column]) -> str:
    """Return a table of the models that have one of the measures."""
    rows = []
    for name, results in section.models.items():
        cells = [measure.text(measure.read(results, on)) for measure, on in columns.values()]
        if set(cells) != {DASH}:
            rows.append([inline(name), *cells])
    return table(caption, ["", *map(inline, columns)], rows)


def _curves(section: Section, name: str, label: str, read: Callable[[Results], Any]) -> Content:
    """Return the picture of a measure against sparsity; nothing without values."""
    from wanda_dvc.results import charts

    log = name == "perplexity"
    scale, series = 1 if log else 100, dict[str, list[charts.Point]]()
    experiments = list(section.experiments.values())
    for one in sorted(experiments, key=lambda one: one.params.sparsity):
        value = read(one.pruned)
        if isinstance(value, Estimate):
            numbers = [scale * number for number in (value.value, *(value.ends or ()))]
            point = charts.Point(100 * one.params.sparsity, *numbers)
        elif value == DIVERGED:
            point = charts.Point(100 * one.params.sparsity, None)
        else:
            continue
        series.setdefault(curve(one, experiments), []).append(point)
    if not series:
        return []
    dense = read(section.dense)
    level = (DENSE, scale * dense.value) if isinstance(dense, Estimate) else None
    figure = charts.curves(series, label=label, level=level, log=log)
    stem = re.sub(r"\W+", "-", label.removesuffix(", %"))
    caption = f"{'Log scale; b' if log else 'B'}ars are 95 % intervals; the line is the dense model."
    return [Picture(f"s{section.number}-{stem}", f"{inline(label)} against sparsity", caption, figure)]


def by_block(linears: Iterable[tuple[int, float, float]]) -> list[tuple[int, float, float, float]]:
    """Return blocks' shares in percent, with least and most of the linears, from each linear's (block, part, total)."""
    blocks: dict[int, list[tuple[float, float]]] = {}
    for block, part, total in linears:
        blocks.setdefault(block, []).append((part, total))
    points = []
    for block, found in sorted(blocks.items()):
        shares = [100 * part / total for part, total in found]
        mean = 100 * sum(part for part, _ in found) / sum(total for _, total in found)
        points.append((block, mean, min(shares), max(shares)))
    return points


def _plot(study: Project, name: str) -> list[dict[str, str]]:
    """Return the lines of a plot's data; [] if it is missing."""
    path = study.plots(name)
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines())) if path.is_file() else []
