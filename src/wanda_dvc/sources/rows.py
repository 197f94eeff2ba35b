"""Schemas of the rows of known tasks. A row outside them would crash lm-eval, or change accuracy without a message."""

import json
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from wanda_dvc.errors import UserError, notice
from wanda_dvc.reading import problems_of

SHOWN = 5  # problems in one message
Text = Annotated[str, Field(min_length=1)]
Binary = Annotated[int, Field(ge=0, le=1)]


def _number(label: object) -> object:
    """Return the number of a label that is written as text."""
    return int(label) if isinstance(label, str) and label.isdecimal() else label


class Row(BaseModel):
    """The fields of a row that lm-eval reads; other fields are free."""

    model_config = ConfigDict(strict=True)

    def choices_of(self) -> list[str]:
        """Return the texts of the choices, if the row has them."""
        return []


class Piqa(Row):
    """PIQA: two solutions."""

    goal: str
    sol1: Text
    sol2: Text
    label: Binary

    def choices_of(self) -> list[str]:
        """Return the solutions."""
        return [self.sol1, self.sol2]


class Hellaswag(Row):
    """HellaSwag: endings, and the place of the right one; the Hub has it as text."""

    activity_label: str
    ctx_a: str
    ctx_b: str
    endings: Annotated[list[Text], Field(min_length=2)]
    label: Annotated[int, Field(ge=0), BeforeValidator(_number)]

    @model_validator(mode="after")
    def _label_is_an_ending(self) -> "Hellaswag":
        if self.label >= len(self.endings):
            raise ValueError(f"label {self.label}, expected one of {len(self.endings)} endings")
        return self

    def choices_of(self) -> list[str]:
        """Return the endings."""
        return self.endings


class Choices(BaseModel):
    """Texts with labels, such as A to D."""

    model_config = ConfigDict(strict=True)

    text: Annotated[list[Text], Field(min_length=2)]
    label: list[Text]


class Arc(Row):
    """ARC: choices with labels, and the label of the right one."""

    question: Text
    choices: Choices
    answerKey: Text  # noqa: N815 - the data set's name

    @model_validator(mode="after")
    def _labels_name_choices(self) -> "Arc":
        labels = self.choices.label
        if len(labels) != len(self.choices.text) or len(set(labels)) != len(labels):
            raise ValueError(f"labels {', '.join(labels)}, expected another one for each of the choices")
        if self.answerKey.strip() not in labels:
            raise ValueError(f"answerKey {self.answerKey}, expected one of {', '.join(labels)}")
        return self

    def choices_of(self) -> list[str]:
        """Return the texts of the choices."""
        return self.choices.text


class OpenBookQA(Arc):
    """OpenBookQA: as ARC, with another name of the question."""

    question: str = ""
    question_stem: Text


class Boolq(Row):
    """BoolQ: a passage and a question about it."""

    passage: str
    question: Text
    label: Binary


class Rte(Row):
    """RTE: whether one sentence follows from another."""

    sentence1: Text
    sentence2: Text
    label: Binary


class Winogrande(Row):
    """WinoGrande: a sentence with a gap, and two options for it."""

    sentence: Annotated[str, Field(pattern="_")]
    option1: Text
    option2: Text
    answer: Annotated[str, Field(pattern="^[12]$")]

    def choices_of(self) -> list[str]:
        """Return the options."""
        return [self.option1, self.option2]


ROWS: dict[str, type[Row]] = {
    "arc_challenge": Arc,
    "arc_easy": Arc,
    "boolq": Boolq,
    "hellaswag": Hellaswag,
    "openbookqa": OpenBookQA,
    "piqa": Piqa,
    "rte": Rte,
    "winogrande": Winogrande,
}


def check_rows(task: str, rows: Iterable[tuple[str, Any]]) -> int:
    """Check the rows of a task, each with its place, and return their number. UserError with the first problems.

    Real benchmarks hold equal choices (7 rows of ARC-Easy), so these and repeated rows are reported and kept.
    """
    schema, problems = ROWS.get(task, Row), list[str]()
    first, odd, count = dict[str, str](), list[str](), 0
    for where, row in rows:
        count += 1
        try:
            choices = schema.model_validate(row).choices_of()
        except ValidationError as error:
            problems += problems_of(error, where, "correct that row")
            continue
        if len(set(choices)) < len(choices):
            odd.append(f"{_place(where)} with equal choices")
        if (before := first.setdefault(json.dumps(row, sort_keys=True, default=str), where)) != where:
            odd.append(f"{_place(where)} as {_place(before)}")
    if problems:
        more = [f"{task}: {len(problems) - SHOWN} more problems of rows; correct them"] if len(problems) > SHOWN else []
        raise UserError(*problems[:SHOWN], *more)
    if odd:
        notice(f"download tasks: {task}: {len(odd)} odd rows, kept: {'; '.join(odd[:SHOWN])}")
    return count


def _place(where: str) -> str:
    """Return the line or row of a place."""
    return where.rpartition(": ")[2]
