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
        for model in (DENSE, "pruned"):  # another model than after a training
            results = experiment.results[model]
            settings = experiment.settings | ({"method": DENSE} if model == DENSE else {})
            title = DENSE if model == DENSE else f"{name}, pruned"
            for heading, (measure, target) in headings([results], brief=False).items():
                of_text = experiment.params.perplexity.texts[target].filled if measure.per == PER_TEXT else {}
                all_settings = settings | {f"perplexity.text.{key}": value for key, value in of_text.items()}
                figure_name = target if measure.per == PER_TASK else measure.name
                for source, figure in matching_figures(all_settings, figure_name):
                    row = [title, heading, source, f"{figure}", measure.formatted(results, target)]
                    if row not in rows:  # several experiments have one dense model
                        rows.append(row)
    return rows


def matching_figures(settings: Settings, figure_name: str) -> Iterator[tuple[str, float | str]]:
    """Yield the sources and published values of a figure, `perplexity` or a task, with the same protocol.

    Of the model's Hub id or directory, the last part counts. The method of the dense model is `dense`. A value may be
    `diverged`.
    """
    model = settings["model"].partition("@")[0]
    for table in published_tables():
        protocol = table.get("perplexity" if figure_name == "perplexity" else "zero_shot")
        if protocol is None or Path(model).name != Path(table["model"]).name:
            continue
        for row in table["rows"]:
            expected = protocol | {name: value for name, value in row.items() if name in settings}
            if row["method"] != DENSE:
                expected = table["pruning"] | expected
                if methods()[row["method"]].needs == "weights":
                    expected = {key: value for key, value in expected.items() if not key.startswith(OF_STATISTICS)}
            allowed = {key: value if isinstance(value, list) else [value] for key, value in expected.items()}
            if figure_name in row and all(settings.get(key) in values for key, values in allowed.items()):
                yield table["source"], row[figure_name]
