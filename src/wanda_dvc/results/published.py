"""Published figures next to those of experiments on the same windows, with the differences in protocol."""

import math
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from ruamel.yaml import YAML

from wanda_dvc.catalog import methods
from wanda_dvc.params import Settings
from wanda_dvc.results.compare import DENSE, headings
from wanda_dvc.results.experiments import Experiment
from wanda_dvc.results.intervals import Estimate
from wanda_dvc.results.markup import DASH
from wanda_dvc.results.measures import PER_TASK, PER_TEXT
from wanda_dvc.study.files import Json

OF_STATISTICS = ("calibration.", "propagation")  # settings that do not count for methods without statistics
# Settings that may differ from a row's, and are then named. The others decide what is measured, or which weights go.
TOLERATED = ("dtype", *OF_STATISTICS)
LARGEST_GAP = 0.01  # between two perplexities of one dense model; other weights have a larger one


@cache
def published_tables() -> Any:
    """Return the tables of published.yaml: the rows of a source, and their protocol."""
    text = (files("wanda_dvc.results") / "published.yaml").read_text(encoding="utf-8")
    return YAML(typ="safe", pure=True).load(text)


def published_rows(experiments: Mapping[str, Experiment]) -> list[list[str]]:
    """Return rows of the model, the measure, the source, its figure, the figure here, and differences in protocol."""
    rows: list[list[str]] = []
    for name, experiment in experiments.items():
        for model in (DENSE, "pruned"):  # no figures of recovered models are published
            results = experiment.results[model]
            settings = experiment.settings | ({"method": DENSE} if model == DENSE else {})
            title = DENSE if model == DENSE else f"{name}, pruned"
            for heading, (measure, target) in headings([results], brief=False).items():
                if measure.per != PER_TASK and measure.name != "perplexity":
                    continue  # the measure `sparsity` would be found in a row, where it is a setting
                of_text = experiment.params.perplexity.texts[target].filled if measure.per == PER_TEXT else {}
                all_settings = settings | {f"perplexity.text.{key}": value for key, value in of_text.items()}
                for computed in filter(None, measure.protocols_of(results, target).values()):
                    all_settings["dtype"] = computed["dtype"]  # the setting may be `auto`
                figure_name = target if measure.per == PER_TASK else measure.name
                value = measure.read(results, target)
                for source, figure, differences in matching_figures(experiment.config, all_settings, figure_name):
                    if model == DENSE and measure.per == PER_TEXT:
                        ratio = value.value / float(figure) if isinstance(value, Estimate) else math.inf
                        if abs(ratio - 1) > LARGEST_GAP:  # such as a fine-tuned model
                            differences.append("other weights or another tokenizer: dense perplexities differ")
                    shown = "; ".join(differences) or DASH
                    row = [title, heading, source, f"{figure}", measure.formatted(results, target), shown]
                    if row not in rows:  # several experiments have one dense model
                        rows.append(row)
    return rows


def matching_figures(
    config: Json, settings: Settings, figure_name: str
) -> Iterator[tuple[str, float | str, list[str]]]:
    """Yield the sources and published values of a figure, `perplexity` or a task, and the differences in protocol.

    A model is known by its `config`, the content of its config.json. The method of the dense model is `dense`. A value
    may be `diverged`.
    """
    for table in published_tables():
        protocol = table.get("perplexity" if figure_name == "perplexity" else "zero_shot")
        if protocol is None or any(config.get(key) != value for key, value in table["model"].items()):
            continue
        for row in table["rows"]:
            expected = protocol | {name: value for name, value in row.items() if name in settings}
            if row["method"] != DENSE:
                expected = table["pruning"] | expected
                if methods()[row["method"]].needs == "weights":
                    expected = {key: value for key, value in expected.items() if not key.startswith(OF_STATISTICS)}
            allowed = {key: value if isinstance(value, list) else [value] for key, value in expected.items()}
            different = [key for key, values in allowed.items() if settings.get(key) not in values]
            if figure_name in row and all(key.startswith(TOLERATED) for key in different):
                ours = {key: settings.get(key, "several") for key in different}  # texts have no single source
                differences = [f"{key} {value} instead of {allowed[key][0]}" for key, value in ours.items()]
                yield table["source"], row[figure_name], differences
