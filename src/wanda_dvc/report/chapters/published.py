"""Published rows, and the chapter that compares experiments with published rows of the same protocol."""

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from wanda_dvc.catalog import methods
from wanda_dvc.params import Params
from wanda_dvc.report.formatting import DASH
from wanda_dvc.report.measures import Measured
from wanda_dvc.report.pages import Content, table
from wanda_dvc.report.rows import Row
from wanda_dvc.report.section import Section
from wanda_dvc.study.markup import code, inline, number
from wanda_dvc.study.settings import Settings

OF_INPUTS = ("calibration.", "propagation")  # ignored for methods without statistics
DENSE = "dense"  # the method of a published row of the dense model
PLAIN = {"reconstruction": "none", "allocation": "uniform"}  # default of a pruned row


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
            if not methods()[row["method"]].needs_inputs():
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
    text = (files("wanda_dvc.report") / "published.yaml").read_text(encoding="utf-8")
    return [Source(**entry) for entry in YAML(typ="safe", pure=True).load(text)]


def content(section: Section) -> Content:
    """Return the numbers side by side, or the nearest published row and its differences."""
    found, others = [], []
    for source in sources():
        for entry in source.rows:
            for measure in [key for key in entry if key == "perplexity" or key in section.tasks]:
                for row, text in ((one, text) for one in section.rows for text in _texts(one, measure)):
                    different = source.differences(row.settings | text_settings(row.params, text), measure, entry)
                    if different:
                        others.append((len(different), f"{source.source}: {entry['method']}, {measure}", different))
                        continue
                    is_dense, published = entry["method"] == DENSE, entry[measure]
                    own = _own(section.on(text).dense if is_dense else row.on(text).pruned, measure)
                    both = isinstance(published, float | int) and isinstance(own, float)
                    cells = ("dense" if is_dense else section.name(row), source.source, inline(measure))
                    ratio = f"{own / published:.3f}" if both else DASH
                    found.append((*cells, _as(measure, published), _as(measure, own), ratio))
    if found:
        caption = "Published rows of the same protocol; accuracies in percent. A dash: not measured here."
        headers = ["", "source", "measure", "published", "here", "here / published"]
        return [table(caption, headers, [list(cells) for cells in dict.fromkeys(found)])]
    _, nearest, different = min(others, key=lambda other: other[0])
    return [
        "This report knows no published row with the protocol of these experiments. "
        f"The nearest is {nearest}; it differs in {', '.join(map(code, different))}."
    ]


def _texts(row: Row, measure: str) -> list[str]:
    """Return the texts on which a row has a measure; accuracies do not depend on them."""
    return list(row.params.perplexity.texts) if measure == "perplexity" else [row.params.perplexity.first]


def text_settings(params: Params, text: str) -> Settings:
    """Return the settings of a text under the names of published.yaml."""
    return {f"perplexity.text.{key}": value for key, value in params.perplexity.texts[text].filled}


def _own(measured: Measured, measure: str) -> float | str | None:
    if measure == "perplexity":
        return measured.perplexity
    value = measured.accuracies.get(measure)
    return None if value is None else 100 * value


def _as(measure: str, value: float | str | None) -> str:
    return number(value) if measure == "perplexity" or not isinstance(value, float) else f"{value:.2f}"
