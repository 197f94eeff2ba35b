"""Published rows, and which of them an experiment may be compared with: those of the same protocol."""

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from ruamel.yaml import YAML

from wanda_dvc.catalog import methods

Settings = dict[str, Any]
OF_INPUTS = ("calibration.", "propagation")  # not asked of a method that needs no inputs
DENSE = "dense"  # the method of a published row of the dense model
PLAIN = {"reconstruction": "none", "allocation": "uniform"}  # of a pruned one, unless it says otherwise


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
        """The settings in which an experiment's protocol differs from this row's; [] if the two may be compared.

        `measure` is `perplexity` or a task. A row with `method: dense` does not ask how weights were chosen.
        """
        wanted = self.perplexity if measure == "perplexity" else self.zero_shot
        if wanted is None:
            return [measure]
        wanted = dict(wanted)
        if row["method"] != DENSE:
            own = {key: row[key] for key in ("method", "sparsity", "pattern", "group") if key in row}
            pruning = PLAIN | self.pruning | own
            if not methods()[row["method"]].needs_inputs():
                pruning = {key: value for key, value in pruning.items() if not key.startswith(OF_INPUTS)}
            if pruning.get("pattern", "unstructured") != "unstructured":
                pruning.pop("group", None)
            wanted |= pruning
        different = [] if self._is_model(settings["model"]) else ["model"]
        allowed = {key: value if isinstance(value, list) else [value] for key, value in wanted.items()}
        return different + [key for key, values in allowed.items() if settings.get(key) not in values]

    def _is_model(self, name: str) -> bool:
        """A Hub id at any revision, or a directory that bears its name."""
        name = name.partition("@")[0]
        return name in self.models or (name.startswith("/") and name.rsplit("/", 1)[-1] in self._names())

    def _names(self) -> list[str]:
        return [model.rsplit("/", 1)[-1] for model in self.models]


@cache
def sources() -> list[Source]:
    """The published rows that the report knows."""
    text = (files("wanda_dvc.report") / "published.yaml").read_text(encoding="utf-8")
    return [Source(**entry) for entry in YAML(typ="safe", pure=True).load(text)]
