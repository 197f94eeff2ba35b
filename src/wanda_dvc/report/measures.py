"""The results of one model: perplexity with its windows' losses, and accuracy with its items' answers."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from wanda_dvc.engine.flips import Flips, of_items, total_flips
from wanda_dvc.reading import DIVERGED
from wanda_dvc.results import inference
from wanda_dvc.results.inference import Estimate
from wanda_dvc.study.details import load_measured
from wanda_dvc.study.files import Json, load_json
from wanda_dvc.study.project import Project
from wanda_dvc.study.protocol import comparable

N = 4  # of the repeated n-grams in continuations


class Continued(NamedTuple):
    """A prompt's continuations by the dense and the pruned model."""

    prompt: str
    dense: str
    pruned: str
    equal: int  # tokens before the two part
    tokens: int  # of the longer one
    repeated: tuple[float, float]  # shares of repeated n-grams, of the dense and the pruned continuation


@dataclass
class Measured:
    """The results of a dense or a pruned model, as far as they are known."""

    perplexity: float | str | None = None  # `diverged` if a loss was not finite
    divergence: Json = field(default_factory=dict)  # its measures, of a pruned model
    windows: Json = field(default_factory=dict)  # the protocol and the losses behind the perplexity
    accuracies: dict[str, float] = field(default_factory=dict)  # by task, the fraction of items answered correctly
    tasks: Json = field(default_factory=dict)  # by task, the protocol and the items' answers
    continuations: Json = field(default_factory=dict)  # the protocol, and the prompts or `skipped`

    @classmethod
    def of(cls, study: Project, model: str, text: str = "") -> "Measured":
        """Read the metrics and the details of a study's model, on a text, by default the first one."""
        on_text = f"perplexity/{text or study.params.perplexity.first}"
        (measures, windows), (answered, answers) = (
            load_measured(study.metrics(model, name), study.details(model, name)) for name in (on_text, "zero_shot")
        )
        return cls(
            measures.pop("perplexity", None),
            measures,
            windows,
            {task: of["acc"] for task, of in answered.items() if of["acc"] != DIVERGED},
            answers.get("tasks", {}),
            load_json(study.details(model, "continuations")),
        )

    @classmethod
    def merged(cls, several: Iterable["Measured"]) -> "Measured":
        """Combine several results of the same model: the first existing value counts."""
        found = cls()
        for one in several:
            if found.perplexity is None or not found.windows:
                found.perplexity, found.windows = one.perplexity or found.perplexity, one.windows
            found.continuations = found.continuations or one.continuations
            found.accuracies, found.tasks = one.accuracies | found.accuracies, one.tasks | found.tasks
        return found

    @property
    def diverged(self) -> bool:
        """Whether the model's perplexity is not finite."""
        return self.perplexity == DIVERGED

    @property
    def losses(self) -> list[float] | None:
        """The windows' losses; None if they are missing or one is not finite."""
        losses = self.windows.get("losses")
        return losses if losses and all(isinstance(loss, float) for loss in losses) else None

    @property
    def predictions(self) -> list[int]:
        """The number of predicted tokens of each window."""
        protocol = self.windows["protocol"]
        complete = [protocol["length"] - 1] * protocol["windows"]
        return complete if protocol["rest"] == "dropped" else [*complete, protocol["rest"] - 1]

    def perplexity_interval(self) -> Estimate | None:
        """The perplexity with its interval over windows; None if it diverged or its losses are missing."""
        if not self.losses or not isinstance(self.perplexity, float):
            return None
        return inference.perplexity(self.losses, self.predictions)

    def ratio(self, other: "Measured") -> Estimate | None:
        """Return this perplexity divided by the other's, paired by window.

        None if one diverged, has other tokens, or has no losses.
        """
        alike = comparable(self.windows.get("protocol"), other.windows.get("protocol"))
        if not alike or not self.losses or not other.losses:
            return None
        return inference.ratio(self.losses, other.losses, self.predictions)

    def mean(self, tasks: Sequence[str]) -> float | None:
        """The mean accuracy over tasks; None unless it is known for each."""
        known = [self.accuracies[task] for task in tasks if task in self.accuracies]
        return sum(known) / len(known) if known and len(known) == len(tasks) else None

    def digest(self, task: str) -> str | None:
        """Return the SHA-256 of a task; None if it is not known."""
        digest: str | None = self.tasks.get(task, {}).get("protocol", {}).get("task", {}).get("sha256")
        return digest

    def answers(self, task: str) -> dict[Any, bool]:
        """Return by item whether the model's answer is correct."""
        return {item["item"]: item["acc"] > 0.5 for item in self.tasks.get(task, {}).get("items", [])}

    def flips(self, dense: "Measured", task: str, metric: str = "acc") -> Flips | None:
        """Count the answers that differ from the dense model's; `metric` is acc or acc_norm.

        None without the answers to common items of the same task.
        """
        if not self.same_protocol(dense, task):
            return None
        return of_items(dense.tasks[task]["items"], self.tasks[task]["items"], metric)

    def all_flips(self, dense: "Measured", tasks: Sequence[str]) -> Flips | None:
        """Count the answers to all tasks, by acc, that differ from the dense model's; None as for `flips`."""
        return total_flips([one for task in tasks if (one := self.flips(dense, task))])

    def continued(self, dense: "Measured") -> list[Continued]:
        """Return each prompt's continuations by the dense model and this one; empty if they are not comparable."""
        own, other = self.continuations, dense.continuations
        if not comparable(own.get("protocol"), other.get("protocol")):
            return []
        pairs = zip(other.get("prompts", []), own.get("prompts", []), strict=False)  # one may be skipped
        return [_continued(before, after) for before, after in pairs]

    def same_protocol(self, other: "Measured", task: str) -> bool:
        """Whether both models' answers to a task are known and may be compared."""
        return comparable(*(one.tasks.get(task, {}).get("protocol") for one in (self, other)))

    def same_items(self, other: "Measured", task: str) -> tuple[list[bool], list[bool]]:
        """Return both models' answers to their common items; empty if their protocols differ."""
        if not self.same_protocol(other, task):
            return [], []
        mine, theirs = self.answers(task), other.answers(task)
        shared = [item for item in mine if item in theirs]
        return [mine[item] for item in shared], [theirs[item] for item in shared]


def _continued(dense: Json, pruned: Json) -> Continued:
    tokens = dense["tokens"], pruned["tokens"]
    equal = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*tokens, strict=False)))
    repeated = repeated_share(tokens[0]), repeated_share(tokens[1])
    return Continued(dense["prompt"], dense["text"], pruned["text"], equal, max(map(len, tokens)), repeated)


def mean_repeated(pairs: Sequence[Continued], which: int) -> float:
    """Return the mean share of repeated 4-grams over prompts; 0 for the dense model's, 1 for the pruned model's."""
    return sum(pair.repeated[which] for pair in pairs) / len(pairs)


def repeated_share(tokens: Sequence[int]) -> float:
    """Return the share of 4-grams that occurred before: 1 − distinct / all (seq-rep-4, Welleck et al. 2020)."""
    grams = [tuple(tokens[start : start + N]) for start in range(len(tokens) - N + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def mean_layer_error(study: Project) -> float | None:
    """Return the mean layer error of a study's pruned linears; None if it was not measured."""
    linears = load_json(study.details("pruned", "layer_error")).get("linears", {})
    return sum(measures["error"] for measures in linears.values()) / len(linears) if linears else None
