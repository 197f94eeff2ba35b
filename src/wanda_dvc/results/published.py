"""Published figures next to those of experiments with the same protocol."""

from collections.abc import Iterator, Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from wanda_dvc.catalog import methods
from wanda_dvc.params import Settings
from wanda_dvc.results.compare import DENSE, headings
from wanda_dvc.results.experiments import Experiment
from wanda_dvc.results.measures import PER_TASK, PER_TEXT
from wanda_dvc.study.files import Json

OF_STATISTICS = ("calibration.", "propagation")  # settings that do not count for methods without statistics


@cache
def published_tables() -> Any:
    """Return the tables of published.yaml: the rows of a source, and their protocol."""
    text = (files("wanda_dvc.results") / "published.yaml").read_text(encoding="utf-8")
    return YAML(typ="safe", pure=True).load(text)


def published_rows(experiments: Mapping[str, Experiment]) -> list[list[str]]:
    """Return for each published figure of an experiment's protocol: model, measure, source, their and our figure."""
    rows: list[list[str]] = []
    for name, experiment in experiments.items():
        for model, title in ((DENSE, DENSE), ("pruned", f"{name}, pruned")):  # before a training
            results = experiment.results[model]
            for heading, (measure, target) in headings([results], brief=False).items():
                settings = experiment.settings
                if measure.per == PER_TEXT:
                    filled = experiment.params.perplexity.texts[target].filled
                    settings = settings | {f"perplexity.text.{key}": value for key, value in filled.items()}
                key = target if measure.per == PER_TASK else measure.name
                for source, figure in matching_figures(settings, key, dense=model == DENSE):
                    row = [title, heading, source, f"{figure}", measure.text(measure.read(results, target))]
                    if row not in rows:  # several experiments have one dense model
                        rows.append(row)
    return rows


def matching_figures(settings: Settings, key: str, *, dense: bool) -> Iterator[tuple[str, float | str]]:
    """Yield the sources and published figures of a protocol: the perplexity or a task of the dense or a pruned model.

    Of the model's Hub id or directory, the last part counts. A figure may be `diverged`.
    """
    model = settings["model"].partition("@")[0]
    for table in published_tables():
        protocol = table.get("perplexity" if key == "perplexity" else "zero_shot")
        if protocol is None or Path(model).name != Path(table["model"]).name:
            continue
        for row in table["rows"]:
            is_dense = row["method"] == DENSE
            expected = protocol if is_dense else protocol | _pruning(table["pruning"], row, settings)
            allowed = {name: value if isinstance(value, list) else [value] for name, value in expected.items()}
            if key in row and is_dense == dense and all(settings[name] in values for name, values in allowed.items()):
                yield table["source"], row[key]


def _pruning(protocol: Json, row: Json, settings: Settings) -> Json:
    """Return the settings of a published row: those of its table's protocol, and its own."""
    pruning = protocol | {name: value for name, value in row.items() if name in settings}
    if methods()[row["method"]].needs == "weights":
        return {name: value for name, value in pruning.items() if not name.startswith(OF_STATISTICS)}
    return pruning
