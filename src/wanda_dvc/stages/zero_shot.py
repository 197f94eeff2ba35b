"""Measure zero-shot accuracy: lm-eval's definitions of the tasks, the engine's log-likelihoods."""

import contextlib
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from wanda_dvc.engine.checkpoint import positions_of
from wanda_dvc.engine.memory import ModelSizes, generating_memory
from wanda_dvc.engine.windows import load_tokenizer
from wanda_dvc.errors import UserError, notice
from wanda_dvc.reading import DIVERGED, is_there, read_text
from wanda_dvc.stages import STAGES
from wanda_dvc.stages.device import free_memory, own_device
from wanda_dvc.stages.inputs import HEAD, check_ready, runner, say_not_finite
from wanda_dvc.stages.needs import announce
from wanda_dvc.stages.process import progress
from wanda_dvc.study.artifact import Work, describe, digest, read_provenance
from wanda_dvc.study.files import Json, load_json, write_csv, write_json
from wanda_dvc.study.folder import ITEMS, Study
from wanda_dvc.study.protocol import differing, identity
from wanda_dvc.study.scaffold import FILES, PROMPTS

METRICS = {"acc": "answer", "acc_norm": "answer_norm"}  # the reported ones; an item's key of the chosen answer
CONTINUED = 40  # tokens of a continuation, at most


def zero_shot(*, study: Study, model: str) -> None:
    """models/{dense,pruned,recovered} + data/tasks → metrics/…/zero_shot.json, and continuations of prompts."""
    (measured, dtype), settings = check_ready(study, model), study.stage_input("zero-shot")
    sizes = ModelSizes.read(study.model(model))
    announce(study, "zero-shot", model, sizes=sizes)
    same = identity(STAGES["zero-shot"].version, measured, study.model(model))
    details, metrics = Json(), Json()
    for task in settings["tasks"]:
        items = read_provenance(study.data("tasks") / task, "download tasks")
        asked = {key: items[key] for key in ("task", "source", "role", "definition", "sha256", "lm_eval")}
        inputs = {"task": asked, "examples": 0, "limit": settings["limit"], "dtype": dtype}
        protocol = describe("zero-shot", libraries=("torch", "transformers", "lm_eval"), **same, **inputs)
        found = _kept(study, f"{model}-{task}", protocol, partial(_ask, study, model, task, protocol))
        details[task], metrics[task] = found["details"], found["metrics"]
        say_not_finite(f"zero-shot {model} {task}", details[task].get("not_finite"))
    if model != "dense":
        for task, changed in _flips(study, details, model).items():
            metrics[task] |= changed
    inputs = {"prompts_sha256": digest(read_prompts(study)), "tokens": CONTINUED, "dtype": dtype}
    protocol = describe("continuations", libraries=("torch", "transformers"), **same, **inputs)
    written = _kept(study, f"{model}-continuations", protocol, partial(_continue, study, model, sizes, protocol))
    plotted = [[task, item["item"], item["acc"]] for task, one in details.items() for item in one["items"]]
    write_json(study.details(model, "continuations"), written["details"])
    write_json(study.details(model, "zero_shot"), {"tasks": details})
    write_csv(study.plots(f"{model}/zero_shot"), ["task", "item", "acc"], plotted)
    # Only numbers to compare: `dvc metrics diff` prints every number in here.
    write_json(study.metrics(model, "zero_shot"), metrics)


def _flips(study: Study, details: Json, model: str) -> Json:
    """Return by task and metric the answers that pruning changed, in each direction.

    Empty without comparable answers of the dense model, and for the embedded questions, which are no benchmark.
    """
    dense, found = load_json(study.details("dense", "zero_shot")).get("tasks", {}), Json()
    for task, one in details.items():
        before, items = dense.get(task), read_provenance(study.data("tasks") / task, "download tasks")
        if items["samples"] or not before:
            continue
        if key := differing(before["protocol"], one["protocol"]):
            notice(
                f"zero-shot {model}: {task}: not compared with the dense model's answers, which are of another {key}; "
                "run `dvc repro --force --single-item zero-shot-dense`, then this stage"
            )
        elif before["items"] and one["items"]:  # none if a model diverged
            metrics = [metric for metric in METRICS if metric in one["items"][0]]
            found[task] = {"flips": {metric: count_flips(before["items"], one["items"], metric) for metric in metrics}}
    return found


def count_flips(before: list[Json], after: list[Json], metric: str) -> dict[str, int]:
    """Count the changed answers to the same items: right → wrong, wrong → right, and one wrong choice → another."""
    counts = {"lost": 0, "gained": 0, "swapped": 0}
    for one, other in zip(before, after, strict=True):
        was_right, is_right = one[metric] > 0.5, other[metric] > 0.5
        if was_right != is_right:
            counts["lost" if was_right else "gained"] += 1
        elif not was_right and one[METRICS[metric]] != other[METRICS[metric]]:
            counts["swapped"] += 1
    return counts


def _kept(study: Study, run: str, protocol: Json, make: Callable[[Work], Json]) -> Json:
    """Return the results of an earlier run with this protocol, or new ones: `details`, and `metrics` of a task."""
    path = study.answers / f"{run}-{digest(protocol)[:32]}.json"
    with study.work(protocol) as work:
        answered: Json = {}
        with contextlib.suppress(UserError):  # a damaged file is written again
            answered = load_json(path)
        if answered.get("details", {}).get("protocol") != protocol:
            answered = make(work)
            if "skipped" not in answered["details"]:  # another time there may be more memory
                write_json(path, answered)
        work.discard()
    return answered


