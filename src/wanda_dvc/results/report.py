"""`wanda-dvc report`: the experiments of a repository as one page of tables and charts, by the template report.html."""

import io
import re
import tempfile
from collections.abc import Sequence
from importlib.resources import files
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from jinja2 import Environment
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler
from matplotlib.ticker import LogLocator

from wanda_dvc import __version__
from wanda_dvc.errors import UserError, shortened
from wanda_dvc.plan import CHOICES
from wanda_dvc.results.compare import DENSE, MISSING, headings, not_comparable, side_by_side
from wanda_dvc.results.experiments import Excluded, Experiment, collect
from wanda_dvc.results.intervals import Estimate
from wanda_dvc.results.listing import MEASUREMENT_SETTINGS, differing_settings
from wanda_dvc.results.measures import LOG, Measure, Results
from wanda_dvc.results.show import pruning_label, table_notes
from wanda_dvc.stages import check_outside
from wanda_dvc.study.files import Json, write_text
from wanda_dvc.study.folder import Study

# Settings that labels do not repeat: they are in each label or on an axis, or the recipe needs them.
IN_NAMES = (*CHOICES, "sparsity", "pattern", "calibration.statistics", "recovery.tokens")
# The folders of an absolute path, in quotes with any character: /home/a/ of /home/a/model; nothing of https://a/b.
FOLDERS = re.compile(r"(?<=')/[^']*/|(?<![\w.:/~])/[^\s,:;()]*/")
# Curves differ in colour and marker, for colour-blind eyes.
CURVES = cycler(color=mpl.color_sequences["petroff6"], marker=["o", "s", "D", "^", "v", "P"])
LOOK: dict[Any, Any] = {  # whatever the reader's matplotlibrc says
    "axes.prop_cycle": CURVES, "axes.grid": True, "text.parse_math": False, "svg.hashsalt": "wanda-dvc",
}  # fmt: skip


def report(*, study: Study, output: Path, revs: list[str] | None = None) -> str:
    """Write `output`, a self-contained HTML page; return a message with its path. UserError without any results."""
    output = check_outside(study, output.parent) / output.name  # before minutes of reading
    with tempfile.TemporaryDirectory(prefix="wanda-dvc-") as work:
        experiments, excluded = collect(study=study, revs=revs or [], work=Path(work))
        if not experiments:
            waiting = "".join(f"\n{name}: {reason}" for name, reason in excluded)
            raise UserError(f"{study.root}: no experiment with results{waiting or '; run `dvc repro`'}")
        write_text(output, page(f"Pruning study: {study.root.name}", experiments, excluded))
    return f"{output}: {shortened([experiment.name for experiment in experiments], 10)}"


