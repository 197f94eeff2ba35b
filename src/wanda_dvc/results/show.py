"""`wanda-dvc show`: the results of the workspace, or of experiments side by side, with their paired tests."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from wanda_dvc.catalog import EMBEDDED, RECIPES
from wanda_dvc.errors import UserError
from wanda_dvc.params import Params
from wanda_dvc.plan import CHOICES, UNSTRUCTURED
from wanda_dvc.results.compare import DENSE, not_comparable, records, side_by_side
from wanda_dvc.results.experiments import read_at
from wanda_dvc.results.listing import WORKSPACE
from wanda_dvc.results.markup import table
from wanda_dvc.results.measures import TEXT_PREFIX, Results
from wanda_dvc.study.files import Json, json_text
from wanda_dvc.study.folder import Study

BOS = {"first window": ", BOS token in the first window only", "none": ", no BOS token"}  # by a protocol's entry


def show(*, study: Study, names: Sequence[str] = (), as_json: bool = False) -> str:
    """Return the results of the workspace by model; or of the named experiments, branches, tags or commits.

    A row is a measure. Tests compare with the dense model, or the first of the names.
    """
    if DENSE in names:
        raise UserError(f"{DENSE}: the dense model has this name in tables; give the experiment's commit instead")
    base = names[0] if len(names) > 1 else DENSE
    with tempfile.TemporaryDirectory(prefix="wanda-dvc-") as work:
        experiments = [read_at(study, name, Path(work, str(place))) for place, name in enumerate(names or [WORKSPACE])]
        models = experiments[0].models
        if names:
            models = {DENSE: experiments[0].results[DENSE]}
            models |= {experiment.name: experiment.final for experiment in experiments}
        if as_json:
            settings = {run.name: {"settings": run.settings, "notes": run.notes} for run in experiments}
            content: Json = {"experiments": settings, "models": records(models, base=base), "base": base}
            return json_text(content)
        params = {experiment.name: experiment.params for experiment in experiments}
        parts = [
            "\n".join(f"{name}: {settings_line(settings)}" for name, settings in params.items()),
            "\n".join(note for experiment in experiments for note in experiment.notes),
            table(*side_by_side(models, base=base)),
            *table_notes(params, models, base=base),
        ]
        return "\n\n".join(part for part in parts if part)


def settings_line(params: Params) -> str:
    """Describe settings in one line."""
    return f"{params.model}: {pruning_label(params)}, sparsity {float(params.plan.sparsity):g}"


def pruning_label(params: Params) -> str:
    """Return the recipe, with the choices that were set separately, the pattern and the training."""
    parts = [params.recipe]
    for name in CHOICES:
        value = getattr(params, name)
        if value not in (None, getattr(RECIPES[params.recipe], name)):
            parts.append(f"{name}={value}")
    if params.pattern != UNSTRUCTURED:
        parts.append(f"pattern {params.pattern}")
    if params.recovery.tokens:
        parts.append(f"recovery.tokens {params.recovery.tokens:,}")
    return ", ".join(parts)


def table_notes(params: Mapping[str, Params], models: dict[str, Results], *, base: str = DENSE) -> Iterator[str]:
    """Yield what a reader of the table has to know: the texts, the items, the tests, and limits of the values.

    `params` has each experiment's settings by name; those of other models are the first's.
    """
    for name, results in models.items():
        if name in (base, DENSE):
            continue
        keys = not_comparable(results, models[base])
        if keys:
            reasons = ", ".join(f"{heading} ({key})" for heading, key in keys.items())
            yield (
                f"{name} not compared with {base}, because of: {reasons}. `dvc pull` fetches missing details, `dvc "
                "repro` measures both models in the same way."
            )
    yield from _protocols(params, models)
    has_tasks = any(results.tasks for results in models.values())
    if has_tasks and any(settings.tasks.source == EMBEDDED for settings in params.values()):
        yield "The tasks are wanda-dvc's samples, not the benchmarks: they compare these models and nothing else."
    if has_tasks or any(results.texts for results in models.values()):
        yield (
            "In parentheses: 95 % intervals over windows or items. *: a paired test on the same windows or items has "
            "p < 0.05, adjusted for the number of tests (Holm). Divergence is KL(dense ‖ pruned) of the next token's "
            "predictions."
        )
    for name, results in models.items():
        details = [results.details(TEXT_PREFIX + text) for text in results.texts]
        details += [results.answers(task) for task in results.tasks]
        for position in dict.fromkeys(content["not_finite"] for content in details if "not_finite" in content):
            yield f"{name}: activations are not finite from here on: {position}."


def _protocols(params: Mapping[str, Params], models: dict[str, Results]) -> Iterator[str]:
    """Yield a sentence on each text and on the tasks, with the names of its models if they are not all."""
    first = next(iter(params.values()))
    models_of: dict[str, list[str]] = {}  # by sentence
    for name, results in models.items():
        settings = params.get(name, first)
        for text in results.texts:
            protocol = results.details(TEXT_PREFIX + text).get("protocol")
            if protocol:
                models_of.setdefault(_of_text(text, protocol, settings), []).append(name)
        if results.tasks:  # one run asks all of them, with one limit and dtype
            protocol = results.answers(results.tasks[0]).get("protocol", {})
            limit, dtype = protocol.get("limit", settings.items), protocol.get("dtype", settings.dtype)
            items = f"the first {limit} items" if limit else "all items"
            sentence = f"Zero-shot: no examples in the prompt, {items} of each task, {dtype}."
            models_of.setdefault(sentence, []).append(name)
    for sentence, names in models_of.items():
        yield sentence if len(names) == len(models) else f"{', '.join(names)}: {sentence}"


def _of_text(text: str, protocol: Json, settings: Params) -> str:
    rest = "" if protocol["rest"] == "dropped" else f" and one of {protocol['rest']}"
    source, bos = protocol["text"], BOS.get(protocol.get("bos", ""), "")
    sentence = (
        f"Perplexity on {text}: {protocol['windows']} windows of {protocol['length']} tokens{rest} of "
        f"{source['source']} (sha256 {source['sha256'][:12]}…), {protocol['dtype']}{bos}."
    )
    return f"{sentence} {settings.about_text(text)}." if text in settings.perplexity.texts else sentence
