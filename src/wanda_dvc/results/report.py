"""`wanda-dvc report`: the experiments of a repository as one page of tables and charts, by the template report.html.

Experiments whose results may not be compared are in sections of their own.
"""

import os
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from itertools import combinations
from pathlib import Path

import numpy as np
from jinja2 import Environment

from wanda_dvc import __version__
from wanda_dvc.errors import UserError
from wanda_dvc.plan import CHOICES
from wanda_dvc.results.chart import chart, svg
from wanda_dvc.results.compare import DENSE, MISSING, headings, not_comparable, side_by_side
from wanda_dvc.results.experiments import Excluded, Experiment, collect
from wanda_dvc.results.listing import MEASURED_BY, differing_settings
from wanda_dvc.results.markup import one_line
from wanda_dvc.results.measures import Results
from wanda_dvc.results.published import published_rows
from wanda_dvc.results.show import description, notes, pruning
from wanda_dvc.stages import check_outside
from wanda_dvc.study.files import Json, write_text
from wanda_dvc.study.folder import Study

SIGN = "Written by wanda-dvc report"  # in each page
IN_NAMES = (
    *CHOICES,
    "sparsity",
    "pattern",
    "calibration.statistics",
    "recovery.tokens",
)  # or on an axis; the recipe needs the statistics
FOLDERS = re.compile(
    r"(?<![\w.:/~])/(?:[^\s/,:;()]+/)+"
)  # of an absolute path: /home/a/ of /home/a/model, and nothing of https://a/b


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
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(source)
    reasons = [*excluded, *((experiment.name, note) for experiment in experiments for note in experiment.notes)]
    return template.render(
        title=title,
        count=_count(experiments, excluded),
        version=__version__,
        sections=[section(title, members) for title, members in group(experiments)],
        excluded=[f"{name}: {private(reason)}" for name, reason in reasons],
        sign=SIGN,
    )


def _count(experiments: Sequence[Experiment], excluded: Excluded) -> str:
    return f"{len(experiments)} experiment{'' if len(experiments) == 1 else 's'}, {len(excluded)} excluded"


def section(title: str, experiments: Mapping[str, Experiment]) -> Json:
    """Return what a section of the page shows of experiments that may be compared."""
    dense = _dense(experiments.values())
    models = {DENSE: dense} | {name: experiment.final for name, experiment in experiments.items()}
    pairs = []  # recipes, at equal other settings
    for (base, first), (name, second) in combinations(experiments.items(), 2):
        different = differing_settings([first.settings, second.settings])
        if different and set(different) <= set(CHOICES):
            pairs.append((name, base))
    headers, rows = side_by_side(models, base=DENSE, pairs=pairs)
    labels = curve_labels(experiments)
    curves: dict[str, list[tuple[float, Results]]] = {}
    for name, experiment in experiments.items():
        curves.setdefault(labels[name], []).append((experiment.settings["sparsity"], experiment.final))
    charts = []
    for heading, (measure, target) in headings(list(models.values()), brief=False).items():
        if measure.drawn:
            charts.append((heading, svg(chart(measure, target, curves, dense))))
    return {
        "title": title,
        "protocol": protocol(experiments, models),
        "results": np.transpose([headers, *rows]).tolist(),  # a row for each model, and each pair
        "charts": charts,
        "published": published_rows(experiments),
        "experiments": [
            [name, labels[name], ", ".join(experiment.also), experiment.commit or "not committed"]
            for name, experiment in experiments.items()
        ],
    }


def _dense(experiments: Iterable[Experiment]) -> Results:
    """Return the results of the dense model on each text that any of the experiments has."""
    metrics, details = Json(), Json()
    for experiment in experiments:
        dense = experiment.results[DENSE]
        for name in dense.metrics.keys() - metrics.keys():
            metrics[name], details[name] = dense.metrics[name], dense.details(name)
    return Results(dict(sorted(metrics.items())), None, details)


def curve_labels(experiments: Mapping[str, Experiment]) -> dict[str, str]:
    """Return a label of each experiment's curve: its pruning, and further settings in which the experiments differ."""
    keys = differing_settings([experiment.settings for experiment in experiments.values()])
    keys = [key for key in keys if not key.startswith(MEASURED_BY) and key not in IN_NAMES]
    return {
        name: ", ".join([pruning(experiment.params), *(f"{key}={short(experiment.settings[key])}" for key in keys)])
        for name, experiment in experiments.items()
    }


def protocol(experiments: Mapping[str, Experiment], models: dict[str, Results]) -> list[str]:
    """Return sentences on the texts, tasks, calibration and libraries of all results."""
    params = {name: experiment.params for name, experiment in experiments.items()}
    all_settings = [experiment.settings for experiment in experiments.values()]
    different = differing_settings(all_settings)
    calibration = []
    for key, value in all_settings[0].items():
        if key.startswith("calibration.") and key not in different:
            calibration.append(f"{key.removeprefix('calibration.')}={short(value)}")
    libraries: dict[str, str] = {}
    for results in models.values():
        for name in results.metrics:
            for content in results.protocols(name):
                libraries |= content.get("libraries", {})
    versions = [f"{name} {version}" for name, version in libraries.items()]
    sentences = [
        *notes(params, models),
        f"Calibration: {', '.join(calibration)}.",
        f"Libraries: {', '.join(versions) or 'not known'}.",
    ]
    return [private(sentence) for sentence in sentences]


def group(experiments: Sequence[Experiment]) -> list[tuple[str, dict[str, Experiment]]]:
    """Return the titles and experiments of the sections, whose results are comparable; an unknown protocol matches all.

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
        # In which settings the section differs from the first one.
        keys = dict.fromkeys(key for first in groups[0] for key in differences(first, members[0]))
        title = short(members[0].params.model) + (f" (differs in {', '.join(keys)})" if keys else "")
        named: dict[str, Experiment] = {}
        for experiment in sorted(members, key=lambda member: (pruning(member.params), member.settings["sparsity"])):
            name = f"{experiment.name}: {description(experiment.params)}"
            named[f"{name} [{experiment.commit}]" if name in named else name] = experiment
        sections.append((title, named))
    return sections


def differences(experiment: Experiment, base: Experiment) -> list[str]:
    """Return what keeps the results of two experiments from being compared; [] if nothing does."""
    reasons = [
        *not_comparable(experiment.results[DENSE], base.results[DENSE]).values(),
        *not_comparable(experiment.final, base.final).values(),
    ]
    different = differing_settings([experiment.settings, base.settings])
    keys = [key for key in different if key.startswith(MEASURED_BY)]
    return [key for key in dict.fromkeys([*keys, *reasons]) if key != MISSING]


def short(value: object) -> str:
    """Return a setting as text; of a local path the last part: pages are shared."""
    text = str(value)
    return Path(text).name if text.startswith("/") else text.strip() or repr(value)


def private(text: str) -> str:
    """Return a sentence without the folders of absolute paths."""
    return one_line(FOLDERS.sub("", text))
