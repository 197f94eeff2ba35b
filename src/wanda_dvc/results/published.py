"""Published rows, and the comparison of experiments with published rows of the same protocol."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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

OF_STATISTICS = ("calibration.", "propagation")  # settings that do not count for methods without statistics
UNLESS_NAMED = {"reconstruction": "none", "allocation": "uniform"}  # of a pruned row


@dataclass(frozen=True)
class PublishedTable:
    """Published rows of one model, and their protocol."""

    source: str
    models: list[str]
    perplexity: Settings
    pruning: Settings
    rows: list[dict[str, Any]]
    zero_shot: Settings | None = None

    def has_protocol(self, settings: Settings, measure: str, row: dict[str, Any]) -> bool:
        """Whether an experiment's settings are those of this row; `measure` is `perplexity` or a task.

        A name of a model may be a Hub id at any revision, or a directory of this name. For a row with `method: dense`,
        pruning settings do not count.
        """
        wanted = self.perplexity if measure == "perplexity" else self.zero_shot
        model = settings["model"].partition("@")[0]
        folders = [Path(name).name for name in self.models]
        is_model = model in self.models or (Path(model).is_absolute() and Path(model).name in folders)
        if wanted is None or not is_model:
            return False
        if row["method"] != DENSE:
            pruning = UNLESS_NAMED | self.pruning
            pruning |= {key: row[key] for key in ("method", "sparsity", "pattern", "group") if key in row}
            if methods()[row["method"]].needs == "weights":
                pruning = {key: value for key, value in pruning.items() if not key.startswith(OF_STATISTICS)}
            wanted = wanted | pruning
        for key, value in wanted.items():
            allowed = value if isinstance(value, list) else [value]
            if settings.get(key) not in allowed:
                return False
        return True


@cache
def published_tables() -> list[PublishedTable]:
    """Return all published rows."""
    text = (files("wanda_dvc.results") / "published.yaml").read_text(encoding="utf-8")
    return [PublishedTable(**entry) for entry in YAML(typ="safe", pure=True).load(text)]


def published_rows(experiments: Mapping[str, Experiment]) -> list[list[str]]:
    """Return for each published figure of an experiment's protocol: model, source, measure, theirs, ours, ratio."""
    rows: list[list[str]] = []
    for table in published_tables():
        for published in table.rows:
            for name, experiment in experiments.items():
                for row in _compared_rows(table, published, name, experiment):
                    if row not in rows:  # several experiments have one dense model
                        rows.append(row)
    return rows


def _compared_rows(
    table: PublishedTable, published: dict[str, Any], name: str, experiment: Experiment
) -> Iterator[list[str]]:
    model, title = "pruned", name
    if published["method"] == DENSE:
        model = title = DENSE
    elif experiment.params.recovery.tokens:
        title = f"{name}, before the training"
    for measure, value, settings in _measured(experiment, model):
        if measure in published and table.has_protocol(settings, measure, published):
            yield [title, table.source, measure, *_figures(measure, published[measure], value)]


def _measured(experiment: Experiment, model: str) -> Iterator[tuple[str, Value, Settings]]:
    results = experiment.results[model]
    for task in results.tasks:
        yield task, read_accuracy(results, task), experiment.settings
    for text in results.texts:
        filled = experiment.params.perplexity.texts[text].filled
        of_text = {f"perplexity.text.{key}": value for key, value in filled.items()}
        yield "perplexity", read_perplexity(results, text), experiment.settings | of_text


def _figures(measure: str, published: float | str, value: Value) -> tuple[str, str, str]:
    if not isinstance(value, Estimate):
        return f"{published}", value or DASH, DASH
    ours = value.value if measure == "perplexity" else 100 * value.value
    return f"{published}", f"{ours:.4g}", DASH if isinstance(published, str) else f"{ours / published:.3f}"
