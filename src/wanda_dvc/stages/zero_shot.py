"""Ask a model multiple-choice questions: lm-eval's own definitions of the tasks, our engine's log-likelihoods."""

import contextlib
import logging
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from wanda_dvc.engine.costs import Cost, Setting
from wanda_dvc.engine.sizes import Need, walking
from wanda_dvc.errors import UserError
from wanda_dvc.params import Params
from wanda_dvc.reading import DIVERGED
from wanda_dvc.stages import STAGES
from wanda_dvc.stages.inputs import HEAD, check_ready, model_provenance, runner, say_not_finite, walk_need
from wanda_dvc.stages.running import progress, told
from wanda_dvc.study.files import Json, write_csv, write_json
from wanda_dvc.study.places import METRICS
from wanda_dvc.study.project import ITEMS, Project, Work
from wanda_dvc.study.provenance import describe, digest, read_provenance, tokenizer_digest

if TYPE_CHECKING:
    from wanda_dvc.engine.runner import Step

SAMPLES = 48  # items a task of `tasks.source: samples`

# Of lm-eval's tasks: the items of the split that is asked, the tokens that a question needs (its context once, its
# choices after it) and the positions at which it needs logits; means of the first 200 items with SmolLM2's tokenizer.
TASKS = {
    "piqa": (1838, 57.4, 44.6),
    "hellaswag": (10042, 90.2, 60.4),
    "arc_easy": (2376, 41.6, 14.4),
    "boolq": (3270, 148.8, 1.0),
    "rte": (277, 80.1, 1.0),
}


def zero_shot(*, project: Project, model: str) -> None:
    """models/{dense,pruned} + data/tasks → metrics/{dense,pruned}/zero_shot.json."""
    check_ready(project, model)
    protocols = {task: _protocol(project, model, task) for task in project.params.tasks.names}
    answered = {task: _answered(project, model, task, protocol) for task, protocol in protocols.items()}
    told({"earlier": sum(one.get("seconds", 0) for one in answered.values())})
    details = {task: one["details"] for task, one in answered.items()}
    for task, one in details.items():
        say_not_finite(f"zero-shot {model} {task}", one.get("not_finite"))
    plotted = ([task, item["item"], item.get("acc", "")] for task, one in details.items() for item in one["items"])
    write_json(project.details(model, "zero_shot"), {"tasks": details})
    write_csv(project.plots(f"{model}/zero_shot"), ["task", "item", "acc"], plotted)
    # Only what a reader compares: `dvc metrics diff` prints every number in here.
    write_json(project.metrics(model, "zero_shot"), {task: one["metrics"] for task, one in answered.items()})


def _protocol(project: Project, model: str, task: str) -> Json:
    """Return what a task's results follow from."""
    items = read_provenance(project.data("tasks") / task, "download tasks")
    return describe(
        "zero-shot",
        version=STAGES["zero-shot"].version,
        libraries=("torch", "transformers", "lm_eval"),
        model=digest(model_provenance(project, model)),
        tokenizer_sha256=tokenizer_digest(project.model(model)),
        task={key: items[key] for key in ("task", "source", "role", "sha256", "lm_eval")},
        examples=0,
        limit=project.params.zero_shot.limit,
        dtype=project.params.dtype,
    )


def _answered(project: Project, model: str, task: str, protocol: Json) -> Json:
    """Return a model's `details` and `metrics` of a task, as they are written.

    They are those of an earlier run with this protocol, with its `seconds`; else the model is asked, and they are kept.
    """
    run, key = f"zero-shot-{model}-{task}", digest(protocol)
    with project.work(protocol) as work:
        answered: Json = {}
        with contextlib.suppress(UserError):  # a damaged file is written again
            answered = project.answers.read(run, key)
        if answered.get("details", {}).get("protocol") != protocol:
            began = time.perf_counter()
            answered = _ask(project, model, task, protocol, work)
            project.answers.write(run, key, answered | {"seconds": round(time.perf_counter() - began, 2)})
        work.forget()
    return answered


def _ask(project: Project, model: str, task: str, protocol: Json, work: Work) -> Json:
    """Ask a model a task's questions; return its `details` and `metrics` as they are written."""
    from lm_eval.evaluator import evaluate

    from wanda_dvc.engine.harness import EngineLM, load_task

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every data set that is no Hub id
    folder, what = project.data("tasks") / task, f"zero-shot {model} {task}"
    items = read_provenance(folder, "download tasks")
    definition = load_task(items["definition"], items["role"], folder / ITEMS)
    with runner(project, model, work) as run:

        def blocks(turns: "Iterator[Step]") -> "Iterable[Step]":
            return progress(turns, total=len(run.decoder.blocks), what=f"{what}, blocks")

        language_model = EngineLM(run.decoder, project.model(model), run, what=what, progress=blocks)
        evaluated = evaluate(language_model, {task: definition}, limit=project.params.zero_shot.limit)
        where = run.not_finite
    result = evaluated["results"][task]
    given = [metric for metric in METRICS if f"{metric},none" in result]
    details: Json = {
        "protocol": protocol,
        "standard_errors": {
            # lm-eval gives a string where there is none, of a single item.
            metric: round(error, 6)
            for metric in given
            if isinstance(error := result[f"{metric}_stderr,none"], float)
        },
        "items": [_answer(sample) for sample in evaluated["samples"][task]],
    }
    if where is None and any(DIVERGED in item["loglikelihoods"] for item in details["items"]):
        where = HEAD
    if where:
        details["not_finite"] = where
    return {"details": details, "metrics": {metric: round(result[f"{metric},none"], 6) for metric in given}}


def _answer(sample: dict[str, Any]) -> dict[str, Any]:
    """Return one item's log-likelihoods, the choice with the highest, the right one, and the scores."""
    choices = [response[0] for response in sample["filtered_resps"]]
    return {
        "item": sample["doc_id"],
        "loglikelihoods": [value if math.isfinite(value) else DIVERGED for value in choices],
        "answer": max(range(len(choices)), key=choices.__getitem__),
        "gold": sample["target"],
        **{metric: sample[metric] for metric in METRICS if metric in sample},
    }


def need(project: Project, model: str | None) -> Need:
    """A walk over packed rows with the head; what its hidden states take on disk depends on the items."""
    from wanda_dvc.engine.questions import ROW

    found = walk_need(project, model or "dense", "tasks", tokens=None, length=ROW, logits=True, packed=True)
    return replace(found, disk=0) if found.memory else found


def cost(params: Params, on: Setting) -> Cost:
    """All questions of all tasks through all blocks, and the head where a choice's tokens are."""
    from wanda_dvc.engine.questions import ROW

    most = min(params.zero_shot.limit or 10**9, SAMPLES if params.tasks.source == "embedded" else 10**9)
    needed = [_task(name) for name in params.tasks.names]
    asked = sum(min(items, most) * fed for items, fed, _ in needed)
    logits = sum(min(items, most) * positions for items, _, positions in needed)
    rows = max(1.0, asked / ROW)  # packed; attention is within a question, and so small that rows overstate it
    memory = walking(on.model, dtype=on.dtype, length=ROW, device=on.where, logits=True, packed=True)
    return on.walk(rows, asked / rows, memory, logits=logits)


def _task(name: str) -> tuple[int, float, float]:
    """Return a task's row of the table; another task counts as an average one."""
    items, tokens, positions = (sum(column) / len(TASKS) for column in zip(*TASKS.values(), strict=True))
    return TASKS.get(name, (int(items), tokens, positions))
