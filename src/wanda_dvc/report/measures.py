"""What was measured of one model: perplexity with its windows' losses, and accuracy with its items' answers."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from wanda_dvc.reading import DIVERGED
from wanda_dvc.report import inference
from wanda_dvc.report.inference import Estimate
from wanda_dvc.study.files import Json, load_json
from wanda_dvc.study.project import Project
from wanda_dvc.study.provenance import measured_alike


class Measured:
    """The dense or the pruned model of a study. Each file is read once: a benchmark's answers are megabytes."""

    def __init__(self, study: Project, model: str) -> None:
        self.study, self.model = study, model

    @cached_property
    def perplexity(self) -> float | str | None:
        """The metric; `diverged` if a loss was not finite, None if it was not measured."""
        value: float | str | None = load_json(self.study.metrics(self.model, "perplexity")).get("perplexity")
        return value

    @property
    def diverged(self) -> bool:
        """Whether the model's perplexity is not finite."""
        return self.perplexity == DIVERGED

    @cached_property
    def windows(self) -> Json:
        """The protocol and the losses behind the perplexity; {} if missing."""
        return load_json(self.study.details(self.model, "perplexity"))

    @cached_property
    def losses(self) -> list[float] | None:
        """The windows' losses; None if they are missing or one is not finite."""
        losses = self.windows.get("losses")
        return losses if losses and all(isinstance(loss, float) for loss in losses) else None

    @property
    def predictions(self) -> list[int]:
        """How many tokens each window predicts."""
        protocol = self.windows["protocol"]
        whole = [protocol["length"] - 1] * protocol["windows"]
        return whole if protocol["rest"] == "dropped" else [*whole, protocol["rest"] - 1]

    def perplexity_interval(self) -> Estimate | None:
        """The perplexity with its interval over windows; None if it diverged or its losses are missing."""
        if not self.losses or not isinstance(self.perplexity, float):
            return None
        return inference.perplexity(self.losses, self.predictions)

    def ratio(self, other: "Measured") -> Estimate | None:
        """This perplexity divided by the other's, paired by window.

        None if one of them diverged, read other tokens, or has no losses at hand.
        """
        alike = measured_alike(self.windows.get("protocol"), other.windows.get("protocol"))
        if not alike or not self.losses or not other.losses:
            return None
        return inference.ratio(self.losses, other.losses, self.predictions)

    @cached_property
    def accuracies(self) -> dict[str, float]:
        """The fraction of items that the model answered correctly, by task."""
        return {task: of["acc"] for task, of in load_json(self.study.metrics(self.model, "zero_shot")).items()}

    @cached_property
    def tasks(self) -> Json:
        """The protocol and the items' answers by task."""
        found: Json = load_json(self.study.details(self.model, "zero_shot")).get("tasks", {})
        return found

    def digest(self, task: str) -> str | None:
        """The SHA-256 of a task; None if it is not known."""
        digest: str | None = self.tasks.get(task, {}).get("protocol", {}).get("task", {}).get("sha256")
        return digest

    def answers(self, task: str) -> dict[Any, bool]:
        """By item, whether the model answered correctly."""
        return {item["item"]: item["acc"] > 0.5 for item in self.tasks.get(task, {}).get("items", [])}

    def same_items(self, other: "Measured", task: str) -> tuple[list[bool], list[bool]]:
        """Both models' answers to the items that both answered; empty if their tasks differ."""
        if self.digest(task) != other.digest(task):
            return [], []
        mine, theirs = self.answers(task), other.answers(task)
        shared = [item for item in mine if item in theirs]
        return [mine[item] for item in shared], [theirs[item] for item in shared]


def mean(values: Sequence[float | None]) -> float | None:
    """The mean; None unless every value is known."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None