def _ask(study: Study, model: str, task: str, protocol: Json, work: Work) -> Json:
    """Run a task's questions through a model; return `details` and `metrics` in their written form."""
    from lm_eval.evaluator import evaluate

    from wanda_dvc.engine.harness import EngineLM
    from wanda_dvc.sources.tasks import load_task

    folder, what = study.data("tasks") / task, f"zero-shot {model} {task}"
    items = read_provenance(folder, "download tasks")
    definition = load_task(items["definition"], items["role"], folder / ITEMS)
    run = runner(study, model, work)
    blocks = partial(progress, total=len(run.decoder.blocks), what=f"{what}, blocks", at=lambda step: step.index)
    language_model = EngineLM(study.model(model), run, progress=blocks)
    # Two draws, the fewest: lm-eval's 100,000 are for errors of F1 scores, which take hours and are not reported.
    evaluated = evaluate(language_model, {task: definition}, limit=protocol["limit"], bootstrap_iters=2)
    where = run.progress.not_finite
    result, samples = evaluated["results"][task], evaluated["samples"][task]
    given = [metric for metric in METRICS if f"{metric},none" in result]
    if where is None and not all(math.isfinite(value) for one in samples for value, _ in one["filtered_resps"]):
        where = HEAD
    if where:  # the answers are meaningless: a comparison with NaN chooses the first
        details: Json = {"protocol": protocol, "not_finite": where, "items": []}
        return {"details": details, "metrics": dict.fromkeys(given, DIVERGED)}
    # lm-eval returns a string instead of the error of a single item.
    errors = {metric: result[f"{metric}_stderr,none"] for metric in given}
    details = {
        "protocol": protocol,
        "standard_errors": {metric: round(x, 6) for metric, x in errors.items() if isinstance(x, float)},
        "items": [_answer(sample, definition.doc_to_choice) for sample in samples],
    }
    return {"details": details, "metrics": {metric: round(result[f"{metric},none"], 6) for metric in given}}


def _answer(sample: dict[str, Any], choices_of: Callable[[Any], list[str]]) -> dict[str, Any]:
    """Return one item's log-likelihoods, the choice with the highest, the right one, and the scores.

    For `acc_norm` also the choice with the highest log-likelihood a character, as lm-eval has it.
    """
    values = [response[0] for response in sample["filtered_resps"]]
    answer = max(range(len(values)), key=values.__getitem__)
    content = {"item": sample["doc_id"], "loglikelihoods": values, "answer": answer}
    if "acc_norm" in sample:
        pairs = zip(values, choices_of(sample["doc"]), strict=True)
        each = [value / len(choice) if choice else -math.inf for value, choice in pairs]  # HellaSwag's may be empty
        content["answer_norm"] = max(range(len(each)), key=each.__getitem__)
    return content | {"gold": sample["target"]} | {metric: sample[metric] for metric in METRICS if metric in sample}


# --- continuations of prompts ---


def read_prompts(study: Study) -> list[str]:
    """Return the prompts of a study's prompts.txt, one a line; without the file, those of a new study."""
    path = study.root / PROMPTS
    text = read_text(path) if is_there(path) else FILES[PROMPTS].read_text(encoding="utf-8")
    return [line.strip() for line in text.split("\n") if line.strip()]


def _continue(study: Study, model: str, sizes: ModelSizes, protocol: Json, _: Work) -> Json:
    """Return each prompt's continuation by a model; or the reason to skip them, if the memory is too small."""
    device, prompts = own_device(study.params.runtime), read_prompts(study)
    longest = max((len(prompt.encode()) for prompt in prompts), default=0)  # in tokens, at most
    needed = generating_memory(sizes, dtype=protocol["dtype"], tokens=longest + CONTINUED, device=device.type)
    if needed > (free := free_memory(str(device))):
        skipped = (
            f"the model needs {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB were free; "
            f"`dvc repro --force --single-item zero-shot-{model}` writes them when there is more"
        )
        notice(f"zero-shot {model}: no continuations: {skipped}")
        return {"details": {"protocol": protocol, "skipped": skipped}}
    dtype = getattr(torch, protocol["dtype"])
    written = continuations(study.model(model), prompts, dtype=dtype, device=device) if prompts else []
    pairs = [{"prompt": prompt, "text": text} for prompt, text in zip(prompts, written, strict=True)]
    return {"details": {"protocol": protocol, "prompts": pairs}}


def continuations(folder: Path, prompts: Sequence[str], *, dtype: torch.dtype, device: torch.device) -> list[str]:
    """Continue each prompt by the likeliest token, by transformers' own generation: the complete model is in memory.

    Each prompt runs alone, without padding; of a prompt that leaves no positions, its last tokens. Of
    the model's own settings for generation only the end of a text counts: a penalty for repetitions would hide them.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig  # takes seconds

    tokenizer = load_tokenizer(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False).eval().to(device)
    ends = model.generation_config.eos_token_id
    greedy = GenerationConfig(do_sample=False, max_new_tokens=CONTINUED, eos_token_id=ends, pad_token_id=0)
    model.generation_config = greedy
    room, found = max(1, (positions_of(model.config) or sys.maxsize) - CONTINUED), []
    for prompt in prompts:
        asked = torch.tensor([tokenizer(prompt, verbose=False)["input_ids"][-room:]], device=device)
        written = model.generate(asked, attention_mask=torch.ones_like(asked))[0, asked.shape[1] :].tolist()
        found.append(tokenizer.decode(written, skip_special_tokens=True))
    return found
