"""What is embedded is what its page says."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, script

EMBEDDED = ROOT / "src/wanda_dvc/embedded"
TASKS = {
    "piqa": ("baber/piqa/validation", {"goal", "sol1", "sol2", "label"}, lambda row: row["label"], 2),
    "hellaswag": (
        "Rowan/hellaswag/validation",
        {"ind", "activity_label", "ctx_a", "ctx_b", "ctx", "endings", "source_id", "split", "split_type", "label"},
        lambda row: row["label"],
        4,
    ),
    "arc_easy": (
        "allenai/ai2_arc/ARC-Easy/test",
        {"id", "question", "choices", "answerKey"},
        lambda row: row["answerKey"],
        4,
    ),
    "boolq": ("aps/super_glue/boolq/validation", {"question", "passage", "idx", "label"}, lambda row: row["label"], 2),
    "rte": ("nyu-mll/glue/rte/validation", {"sentence1", "sentence2", "label", "idx"}, lambda row: row["label"], 2),
}


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("task", TASKS)
def test_samples_are_balanced_and_in_the_benchmarks_schema(task: str):
    place, columns, gold, answers = TASKS[task]
    items = rows(EMBEDDED / "tasks" / f"{place}.jsonl")
    assert len(items) >= 40
    assert all(set(item) == columns for item in items)
    counts = Counter(gold(item) for item in items)
    assert set(counts.values()) == {len(items) // answers}
    assert len({json.dumps({k: v for k, v in item.items() if k not in ("idx", "id", "ind")}) for item in items}) == len(
        items
    )


def test_the_two_texts_share_no_passage():
    made = script("embedded_text")
    train, test = (
        set().union(*(made.passages(row["text"]) for row in rows(EMBEDDED / "text" / f"{split}.jsonl")))
        for split in ("train", "test")
    )
    assert len(train) > 1000
    assert len(test) > 1000
    assert not train & test
