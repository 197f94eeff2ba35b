"""An allocation compared with `uniform`, all else equal."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from wanda_dvc.errors import UserError
from wanda_dvc.params import check_params
from wanda_dvc.study.files import load_json
from wanda_dvc.study.markup import number
from wanda_dvc.study.project import Project
from wanda_dvc.study.settings import nested, resolved

OWN = ("allocation", "allocation_strength", "calibration.statistics")  # the settings that may differ


class Result(NamedTuple):
    """The perplexity and the layer error of a model; None where one was not measured."""

    perplexity: float | str | None
    layer_error: float | None  # the linears' mean

    @classmethod
    def of(cls, study: Project, model: str = "pruned") -> "Result":
        """Read a study's metrics and details. The dense model has no layer error."""
        linears = load_json(study.details(model, "layer_error")).get("linears", {})
        errors = [told["error"] for told in linears.values()]
        perplexity = load_json(study.metrics(model, "perplexity")).get("perplexity")
        return cls(perplexity, sum(errors) / len(errors) if errors else None)


def is_uniform_of(other: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Whether settings have another allocation than `uniform`, and others differ in that alone.

    Both are by dotted name, as params.yaml has them. False of others that this version can't read.
    """
    try:
        own, uniform = (resolved(check_params(nested(one))) for one in (settings, other))
    except UserError:
        return False
    if own["allocation"] == "uniform" or uniform["allocation"] != "uniform":
        return False
    return all(uniform[name] == value for name, value in own.items() if name not in OWN)


def against_uniform(own: Result, uniform: Result) -> str | None:
    """Say both results, and which is worse; None where no measure is known of both."""
    said = []
    if own.perplexity is not None and uniform.perplexity is not None:
        values = (float("inf") if isinstance(value, str) else value for value in (own.perplexity, uniform.perplexity))
        said.append(f"perplexity {number(own.perplexity)} instead of {number(uniform.perplexity)}, {_verdict(*values)}")
    if own.layer_error is not None and uniform.layer_error is not None:
        errors = own.layer_error, uniform.layer_error
        mine, theirs = (f"{100 * error:.2f} %" for error in errors)
        said.append(f"mean layer error {mine} instead of {theirs}, {_verdict(*errors)}")
    return "; ".join(said) or None


def _verdict(mine: float, theirs: float) -> str:
    return "worse" if mine > theirs else "better" if mine < theirs else "the same"
