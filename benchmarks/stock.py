"""Time stock lm-eval on the same items and task definitions: (b), the baseline of zero-shot."""

import argparse
import json
import logging
import time
from pathlib import Path
from typing import Any

from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from processes import say

from wanda_dvc.sources.tasks import load_task

BEGAN = time.perf_counter()  # after imports, as the clock of a stage


def needed(model: Any, samples: list[dict[str, Any]]) -> list[list[Any]]:
    """Return the tokens of each question's distinct contexts, each with the tokens of its choices."""
    questions = []
    for sample in samples:
        contexts: dict[tuple[int, ...], list[int]] = {}
        for argument in sample["arguments"]:
            context, choice = model._encode_pair(*argument)
            contexts.setdefault(tuple(context), []).append(len(choice))
        questions.append([[len(context), choices] for context, choices in contexts.items()])
    return questions


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("tasks", nargs="+")
    parser.add_argument("--data", type=Path, required=True, help="the project's data/tasks")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, nargs="+", default=[16], help="several: the fastest on --part is used")
    parser.add_argument("--part", type=int, default=20, help="items a task to find the best batch size on")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--result", type=Path, required=True)
    words = parser.parse_args()

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    model = HFLM(pretrained=words.model, dtype=words.dtype, device="cpu", batch_size=words.batch[0])
    before = time.perf_counter() - BEGAN  # to load the model

    def run(task: str, limit: int | None) -> tuple[float, list[dict[str, Any]]]:
        began = time.perf_counter()
        made = json.loads((words.data / task / "provenance.json").read_text())
        definition = load_task(made["definition"], made["role"], words.data / task / "items.jsonl")
        samples = evaluate(model, {task: definition}, limit=limit)["samples"][task]
        return time.perf_counter() - began, samples

    tried: dict[int, float] = {}
    if len(words.batch) > 1:
        run(words.tasks[0], 2)  # the first run is slower
        for batch in words.batch:
            model.batch_size_per_gpu = batch
            tried[batch] = sum(run(task, words.part)[0] for task in words.tasks)
            say(f"stock lm-eval, batch {batch}: {tried[batch]:.1f} s on {words.part} items a task")
        words.batch = [min(tried, key=tried.__getitem__)]
    model.batch_size_per_gpu = words.batch[0]
    result: dict[str, Any] = {"batch": words.batch[0], "tried": tried, "before_s": before, "tasks": {}}
    for task in words.tasks:
        seconds, samples = run(task, words.limit)
        result["tasks"][task] = {
            "seconds": seconds,
            "loglikelihoods": [[response[0] for response in sample["filtered_resps"]] for sample in samples],
            "needed": needed(model, samples),
        }
        say(f"stock lm-eval, {task}: {seconds:.1f} s")
    result["seconds"] = before + sum(task["seconds"] for task in result["tasks"].values())
    words.result.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
