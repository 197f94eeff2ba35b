"""Ask a model multiple-choice questions, through lm-eval's own definitions of the tasks."""

import json
import logging
from pathlib import Path
from typing import Any

from wanda_dvc.artifacts import ITEMS, Project, describe, digest, read_provenance, tokenizer_digest, write_json
from wanda_dvc.stages import STAGES, device_name

METRICS = ("acc", "acc_norm")


def zero_shot(*, project: Project, model: str, task: str) -> None:
    """models/{dense,pruned} + data/tasks/TASK → metrics/{dense,pruned}/zero_shot/TASK.json"""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every data set that is no Hub id
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    params, folder = project.params, project.model(model)
    items = read_provenance(project.data("tasks") / task, "download tasks")
    made_by = "download model" if model == "dense" else "apply"
    protocol = describe(
        "zero-shot",
        version=STAGES["zero-shot"],
        libraries=("torch", "transformers", "lm_eval"),
        model=digest(read_provenance(folder, made_by)),
        tokenizer_sha256=tokenizer_digest(folder),
        task={key: items[key] for key in ("task", "source", "role", "sha256", "lm_eval")},
        examples=0,
        limit=params.zero_shot.limit,
        dtype=params.dtype,
    )
    language_model = HFLM(
        pretrained=str(folder),
        dtype=params.dtype,
        device=device_name(params.runtime),
        batch_size=params.runtime.batch_size,
    )
    definition = load_task(items["definition"], items["role"], project.data("tasks") / task / ITEMS)
    evaluated = evaluate(language_model, {task: definition}, limit=params.zero_shot.limit)
    result = evaluated["results"][task]
    numbers = {}
    for metric in METRICS:
        if f"{metric},none" in result:
            numbers[metric] = round(result[f"{metric},none"], 6)
            numbers[f"{metric}_stderr"] = round(result[f"{metric}_stderr,none"], 6)
    answers = [_answer(sample) for sample in evaluated["samples"][task]]
    write_json(project.details(model, f"zero_shot/{task}"), {"protocol": protocol, "items": answers})
    write_json(project.metrics(model, f"zero_shot/{task}"), numbers)


def load_task(definition: str, role: str, items: Path) -> Any:
    """lm-eval's task, on items from a file: its own YAML, with every split but the one in that role taken out."""
    import lm_eval.tasks
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    rows = [json.loads(line) for line in items.read_text(encoding="utf-8").splitlines()]
    config = load_yaml(Path(lm_eval.tasks.__file__).parent / definition)
    config |= {f"{name}_split": role if name == role else None for name in ("training", "validation", "test")}
    config |= {"custom_dataset": lambda **_: {role: Dataset.from_list(rows)}, "num_fewshot": 0}
    return ConfigurableTask(config=config)


def _answer(sample: dict[str, Any]) -> dict[str, Any]:
    """One item's answer: its log-likelihood for each choice, the choice it takes, the right one, and the scores."""
    choices = [response[0] for response in sample["filtered_resps"]]
    return {
        "item": sample["doc_id"],
        "loglikelihoods": choices,
        "answer": max(range(len(choices)), key=choices.__getitem__),
        "gold": sample["target"],
        **{metric: sample[metric] for metric in METRICS if metric in sample},
    }
