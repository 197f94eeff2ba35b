"""Published rows, and the comparison of experiments with published rows of the same protocol."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from wanda_dvc.catalog import methods
from wanda_dvc.params import Params
from wanda_dvc.results.experiments import Experiment
from wanda_dvc.results.inference import Estimate
from wanda_dvc.results.measures import Results, Value, accuracy, perplexity
from wanda_dvc.study.markup import DASH, code, inline, number
from wanda_dvc.study.settings import Settings

OF_INPUTS = ("calibration.", "propagation")  # ignored for methods without statistics
DENSE = "dense"  # the method of a published row of the dense model
PLAIN = {"reconstruction": "none", "allocation": "uniform"}  # default of a pruned row
HEADERS = ["", "source", "measure", "published", "here", "here / published"]


@dataclass(frozen=True)
class Source:
    """Published rows of one model, and their protocol."""

    source: str
    models: list[str]
    perplexity: Settings
    pruning: Settings
    rows: list[dict[str, Any]]
    zero_shot: Settings | None = None

    def differences(self, settings: Settings, measure: str, row: dict[str, Any]) -> list[str]:
        """Return the settings in which an experiment's protocol differs from this row's; [] if comparable.

        `measure` is `perplexity` or a task. For a row with `method: dense`, pruning settings do not count.
        """
        wanted = self.perplexity if measure == "perplexity" else self.zero_shot
        if wanted is None:
            return [measure]
        wanted = dict(wanted)
        if row["method"] != DENSE:
            own = {key: row[key] for key in ("method", "sparsity", "pattern", "group") if key in row}
            pruning = PLAIN | self.pruning | own
            if methods()[row["method"]].needs == "weights":
                pruning = {key: value for key, value in pruning.items() if not key.startswith(OF_INPUTS)}
            if pruning.get("pattern", "unstructured") != "unstructured":
                pruning.pop("group", None)
            wanted |= pruning
        different = [] if self._is_model(settings["model"]) else ["model"]
        allowed = {key: value if isinstance(value, list) else [value] for key, value in wanted.items()}
        return different + [key for key, values in allowed.items() if settings[key] not in values]

    def _is_model(self, name: str) -> bool:
        """Whether a model is a Hub id at any revision, or a directory of this name."""
        name = name.partition("@")[0]
        path = Path(name)
        return name in self.models or (path.is_absolute() and path.name in [Path(model).name for model in self.models])


@cache
def sources() -> list[Source]:
    """Return all published rows."""
    text = (files("wanda_dvc.results") / "published.yaml").read_text(encoding="utf-8")
    return [Source(**entry) for entry in YAML(typ="safe", pure=True).load(text)]


def text_settings(params: Params, text: str) -> Settings:
    """Return the settings of a text under the names of published.yaml."""
    return {f"perplexity.text.{key}": value for key, value in params.filled.perplexity.texts[text]}


def comparisons(experiments: Sequence[tuple[str, Experiment]]) -> tuple[list[list[str]], str]:
    """Return a table's rows, each published figure next to ours of the same protocol; and the nearest one in words."""
    found: dict[tuple[str, ...], None] = {}
    others: list[tuple[int, str]] = []
    for source in sources():
        for row in source.rows:
            for name, one in experiments:
                for measure, on, text in _measures(one, row):
                    settings = one.settings | text_settings(one.params, text)
                    if different := source.differences(settings, measure, row):
                        said = f"{source.source}: {row['method']}, {measure}; it differs in"
                        others.append((len(different), f"{said} {', '.join(map(code, different))}"))
                        continue
                    is_dense = row["method"] == DENSE
                    own = _own(one.dense if is_dense else one.pruned, measure, on)
                    cells = (DENSE if is_dense else name, source.source, inline(measure))
                    found[*cells, *_figures(measure, row[measure], own)] = None
    if found or not others:
        return [list(cells) for cells in found], "No task or text has a published row."
    nearest = min(others, key=lambda other: other[0])[1]
    return [], f"No published row has the protocol of these experiments. The nearest is {nearest}."


def _measures(one: Experiment, row: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the measures that a published row and an experiment have, with their text or task, and a text."""
    texts = one.params.perplexity.texts if "perplexity" in row else []
    tasks = [task for task in one.params.tasks.names if task in row]
    first = next(iter(one.params.perplexity.texts))  # accuracies do not depend on it
    return [*(("perplexity", text, text) for text in texts), *((task, task, first) for task in tasks)]


def _own(results: Results, measure: str, on: str) -> Value:
    return perplexity(results, on) if measure == "perplexity" else accuracy(results, on)


def _figures(measure: str, published: float | str, own: Value) -> tuple[str, str, str]:
    """Format a published figure, ours and their ratio; accuracies in percent."""
    scale = 1 if measure == "perplexity" else 100
    value = scale * own.value if isinstance(own, Estimate) else own
    shown = [number(one) if scale == 1 or not isinstance(one, float) else f"{one:.2f}" for one in (published, value)]
    both = isinstance(published, float | int) and isinstance(value, float)
    return shown[0], shown[1], f"{value / published:.3f}" if both else DASH  # type: ignore[operator]
