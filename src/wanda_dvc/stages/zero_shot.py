"""Measure zero-shot accuracy: lm-eval's definitions of the tasks, the engine's log-likelihoods."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from wanda_dvc.engine.activations import OUTPUT_HEAD
from wanda_dvc.engine.memory import ModelSizes
from wanda_dvc.errors import notice
from wanda_dvc.reading import DIVERGED
from wanda_dvc.stages import STAGES
from wanda_dvc.stages.inputs import check_ready, runner
from wanda_dvc.stages.needs import announce
from wanda_dvc.stages.process import progress
from wanda_dvc.study.artifact import Work, describe, read_provenance
from wanda_dvc.study.files import Json, load_json, write_csv, write_json
from wanda_dvc.study.folder import ITEMS, Study
from wanda_dvc.study.protocol import first_difference, identity

METRICS = {"acc": "answer", "acc_norm": "answer_norm"}  # the reported ones; an item's key of the chosen answer


def zero_shot(*, study: Study, model: str) -> None:
    """models/{dense,pruned,recovered} + data/tasks → metrics/…/zero_shot.json."""
    provenance, dtype = check_ready(study, model)
    sizes = ModelSizes.read(study.model(model))
    announce(study, "zero-shot", sizes)
    settings = study.stage_input("zero-shot")
    identified = identity(STAGES["zero-shot"].version, provenance, study.model(model))
    # The dense model's answers by task.
    dense = {} if model == "dense" else load_json(study.details("dense", "zero_shot")).get("tasks", {})
    protocols, compared = Json(), list[str]()
    for task in settings["tasks"]:
        items = read_provenance(study.data("tasks") / task, "download tasks")
        described = {key: items[key] for key in ("task", "source", "role", "definition", "sha256", "lm_eval")}
        inputs = {"task": described, "examples": 0, "limit": settings["limit"], "dtype": dtype}
        protocols[task] = describe("zero-shot", libraries=("torch", "transformers", "lm_eval"), **identified, **inputs)
        if task in dense and not items["samples"]:  # the embedded questions are no benchmark
            compared.append(task)
    with study.work(protocols) as work:
        results = answer_tasks(study, model, protocols, work) if protocols else Json()
        details = {task: results[task]["details"] for task in protocols}
        metrics = {task: results[task]["metrics"] for task in protocols}
        for task in compared:
            metrics[task] |= flips(dense[task], details[task], f"zero-shot {model}: {task}")
        write_json(study.details(model, "zero_shot"), {"tasks": details})
        lines = [[task, item["item"], item["acc"]] for task in details for item in details[task]["items"]]
        write_csv(study.plots(f"{model}/zero_shot"), ["task", "item", "acc"], lines)
        # Only numbers to compare: `dvc metrics diff` prints every number in here.
        write_json(study.metrics(model, "zero_shot"), metrics)
        work.discard()


def flips(before: Json, after: Json, run_name: str) -> Json:
    """Return by metric the dense model's answers to a task that pruning changed, in each direction; {} without any."""
    key = first_difference(before["protocol"], after["protocol"])
    if key:
        problem = f"not compared with the dense model's answers, which are of another {key}"
        notice(f"{run_name}: {problem}; run `dvc repro --force --single-item zero-shot-dense`, then this stage")
        return {}
    if not before["items"] or not after["items"]:  # a model diverged
        return {}
    counts = {name: count_flips(before["items"], after["items"], name) for name in METRICS if name in after["items"][0]}
    return {"flips": counts}


def count_flips(before: list[Json], after: list[Json], metric: str) -> dict[str, int]:
    """Count the changed answers to the same items: right → wrong, wrong → right, and one wrong choice → another."""
    counts = {"lost": 0, "gained": 0, "swapped": 0}
    for dense, pruned in zip(before, after, strict=True):
        was_right, is_right = dense[metric] > 0.5, pruned[metric] > 0.5
        if was_right and not is_right:
            counts["lost"] += 1
        elif is_right and not was_right:
            counts["gained"] += 1
        elif not was_right and dense[METRICS[metric]] != pruned[METRICS[metric]]:
            counts["swapped"] += 1
    return counts


def answer_tasks(study: Study, model: str, protocols: Json, work: Work) -> Json:
    """Run the questions of all tasks through a model in one pass; return each task's `details` and `metrics`."""
    from lm_eval.evaluator import evaluate

    from wanda_dvc.engine.harness import EngineLM
    from wanda_dvc.sources.tasks import load_task

    definitions = {}
    for task in protocols:
        folder = study.data("tasks") / task
        items = read_provenance(folder, "download tasks")
        definitions[task] = load_task(items["definition"], items["role"], folder / ITEMS)
    run = runner(study, model, work)
    what, blocks = f"zero-shot {model}, blocks", len(run.decoder.blocks)
    show_progress = partial(progress, total=blocks, what=what, at=lambda step: step.index)
    language_model = EngineLM(study.model(model), run, progress=show_progress)
    # Two draws, the fewest: lm-eval's 100,000 are for errors of F1 scores, which take hours and are not reported.
    limit = study.stage_input("zero-shot")["limit"]
    evaluated = evaluate(language_model, definitions, limit=limit, bootstrap_iters=2)
    not_finite, results = run.progress.first_not_finite or OUTPUT_HEAD, Json()
    for task, definition in definitions.items():
        scores, samples = evaluated["results"][task], evaluated["samples"][task]
        results[task] = _result_of_task(protocols[task], definition, scores, samples, not_finite)
    return results


def _result_of_task(protocol: Json, definition: Any, scores: Json, samples: list[Json], not_finite: str) -> Json:
    """Return a task's `details` and `metrics`; if its answers are not finite, `not_finite` is the first such place."""
    reported = [metric for metric in METRICS if f"{metric},none" in scores]
    answered = [value for sample in samples for value, _ in sample["filtered_resps"]]
    if not all(map(math.isfinite, answered)):  # they are meaningless: a comparison with NaN chooses the first
        details: Json = {"protocol": protocol, "not_finite": not_finite, "items": []}
        return {"details": details, "metrics": dict.fromkeys(reported, DIVERGED)}
    answers = [_answer(sample, definition.doc_to_choice) for sample in samples]
    details = {"protocol": protocol, "items": answers}
    return {"details": details, "metrics": {metric: round(scores[f"{metric},none"], 6) for metric in reported}}


def _answer(sample: dict[str, Any], choices_of: Callable[[Any], list[str]]) -> dict[str, Any]:
    """Return one item's log-likelihoods, the choice with the highest, the right one, and the scores.

    For `acc_norm` also the choice with the highest log-likelihood a character, as lm-eval has it.
    """
    values = [response[0] for response in sample["filtered_resps"]]
    answer = max(range(len(values)), key=values.__getitem__)
    content = {"item": sample["doc_id"], "loglikelihoods": values, "answer": answer}
    if "acc_norm" in sample:
        by_character = []
        for value, choice in zip(values, choices_of(sample["doc"]), strict=True):
            by_character.append(value / len(choice) if choice else -math.inf)  # HellaSwag's may be empty
        content["answer_norm"] = max(range(len(by_character)), key=by_character.__getitem__)
    content["gold"] = sample["target"]
    return content | {metric: sample[metric] for metric in METRICS if metric in sample}
