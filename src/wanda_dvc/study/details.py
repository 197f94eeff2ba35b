"""Reads metrics/details/*.json, and refuses content that no stage writes. Keys that no view reads are free."""

import math
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from wanda_dvc.errors import UserError
from wanda_dvc.reading import DIVERGED, problems_of
from wanda_dvc.study.files import Json, load_json, load_numbers

DROPPED = "dropped"  # the tokens after the last complete window
Finite = Annotated[float, Field(allow_inf_nan=False)]
Number = Annotated[Finite, BeforeValidator(lambda value: 0 if value == DIVERGED else value)]


class Details(BaseModel):
    """A file of details, or a part of one."""

    model_config = ConfigDict(strict=True)


class Protocol(Details):
    """The inputs of a layer error."""

    model: Any


class Text(Details):
    """A text for perplexity."""

    source: str
    sha256: str


class Windows(Details):
    """The windows of a perplexity."""

    windows: Annotated[int, Field(ge=1)]
    length: Annotated[int, Field(ge=2)]
    rest: Any
    text: Text
    dtype: str

    @field_validator("rest")
    @classmethod
    def _rest_is_a_window(cls, rest: Any) -> Any:
        if rest == DROPPED or (isinstance(rest, int) and rest >= 2):
            return rest
        raise ValueError(f"found {rest!r:.60}, expected {DROPPED}, or 2 tokens or more")


class Perplexity(Details):
    """A perplexity: the loss of each window, and its divergence."""

    protocol: Windows
    losses: list[Number] = []
    not_finite: str = ""

    @model_validator(mode="after")
    def _a_loss_for_each_window(self) -> "Perplexity":
        expected = self.protocol.windows + (self.protocol.rest != DROPPED)
        if self.losses and len(self.losses) != expected:
            raise ValueError(f"losses: found {len(self.losses)}, expected {expected}")
        return self


class TaskDigest(Details):
    """A task's items."""

    sha256: str


class TaskProtocol(Details):
    """The inputs of a task's results."""

    task: TaskDigest


class Item(Details):
    """The answer to an item."""

    item: int
    acc: Finite
    acc_norm: Finite = 0
    answer: int = 0
    answer_norm: int = 0


class Task(Details):
    """The answers to a task."""

    protocol: TaskProtocol
    items: list[Item]
    standard_errors: dict[str, Finite] = {}
    not_finite: str = ""


class ZeroShot(Details):
    """The answers to all tasks."""

    tasks: dict[str, Task]


class Linear(Details):
    """The layer errors of a linear, and its damping."""

    error: Finite
    masked: Finite
    damping: Finite = 0
    raised: bool = False


class LayerError(Details):
    """The layer errors of all linears."""

    protocol: Protocol
    linears: dict[str, Linear]


class Continuation(Details):
    """A prompt with its continuation."""

    prompt: str
    text: str
    tokens: list[int]


class Continuations(Details):
    """The continuations of all prompts, or the reason to skip them."""

    protocol: dict[str, Any]
    prompts: list[Continuation] = []
    skipped: str = ""


SHAPES: dict[str, tuple[type[Details], str]] = {  # and the stage that writes it
    "perplexity": (Perplexity, "perplexity"),
    "zero_shot": (ZeroShot, "zero-shot"),
    "layer_error": (LayerError, "apply"),
    "continuations": (Continuations, "zero-shot"),
}


def is_of(content: Json, model: str) -> bool:
    """Whether details are of a model, by its digest; unknown models match."""
    every = [content, *content.get("tasks", {}).values()]
    return all(one.get("protocol", {}).get("model", model) == model for one in every)


def load_measured(metrics: Path, details: Path) -> tuple[Json, Json]:
    """Read the metrics and the details of a perplexity or of the tasks; empty objects if missing.

    Metrics that do not follow from their details are left out: after `git checkout` without `dvc checkout` the two are
    of two experiments.
    """
    numbers, content = load_numbers(metrics), load_details(details)
    if "tasks" in content:
        return {task: one for task, one in numbers.items() if _agree(one, content["tasks"].get(task, {}))}, content
    return numbers if _agree(numbers, content) else {}, content


def _agree(numbers: Json, content: Json) -> bool:
    """Whether the metrics of a text or a task follow from their details, as far as these are known."""
    if items := content.get("items"):
        return math.isclose(numbers["acc"], sum(item["acc"] for item in items) / len(items), abs_tol=1e-5)
    losses, perplexity = content.get("losses"), numbers.get("perplexity")
    if not losses or perplexity is None or DIVERGED in (perplexity, *losses):
        return True
    protocol = content["protocol"]
    rest = [] if protocol["rest"] == DROPPED else [protocol["rest"] - 1]
    counts = [protocol["length"] - 1] * protocol["windows"] + rest
    mean = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    return math.isclose(math.log(perplexity), mean, abs_tol=1e-4)


def load_details(path: Path) -> Json:
    """Read a file of metrics/details; return an empty object if it is missing. UserError if it is damaged."""
    content, name = load_json(path), path.parent.name if path.parent.name in SHAPES else path.stem
    if content and name in SHAPES:
        shape, stage = SHAPES[name]
        try:
            shape.model_validate(content)
        except ValidationError as error:
            raise UserError(next(problems_of(error, str(path), f"run `wanda-dvc {stage}` again"))) from None
    return content
