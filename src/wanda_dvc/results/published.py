"""Published rows, and the comparison of experiments with published rows of the same protocol."""

from collections.abc import Iterator, Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from wanda_dvc.catalog import methods
from wanda_dvc.params import Settings
from wanda_dvc.results.compare import DENSE
from wanda_dvc.results.experiments import Experiment
from wanda_dvc.results.intervals import Estimate
from wanda_dvc.results.markup import DASH
from wanda_dvc.results.measures import Value, read_accuracy, read_perplexity
from wanda_dvc.study.files import Json

OF_STATISTICS = ("calibration.", "propagation")  # settings that do not count for methods without statistics
UNLESS_NAMED = {"reconstruction": "none", "allocation": "uniform"}  # of a pruned row


@cache
def published_tables() -> Any:
    """Return the tables of published.yaml: the rows of a source, and their protocol."""
    text = (files("wanda_dvc.results") / "published.yaml").read_text(encoding="utf-8")
    return YAML(typ="safe", pure=True).load(text)


def published_rows(experiments: Mapping[str, Experiment]) -> list[list[str]]:
    """Return for each published figure of an experiment's protocol: model, source, measure, theirs, ours, ratio."""
    rows: list[list[str]] = []
    for name, experiment in experiments.items():
        for model, measure, value, settings in _measured(experiment):
            title = DENSE if model == DENSE else f"{name}, pruned"  # another model than after a training
            for source, published in matching_figures(settings, model, measure):
                ours, ratio = f"{value or DASH}", DASH
                if isinstance(value, Estimate):
                    number = value.value if measure == "perplexity" else 100 * value.value
                    ours = f"{number:.4g}"
                    ratio = DASH if isinstance(published, str) else f"{number / published:.3f}"
                row = [title, source, measure, f"{published}", ours, ratio]
                if row not in rows:  # several experiments have one dense model
                    rows.append(row)
    return rows


def _measured(experiment: Experiment) -> Iterator[tuple[str, str, Value, Settings]]:
    for model in (DENSE, "pruned"):
        results = experiment.results[model]
        for task in results.tasks:
            yield model, task, read_accuracy(results, task), experiment.settings
        for text in results.texts:
            filled = experiment.params.perplexity.texts[text].filled
            of_text = {f"perplexity.text.{key}": value for key, value in filled.items()}
            yield model, "perplexity", read_perplexity(results, text), experiment.settings | of_text


def matching_figures(settings: Settings, model: str, measure: str) -> Iterator[tuple[str, float | str]]:
    """Yield the sources and published figures of a protocol: of the dense or a pruned model, perplexity or a task.

    The model's name may be a Hub id at any revision, or a directory of this name. A figure may be `diverged`.
    """
    name = settings["model"].partition("@")[0]
    for table in published_tables():
        protocol = table.get("perplexity" if measure == "perplexity" else "zero_shot")
        is_folder = name.startswith("/") and Path(name).name == Path(table["model"]).name
        if protocol is None or not (is_folder or name == table["model"]):
            continue
        for row in table["rows"]:
            is_dense = row["method"] == DENSE
            expected = protocol if is_dense else protocol | _pruning(table, row)
            lists = {key: value if isinstance(value, list) else [value] for key, value in expected.items()}
            has_protocol = all(key in settings and settings[key] in values for key, values in lists.items())
            if has_protocol and measure in row and is_dense == (model == DENSE):
                yield table["source"], row[measure]


def _pruning(table: Json, row: Json) -> Json:
    settings = UNLESS_NAMED | table["pruning"]
    settings |= {key: row[key] for key in ("method", "sparsity", "pattern", "group") if key in row}
    if methods()[row["method"]].needs == "weights":
        return {key: value for key, value in settings.items() if not key.startswith(OF_STATISTICS)}
    return settings
