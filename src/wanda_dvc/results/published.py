"""Published rows, and the comparison of experiments with published rows of the same protocol."""

from collections.abc import Mapping
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
from wanda_dvc.results.measures import Value, accuracy, perplexity

OF_INPUTS = ("calibration.", "propagation")  # ignored for methods without statistics
PLAIN = {"reconstruction": "none", "allocation": "uniform"}  # default of a pruned row
HEADERS = ["", "source", "measure", "published", "here", "here / published"]


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
        name = settings["model"].partition("@")[0]
        known = [Path(model).name for model in self.models]
        if wanted is None or not (name in self.models or (Path(name).is_absolute() and Path(name).name in known)):
            return False
        if row["method"] != DENSE:
            own = {key: row[key] for key in ("method", "sparsity", "pattern", "group") if key in row}
            pruning = PLAIN | self.pruning | own
            if methods()[row["method"]].needs == "weights":
                pruning = {key: value for key, value in pruning.items() if not key.startswith(OF_INPUTS)}
            wanted = wanted | pruning
        return all(settings[key] in (value if isinstance(value, list) else [value]) for key, value in wanted.items())


@cache
def sources() -> list[PublishedTable]:
    """Return all published rows."""
    text = (files("wanda_dvc.results") / "published.yaml").read_text(encoding="utf-8")
    return [PublishedTable(**entry) for entry in YAML(typ="safe", pure=True).load(text)]


def comparisons(experiments: Mapping[str, Experiment]) -> list[list[str]]:
    """Return a row below `HEADERS` for each published figure of an experiment's protocol, next to its own figure."""
    found: dict[tuple[str, ...], None] = {}  # several experiments have one dense model
    for source in sources():
        for row in source.rows:
            for name, one in experiments.items():
                untrained = f"{name}, before the training" if one.params.recovery.tokens else name
                model, named = (DENSE, DENSE) if row["method"] == DENSE else ("pruned", untrained)
                results = one.results[model]
                measured = [(task, accuracy(results, task), Settings()) for task in results.tasks]
                for text in results.texts:
                    filled = one.params.perplexity.texts[text].filled
                    own = {f"perplexity.text.{key}": value for key, value in filled.items()}
                    measured.append(("perplexity", perplexity(results, text), own))
                for measure, value, settings in measured:
                    if measure in row and source.has_protocol(one.settings | settings, measure, row):
                        found[named, source.source, measure, *_figures(measure, row[measure], value)] = None
    return [list(cells) for cells in found]


def _figures(measure: str, published: float | str, own: Value) -> tuple[str, str, str]:
    """Format a published figure, ours and their ratio; accuracies in percent."""
    if not isinstance(own, Estimate):
        return f"{published}", own or DASH, DASH
    value = own.value if measure == "perplexity" else 100 * own.value
    return f"{published}", f"{value:.4g}", DASH if isinstance(published, str) else f"{value / published:.3f}"
