"""Zero-shot: items and their labels, the embedded ones, one pass a model, and texts."""

import csv
import importlib
import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from cases import REMOVED, dotted
from conftest import Capture, Make, Patch, fetch, interrupted, write_params

from wanda_dvc.engine.forward import BlockStep, ModelRunner
from wanda_dvc.errors import UserError
from wanda_dvc.sources import EMBEDDED_FOLDER
from wanda_dvc.sources.tasks import load_task
from wanda_dvc.stages import run
from wanda_dvc.stages.download import download
from wanda_dvc.stages.zero_shot import flips, zero_shot
from wanda_dvc.study.artifact import write_provenance
from wanda_dvc.study.files import Json, load_json, write_json
from wanda_dvc.study.folder import Study

stage: Any = importlib.import_module("wanda_dvc.stages.zero_shot")

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
    "piqa": "piqa/piqa.yaml", "hellaswag": "hellaswag/hellaswag.yaml", "arc_easy": "arc/arc_easy.yaml",
    "boolq": "super_glue/boolq/default.yaml", "rte": "glue/rte/default.yaml",
    "winogrande": "winogrande/default.yaml", "openbookqa": "openbookqa/openbookqa.yaml",
}  # fmt: skip
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


@pytest.mark.parametrize(("task", "field", "value"), WRONG)
def test_an_item_without_a_label_among_its_choices_is_refused(task: str, field: str, value: object, tmp_path: Path):
    """lm-eval alone counts it as a wrong answer, or crashes."""
    right, path = RIGHT[task], tmp_path / "items.jsonl"
    lines = [right, right, dotted(right, field, value)]
    path.write_text("".join(json.dumps(row) + "\n" for row in lines[:2]), encoding="utf-8")
    assert len(load_task(DEFINITIONS[task], "validation", path).eval_docs) == 2
    path.write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")
    with pytest.raises(UserError, match=rf"^{re.escape(str(path))}: .*; run `wanda-dvc download tasks` again"):
        load_task(DEFINITIONS[task], "validation", path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (
            json.dumps(RIGHT["piqa"] | {"label": -1}),
            "item 1: label -1, expected one of 2 choices; correct that file, or",
        ),
        ('{"goal": "g", "sol1": "a", "sol2": "b"}', "item 1: label .*, expected one of 2 choices; correct that file"),
        ("", "no items, expected one a line; correct that file"),
    ],
)
def test_download_refuses_wrong_items(content: str, says: str, study: Make, tmp_path: Path):
    place = tmp_path / "mirror/baber/piqa/validation.jsonl"
    place.parent.mkdir(parents=True)
    place.write_text(content + "\n", encoding="utf-8")
    made = study(tasks__source="benchmark", tasks__names=["piqa"], runtime__mirror=str(tmp_path / "mirror"))
    with pytest.raises(UserError, match=rf"validation\.jsonl: {says}"):
        download(study=made, source="tasks")
    assert not (tmp_path / "data").exists()


