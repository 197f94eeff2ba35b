"""Ask a model multiple-choice questions: lm-eval's own definitions of the tasks, our engine's log-likelihoods."""

import json
import logging
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lm_eval.tasks
from datasets import Dataset
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks._yaml_loader import load_yaml

from wanda_dvc.engine.decoder import Decoder, Step
from wanda_dvc.engine.questions import Request, loglikelihoods
from wanda_dvc.engine.windows import load_tokenizer
from wanda_dvc.stages import STAGES, progress
from wanda_dvc.stages.calibrate import open_decoder
from wanda_dvc.study.files import write_json
from wanda_dvc.study.project import ITEMS, Project
from wanda_dvc.study.provenance import describe, digest, read_provenance, tokenizer_digest

METRICS = ("acc", "acc_norm")


def zero_shot(*, project: Project, model: str, task: str) -> None:
    """models/{dense,pruned} + data/tasks/TASK → metrics/{dense,pruned}/zero_shot/TASK.json"""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every data set that is no Hub id
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
    definition = load_task(items["definition"], items["role"], project.data("tasks") / task / ITEMS)
    with project.work(protocol) as work:
        language_model = EngineLM(open_decoder(project, model), work.path, what=f"zero-shot {model} {task}")
        evaluated = evaluate(language_model, {task: definition}, limit=params.zero_shot.limit)
        work.forget()
    result = evaluated["results"][task]
    given = [metric for metric in METRICS if f"{metric},none" in result]
    details = {
        "protocol": protocol,
        "standard_errors": {metric: round(result[f"{metric}_stderr,none"], 6) for metric in given},
        "items": [_answer(sample) for sample in evaluated["samples"][task]],
    }
    write_json(project.details(model, f"zero_shot/{task}"), details)
    # Only what a reader compares: `dvc metrics diff` prints every number that is in here.
    write_json(
        project.metrics(model, f"zero_shot/{task}"), {metric: round(result[f"{metric},none"], 6) for metric in given}
    )


class EngineLM(HFLM):  # type: ignore[misc] # it brings no types
    """lm-eval's model class, its log-likelihoods from the engine: contexts once, no padding, a block at a time.

    How a text becomes tokens, how many positions there are, and what stands before an empty context stay lm-eval's.
    """

    def __init__(self, decoder: Decoder, work: Path, *, what: str) -> None:
        super().__init__(pretrained=decoder.model, tokenizer=load_tokenizer(decoder.checkpoint.folder))
        self.decoder, self.work, self.what = decoder, work, what

    def loglikelihood(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)  # ours is the bar that matters

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], *_: Any, **__: Any
    ) -> list[tuple[float, bool]]:
        if not self.decoder.holds_layouts:
            print(
                f"{self.what}: this model can't hold several questions in one row (its attention, or what it does with "
                "positions, is its own); each choice goes through it alone, which takes longer and answers the same",
                file=sys.stderr,
                flush=True,
            )

        def blocks(items: Iterable[Step], total: int) -> Iterable[Step]:
            return progress(items, total=total, what=f"{self.what}, blocks")

        asked = [Request(tuple(context), tuple(continuation)) for _, context, continuation in requests]
        return loglikelihoods(self.decoder, asked, self.work, length=self.max_length, progress=blocks)


def load_task(definition: str, role: str, items: Path) -> Any:
    """lm-eval's task, on items from a file: its own YAML, with every split but the one in that role taken out."""
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
