"""Items of zero-shot tasks: each has a label among its choices, by lm-eval's own definition."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cases.grids import thinned

from wanda_dvc.errors import UserError
from wanda_dvc.sources.tasks import load_task
from wanda_dvc.stages.download import download
from wanda_dvc.study.project import Project

REMOVED = object()  # in place of a value
RIGHT: dict[str, dict[str, Any]] = {
    "piqa": {"goal": "g", "sol1": "a", "sol2": "b", "label": 1},
    "hellaswag": {"activity_label": "x", "ctx_a": "a", "ctx_b": "", "endings": ["a", "b", "c"], "label": "2"},
    "arc_easy": {"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"},
    "boolq": {"passage": "p", "question": "q", "label": 0},
    "rte": {"sentence1": "a", "sentence2": "b", "label": 1},
    "winogrande": {"sentence": "a _ b", "option1": "a", "option2": "b", "answer": "1"},
    "openbookqa": {"question_stem": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"},
}
DEFINITIONS = {
    "piqa": "piqa/piqa.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "rte": "glue/rte/default.yaml",
    "winogrande": "winogrande/default.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
}
# The task, the field, and its wrong value.
WRONG: list[tuple[str, str, object]] = [
    *((task, "label", value) for task in ("piqa", "boolq", "rte") for value in (-1, 2, "1", 0.5, None)),
    *((task, field, REMOVED) for task, row in RIGHT.items() for field in row),
    *(("hellaswag", "label", value) for value in (-1, 3, "3", "", "x", "1.0", 1.5)),
    *(("arc_easy", "answerKey", value) for value in ("C", "", None)),
    ("arc_easy", "choices.text", ["a"]),
    ("openbookqa", "answerKey", "Z"),
    *(("winogrande", "answer", value) for value in ("0", 1, None)),
]


def changed(row: dict[str, Any], field: str, value: object) -> dict[str, Any]:
    """An item with another value of a field, or without it."""
    first, _, rest = field.partition(".")
    if rest:
        return row | {first: changed(row[first], rest, value)}
    return {key: old for key, old in row.items() if key != first} | ({} if value is REMOVED else {first: value})


@pytest.mark.parametrize(("task", "field", "value"), thinned(WRONG, 3))
def test_an_item_without_a_label_among_its_choices_is_refused(task: str, field: str, value: object, tmp_path: Path):
    """lm-eval alone counts it as a wrong answer, or crashes."""
    right, path = RIGHT[task], tmp_path / "items.jsonl"
    lines = [right, right, changed(right, field, value)]
    path.write_text("".join(json.dumps(row) + "\n" for row in lines[:2]), encoding="utf-8")
    assert len(load_task(DEFINITIONS[task], "validation", path).eval_docs) == 2
    path.write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")
    with pytest.raises(UserError, match=rf"^{re.escape(str(path))}: .*; run `wanda-dvc download tasks` again"):
        load_task(DEFINITIONS[task], "validation", path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (json.dumps(RIGHT["piqa"] | {"label": -1}), "item 1: label -1, expected one of 2 choices; correct that file"),
        ('{"goal": "g", "sol1": "a", "sol2": "b"}', "item 1: label .*, expected one of 2 choices; correct that file"),
        ("", "no items, expected one a line; correct that file"),
    ],
)
def test_download_refuses_wrong_items(content: str, says: str, project: Callable[..., Project], tmp_path: Path):
    place = tmp_path / "mirror/baber/piqa/validation.jsonl"
    place.parent.mkdir(parents=True)
    place.write_text(content + "\n", encoding="utf-8")
    made = project(tasks__source="benchmark", tasks__names=["piqa"], runtime__mirror=str(tmp_path / "mirror"))
    with pytest.raises(UserError, match=rf"validation\.jsonl: {says}"):
        download(project=made, part="tasks")
    assert not (tmp_path / "data").exists()