# The file, its columns, the one of the right answer, and the number of answers.
TASKS = {
    "piqa": ("baber/piqa/validation", {"goal", "sol1", "sol2", "label"}, "label", 2),
    "hellaswag": (
        "Rowan/hellaswag/validation",
        {"ind", "activity_label", "ctx_a", "ctx_b", "ctx", "endings", "source_id", "split", "split_type", "label"},
        "label", 4,
    ),
    "arc_easy": ("allenai/ai2_arc/ARC-Easy/test", {"id", "question", "choices", "answerKey"}, "answerKey", 4),
    "boolq": ("aps/super_glue/boolq/validation", {"question", "passage", "idx", "label"}, "label", 2),
    "rte": ("nyu-mll/glue/rte/validation", {"sentence1", "sentence2", "label", "idx"}, "label", 2),
}  # fmt: skip


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("task", TASKS)
def test_samples_are_balanced_and_in_the_benchmarks_schema(task: str):
    place, columns, gold, answers = TASKS[task]
    items = rows(EMBEDDED_FOLDER / "tasks" / f"{place}.jsonl")
    assert len(items) >= 40
    assert all(set(item) == columns for item in items)
    asked = load_task(DEFINITIONS[task], place.rpartition("/")[2], EMBEDDED_FOLDER / "tasks" / f"{place}.jsonl")
    docs = list(asked.eval_docs)
    assert len(docs) == len(items)
    assert all(0 <= asked.doc_to_target(doc) < len(asked.doc_to_choice(doc)) for doc in docs)
    assert all(asked.doc_to_text(doc).strip() for doc in docs)
    counts = Counter(item[gold] for item in items)
    assert set(counts.values()) == {len(items) // answers}
    distinct = {json.dumps({k: v for k, v in item.items() if k not in ("idx", "id", "ind")}) for item in items}
    assert len(distinct) == len(items)


def passages(text: str) -> set[str]:
    """The paragraphs and sentences of a text that are long enough to identify it."""
    paragraphs = {" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text)}
    sentences = set(re.split(r"(?<=[.:])\s+", " ".join(text.split())))
    return {p for p in paragraphs if len(p) >= 40} | {s for s in sentences if len(s) > 60}


def test_the_two_texts_share_no_passage():
    """Perplexity is never measured on a passage of the calibration text, though many topics are excerpts of others."""
    texts = [rows(EMBEDDED_FOLDER / "text" / f"{split}.jsonl") for split in ("train", "test")]
    train, test = (set().union(*(passages(row["text"]) for row in text)) for text in texts)
    assert min(len(train), len(test)) > 1000
    assert not train & test


THREE = ["piqa", "rte", "arc_easy"]


@pytest.fixture
def calibrated_study(study: Make) -> Study:
    """A study of three tasks, whose dense model has not been asked yet."""
    return fetch(study(tasks__names=THREE), "model", "tasks")


def results(study: Study, tasks: list[str]) -> dict[str, bytes]:
    """What a run for these tasks publishes."""
    write_params(study.root, study.params.model, tasks__names=tasks)
    run("zero-shot", study=Study(study.root), variant="dense")
    metrics, details = study.metrics("dense", "zero_shot"), study.details("dense", "zero_shot")
    plotted = csv.DictReader(study.plots("dense/zero_shot").read_text().splitlines())
    answers = [item["acc"] for task in load_json(details)["tasks"].values() for item in task["items"]]
    assert [float(row["acc"]) for row in plotted] == answers
    assert list(load_json(metrics)) == list(load_json(details)["tasks"]) == tasks
    return {path.name: path.read_bytes() for path in (metrics, details, study.plots("dense/zero_shot"))}


def test_one_pass_answers_all_tasks_and_a_tasks_answers_do_not_depend_on_the_others(calibrated_study: Study):
    with mock.patch.object(ModelRunner, "forward", autospec=True, side_effect=ModelRunner.forward) as passes:
        results(calibrated_study, THREE)
    ((_, sequences),) = (call.args for call in passes.call_args_list)  # the model's blocks are loaded once for all
    assert list(dict.fromkeys(sequence.task for sequence in sequences)) == THREE
    details = load_json(calibrated_study.details("dense", "zero_shot"))["tasks"]
    for task in THREE:
        results(calibrated_study, [task])
        assert load_json(calibrated_study.details("dense", "zero_shot"))["tasks"] == {task: details[task]}
    assert not [path for path in calibrated_study.work_root.iterdir() if path.is_dir()]


def test_an_interrupted_pass_resumes_at_its_block(calibrated_study: Study, capsys: Capture):
    full = results(calibrated_study, THREE)
    calibrated_study.metrics("dense", "zero_shot").unlink(missing_ok=True)
    with interrupted(BlockStep, "run", at=2):
        results(calibrated_study, THREE)
    assert not calibrated_study.metrics("dense", "zero_shot").exists()
    with mock.patch.object(BlockStep, "run", autospec=True, side_effect=BlockStep.run) as runs:
        assert results(calibrated_study, THREE) == full
    assert [call.args[0].index for call in runs.call_args_list] == [2, 3]
    assert "resuming after 2 of 4 blocks" in capsys.readouterr().err
    assert not [path for path in calibrated_study.work_root.iterdir() if path.is_dir()]


CHANGED = [{"model": "another"}, {"dense": "another"}, {"dtype": "float64"}, {"limit": 3}, {"examples": 5}]
CHANGED += [{"libraries": {"torch": "1.0"}}, {"libraries": {"lm_eval": "0.1"}}, {"task": {"sha256": "another"}}]


def answers(*choices: int, **changes: Any) -> Json:
    """A task's details: the first choice is right; of equal lengths, the last two choices are one for acc_norm."""
    protocol = {"model": "x", "dense": "x", "task": {"sha256": "x"}, "dtype": "float32", "limit": 5, "examples": 0}
    items = []
    for number, choice in enumerate(choices):
        right = float(choice == 0)
        items.append({"item": number, "answer": choice, "acc": right, "answer_norm": min(choice, 1), "acc_norm": right})
    return {"protocol": protocol | changes, "items": items}


BEFORE, AFTER = (0, 0, 0, 1, 1), (0, 1, 1, 0, 2)


def test_changed_answers_are_counted_by_direction():
    counts = {"acc": {"lost": 2, "gained": 1, "swapped": 1}, "acc_norm": {"lost": 2, "gained": 1, "swapped": 0}}
    assert flips(answers(*BEFORE), answers(*AFTER), "") == {"flips": counts}
    assert flips(answers(), answers(*AFTER), "") == flips(answers(*BEFORE), answers(), "") == {}  # diverged


@pytest.mark.parametrize("change", CHANGED, ids=str)
def test_answers_to_something_else_are_not_compared(change: Json, capsys: Capture):
    """Another dense model, dtype, limit, item or version of a library; every dense model is another than the pruned."""
    (key,) = change
    assert bool(flips(answers(*BEFORE, **change), answers(*AFTER), "zero-shot recovered: piqa")) is (key == "model")
    report = f"zero-shot recovered: piqa: not compared with the dense model's answers, which are of another {key}; run"
    assert (report in capsys.readouterr().err) is (key != "model")


@pytest.mark.parametrize("samples", [True, False])
def test_changed_answers_are_metrics_of_real_tasks(samples: bool, study: Make, monkeypatch: Patch):
    """`dvc metrics diff` shows them; the embedded questions are no benchmark."""
    measured = fetch(study(tasks__names=["piqa"]), "model", "tasks")
    shutil.copytree(measured.model("dense"), measured.model("pruned"))
    dense = load_json(measured.model("dense") / "provenance.json")
    write_provenance(measured.model("pruned"), {"made_by": "apply", "model": dense})
    items = load_json(measured.data("tasks") / "piqa/provenance.json")
    write_provenance(measured.data("tasks") / "piqa", items | {"samples": samples})
    write_json(measured.details("dense", "zero_shot"), {"tasks": {"piqa": answers(*BEFORE)}})
    results = {"details": answers(*AFTER), "metrics": {"acc": 0.4}}
    monkeypatch.setattr(stage, "answer_tasks", lambda *_: {"piqa": results})
    zero_shot(study=measured, model="pruned")
    assert ("flips" in load_json(measured.metrics("pruned", "zero_shot"))["piqa"]) is not samples


def test_the_error_of_a_score_that_is_not_reported_costs_two_draws(tmp_path: Path, tiny: Path, monkeypatch: Patch):
    """lm-eval's default, 100,000 resamples of F1, takes hours for QQP."""
    place = tmp_path / "mirror/nyu-mll/glue/mrpc/validation.jsonl"
    place.parent.mkdir(parents=True)
    rows = [{"sentence1": "a", "sentence2": "b", "label": label} for label in (0, 1, 1)]
    place.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    source = {"tasks__source": "benchmark", "runtime__mirror": str(tmp_path / "mirror")}
    write_params(tmp_path, tiny, tasks__names=["mrpc"], **source)
    made, draw = fetch(Study(tmp_path), "model", "tasks"), mock.Mock(return_value=0.0)
    monkeypatch.setattr("lm_eval.api.metrics.bootstrap_stderr", draw)
    zero_shot(study=made, model="dense")
    assert draw.call_args.kwargs == {"iters": 2}
    assert load_json(made.details("dense", "zero_shot"))["tasks"]["mrpc"]["items"]


def test_an_empty_choice_is_never_the_likeliest_a_character():
    sample = {"doc_id": 0, "doc": {}, "target": 1, "filtered_resps": [(-1.0, False), (-9.0, False)], "acc_norm": 1.0}
    assert stage._answer(sample, lambda _: ["", "ab"])["answer_norm"] == 1
    assert stage._answer(sample, lambda _: ["aa", "€" * 10])["answer_norm"] == 0  # of characters, not of bytes