def page(title: str, experiments: Sequence[Experiment], excluded: Excluded) -> str:
    """Return the page in HTML, byte-identical for equal results."""
    source = (files("wanda_dvc.results") / "report.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=_without_folders)
    remarks = list(excluded)
    for experiment in experiments:
        remarks += [(experiment.name, note) for note in experiment.notes]
    return environment.from_string(source).render(
        title=title,
        version=__version__,
        sections=[section(members, first=experiments[0]) for members in group(experiments)],
        remarks=remarks,
    )


def _without_folders(text: object) -> object:
    """Leave out the folders of local paths in a text of the page: pages are shared."""
    return text if hasattr(text, "__html__") else FOLDERS.sub("", str(text))  # markup of the template has it


def group(experiments: Sequence[Experiment]) -> list[list[Experiment]]:
    """Return the experiments of each section, whose results are comparable; an unknown protocol matches all."""
    groups: list[list[Experiment]] = []
    for experiment in experiments:
        for members in groups:
            if not any(why_separate(experiment, member) for member in members):
                members.append(experiment)
                break
        else:
            groups.append([experiment])
    return groups


def why_separate(experiment: Experiment, base: Experiment) -> list[str]:
    """Return why two experiments are in different sections: settings, or reasons; [] if they may be compared."""
    reasons = [
        *not_comparable(experiment.results[DENSE], base.results[DENSE]).values(),
        *not_comparable(experiment.final, base.final).values(),
    ]
    settings = differing_settings([experiment.settings, base.settings])
    keys = [key for key in settings if key.startswith(MEASUREMENT_SETTINGS)]
    return [key for key in dict.fromkeys([*keys, *reasons]) if key != MISSING]


def section(members: Sequence[Experiment], *, first: Experiment) -> Json:
    """Return what a section of the page shows: experiments that may be compared, and differences from the `first`."""
    # Several texts have other keys than one: without a value for each key, they would not differ.
    names = sorted({key for experiment in members for key in experiment.settings})
    settings_of = {id(member): {key: member.settings.get(key) for key in names} for member in members}
    varying = differing_settings(settings_of.values())
    in_labels = [key for key in varying if not key.startswith(MEASUREMENT_SETTINGS) and key not in IN_NAMES]

    experiments: dict[str, Experiment] = {}
    points = []
    for experiment in sorted(members, key=lambda member: (pruning_label(member.params), member.settings["sparsity"])):
        settings = [f"{key}={experiment.settings[key]!r}" for key in in_labels if key in experiment.settings]
        label = FOLDERS.sub("", ", ".join([pruning_label(experiment.params), *settings]))
        sparsity = experiment.settings["sparsity"]
        commit = f" [{experiment.commit[:7]}]" if experiment.commit else ""
        experiments[f"{experiment.name}{commit}: {label}, sparsity {sparsity:g}"] = experiment
        points.append((label, sparsity, experiment.final))

    # All members have equal figures of the dense model; one may have more texts.
    dense = max((experiment.results[DENSE] for experiment in members), key=lambda results: len(results.metrics))
    models = {DENSE: dense} | {name: experiment.final for name, experiment in experiments.items()}
    other_recipes = []  # pairs of experiments that differ only in choices of a recipe
    for (base_name, base), (name, experiment) in combinations(experiments.items(), 2):
        keys = differing_settings([settings_of[id(base)], settings_of[id(experiment)]])
        if keys and set(keys) <= set(CHOICES):
            other_recipes.append((name, base_name))
    headers, rows = side_by_side(models, base=DENSE, further=other_recipes)

    charts = []
    for heading, (measure, target) in headings(list(models.values()), brief=False).items():
        if measure.scale:
            charts.append((heading, svg(chart(measure, target, points, dense))))

    shared = {key: value for key, value in members[0].settings.items() if key not in varying}
    calibration = [f"{key}={value!r}" for key, value in shared.items() if key.startswith("calibration.")]
    model = members[0].params.model
    libraries: Json = {}
    for name in dense.metrics:
        for protocol in dense.protocols_in(name):
            libraries |= protocol.get("libraries", {})
    return {
        "model": Path(model).name if Path(model).is_absolute() else model,
        "differences": why_separate(members[0], first),
        "protocol": [
            *table_notes({name: experiment.params for name, experiment in experiments.items()}, models),
            f"Settings: {', '.join(calibration)}.",
            f"Libraries: {', '.join(f'{name} {version}' for name, version in libraries.items()) or 'not known'}.",
        ],
        "results": np.transpose([headers, *rows]).tolist(),  # a row for each model, and each pair
        "charts": charts,
    }


@mpl.rc_context(LOOK)
def chart(measure: Measure, target: str, points: Sequence[tuple[str, float, Results]], dense: Results) -> Figure:
    """Draw a measure against sparsity, with intervals, and a line of the dense model.

    A point is the label of its curve, a sparsity, and results. Values that are not finite are left out.
    """
    figure = Figure(figsize=(6, 3.5))
    ax = figure.subplots()
    curves: dict[str, list[tuple[float, Estimate]]] = {}
    for label, sparsity, results in points:
        curve, value = curves.setdefault(label, []), measure.read(results, target)
        if isinstance(value, Estimate):
            curve.append((100 * sparsity, value))
    for label, curve in curves.items():
        x = [sparsity for sparsity, _ in curve]
        (line,) = ax.plot(x, [value.value for _, value in curve], label=label)
        ax.vlines(x, [value.low for _, value in curve], [value.high for _, value in curve], line.get_color())
    value = measure.read(dense, target)
    if isinstance(value, Estimate):
        ax.axhline(value.value, color="grey", label="dense")
    ax.set_yscale(measure.scale)
    if measure.scale == LOG:
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    ax.yaxis.set_major_formatter(lambda tick, _: measure.form(tick))
    ax.minorticks_off()
    ax.set_xlabel("sparsity, %")
    ax.set_ylabel(measure.heading("", one_text=True))
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16))
    return figure


@mpl.rc_context(LOOK)
def svg(figure: Figure) -> str:
    """Return a chart as SVG, byte-identical for equal charts."""
    content = io.StringIO()
    figure.savefig(content, format="svg", metadata={"Date": None}, bbox_inches="tight")
    return content.getvalue()
