"""Rows of tasks that `download tasks` must refuse, or take and report."""

from typing import Any

from cases import REMOVED, dotted

RIGHT: dict[str, dict[str, Any]] = {
    "piqa": {"goal": "g", "sol1": "a", "sol2": "b", "label": 1},
    "hellaswag": {"activity_label": "x", "ctx_a": "a", "ctx_b": "", "endings": ["a", "b", "c"], "label": "2"},
    "arc_easy": {"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"},
    "boolq": {"passage": "p", "question": "q", "label": 0},
    "rte": {"sentence1": "a", "sentence2": "b", "label": 1},
    "winogrande": {"sentence": "a _ b", "option1": "a", "option2": "b", "answer": "1"},
    "openbookqa": {"question_stem": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"},
}
# The task, the field, its wrong value, and a part of the message.
WRONG: list[tuple[str, str, object, str]] = [
    *((task, "label", value, "label: found") for task in ("piqa", "boolq", "rte") for value in (-1, 2, "1", 0.5, None)),
    *((task, "label", True, "label: found True") for task in ("piqa", "boolq", "rte")),
    *((task, field, REMOVED, f"{field}: missing") for task, row in RIGHT.items() for field in row),
    *((task, field, [], f"{field}: found []") for task, row in RIGHT.items() for field in row if field != "endings"),
    *(("piqa", field, "", f"{field}: found ''") for field in ("sol1", "sol2")),
    *(("hellaswag", "label", value, "label") for value in (-1, 3, "3", "", "x", "1.0", 1.5)),
    ("hellaswag", "endings", ["a"], "endings: found ['a']"),
    ("hellaswag", "endings", ["a", 3, "c"], "endings.1: found 3"),
    ("hellaswag", "endings", ["a", "", "c"], "endings.1: found ''"),
    ("arc_easy", "answerKey", "C", "answerKey C, expected one of A, B"),
    ("arc_easy", "answerKey", "", "answerKey: found ''"),
    ("arc_easy", "choices.label", ["A", "A"], "labels A, A, expected another one"),
    ("arc_easy", "choices.label", ["A"], "labels A, expected another one"),
    ("arc_easy", "choices.text", ["a"], "choices.text: found ['a']"),
    ("arc_easy", "choices.text", ["a", None], "choices.text.1: found None"),
    ("arc_easy", "choices", "a", "choices: found 'a'"),
    ("openbookqa", "answerKey", "Z", "answerKey Z, expected one of A, B"),
    ("winogrande", "sentence", "no gap", "sentence: found 'no gap'"),
    ("winogrande", "answer", "0", "answer: found '0'"),
    ("winogrande", "answer", 1, "answer: found 1"),
]
ODD: list[tuple[str, list[dict[str, Any]], str]] = [
    ("piqa", [RIGHT["piqa"], RIGHT["piqa"]], "line 2 as line 1"),
    ("piqa", [dotted(RIGHT["piqa"], "sol2", "a")], "line 1 with equal choices"),
    ("arc_easy", [dotted(RIGHT["arc_easy"], "choices.text", ["a", "a"])], "line 1 with equal choices"),
    ("sciq", [{"a": 1}, {"b": 2}, {"a": 1}], "line 3 as line 1"),
]
