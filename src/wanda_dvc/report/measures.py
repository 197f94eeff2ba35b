"""What one row measured, and what two rows measured on the same windows and items."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from wanda_dvc.report import inference
from wanda_dvc.report.inference import Estimate
from wanda_dvc.report.rows import Row
from wanda_dvc.study.provenance import measured_alike

DIVERGED = "diverged"


class Measured(NamedTuple):
    """A model that a row has results of: `dense` or `pruned`."""

    row: Row
    model: str

    @property
    def perplexity(self) -> float | str | None:
        """The metric; `diverged` if a loss was not finite, None if it was not measured."""
        value: float | str | None = self.row.metric(self.model, "perplexity").get("perplexity")
        return value

    @property
    def diverged(self) -> bool:
        """Whether the model's perplexity is not finite."""
        return self.perplexity == DIVERGED

    def perplexity_interval(self) -> Estimate | None:
        """The perplexity with its interval over windows; None if it diverged or its losses are missing."""
        losses = self._losses()
        if not losses or not isinstance(self.perplexity, float):
            return None
        return inference.perplexity(losses, self._predictions())

    def ratio(self, other: "Measured") -> Estimate | None:
        """This perplexity divided by the other's, paired by window.

        None if one of them diverged, read other tokens, or has no losses at hand.
        """
        if not measured_alike(self._protocol(), other._protocol()):
            return None
        losses, others = self._losses(), other._losses()
        return inference.ratio(losses, others, self._predictions()) if losses and others else None

    def accuracy(self, task: str) -> float | None:
        """The fraction of a task's items that the model answered correctly."""
        value: float | None = self.row.metric(self.model, f"zero_shot/{task}").get("acc")
        return value

    def answers(self, task: str) -> dict[Any, bool]:
        """By item, whether the model answered correctly."""
        items = self.row.details(self.model, f"zero_shot/{task}").get("items", [])
        return {item["item"]: item["acc"] > 0.5 for item in items}

    def same_items(self, other: "Measured", task: str) -> tuple[list[bool], list[bool]]:
        """Both models' answers to the items that both answered; empty if their tasks differ."""
        if self._task_hash(task) != other._task_hash(task):
            return [], []
        mine, theirs = self.answers(task), other.answers(task)
        shared = [item for item in mine if item in theirs]
        return [mine[item] for item in shared], [theirs[item] for item in shared]

    def _protocol(self) -> dict[str, Any] | None:
        protocol: dict[str, Any] | None = self.row.details(self.model, "perplexity").get("protocol")
        return protocol

    def _losses(self) -> list[float] | None:
        """The windows' losses; None if they are missing or one is not finite."""
        losses = self.row.details(self.model, "perplexity").get("losses")
        return losses if losses and all(isinstance(loss, float) for loss in losses) else None

    def _predictions(self) -> list[int]:
        """How many tokens each window predicts."""
        protocol = self._protocol()
        assert protocol
        whole = [protocol["length"] - 1] * protocol["windows"]
        return whole if protocol["rest"] == "dropped" else [*whole, protocol["rest"] - 1]

    def _task_hash(self, task: str) -> str | None:
        protocol = self.row.details(self.model, f"zero_shot/{task}").get("protocol", {})
        digest: str | None = protocol.get("task", {}).get("sha256")
        return digest


def pruned(row: Row) -> Measured:
    """The model that the row pruned."""
    return Measured(row, "pruned")


def mean(values: Sequence[float | None]) -> float | None:
    """The mean; None unless every value is known."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def paired_mean(tasks: Sequence[tuple[list[bool], list[bool]]]) -> Estimate | None:
    """The first's mean accuracy over tasks minus the second's; None unless both answered items of every task."""
    if not tasks or not all(mine for mine, _ in tasks):
        return None
    differences = [[float(a) - float(b) for a, b in zip(*answers, strict=True)] for answers in tasks]
    found = inference.mean_of_tasks(differences)
    return found and found.within(-1, 1)
