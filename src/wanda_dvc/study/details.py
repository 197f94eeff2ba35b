"""Reads metrics and metrics/details/*.json."""

import math
from collections.abc import Sequence
from pathlib import Path

from wanda_dvc.reading import DIVERGED
from wanda_dvc.study.files import Json, load_json

DROPPED = "dropped"  # the tokens after the last complete window


def is_of(content: Json, model: str) -> bool:
    """Whether details are of a model, by its digest; unknown models match."""
    every = [content, *content.get("tasks", {}).values()]
    return all(one.get("protocol", {}).get("model", model) == model for one in every)


def load_measured(metrics: Path, details: Path) -> tuple[Json, Json]:
    """Read the metrics and the details of a perplexity or of the tasks; empty objects if missing.

    Metrics that do not follow from their details are left out: after `git checkout` without `dvc checkout` the two are
    of two experiments.
    """
    numbers, content = load_json(metrics), load_json(details)
    if "tasks" in content:
        return {task: one for task, one in numbers.items() if _agree(one, content["tasks"].get(task, {}))}, content
    return numbers if _agree(numbers, content) else {}, content


def mean_accuracy(accuracies: Sequence[float | str | None]) -> float | str | None:
    """Return the mean over tasks; `diverged` if the model diverged on one, and None unless each is known."""
    if DIVERGED in accuracies:
        return DIVERGED
    known = [one for one in accuracies if isinstance(one, (int, float))]
    return sum(known) / len(known) if known and len(known) == len(accuracies) else None


def _agree(numbers: Json, content: Json) -> bool:
    """Whether the metrics of a text or a task follow from their details, as far as these are known."""
    if items := content.get("items"):  # none if the model diverged
        return math.isclose(numbers["acc"], sum(item["acc"] for item in items) / len(items), abs_tol=1e-5)
    losses, perplexity = content.get("losses"), numbers.get("perplexity")
    if not losses or perplexity is None or DIVERGED in (perplexity, *losses):
        return True
    protocol = content["protocol"]
    rest = [] if protocol["rest"] == DROPPED else [protocol["rest"] - 1]
    counts = [protocol["length"] - 1] * protocol["windows"] + rest
    mean = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    return math.isclose(math.log(perplexity), mean, abs_tol=1e-4)
