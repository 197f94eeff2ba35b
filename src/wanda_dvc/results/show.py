"""`wanda-dvc show`: the results of the workspace, or of experiments side by side, with their paired tests."""

import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from wanda_dvc.catalog import EMBEDDED, RECIPES
from wanda_dvc.errors import UserError
from wanda_dvc.params import Params
from wanda_dvc.plan import CHOICES
from wanda_dvc.reading import is_there
from wanda_dvc.results.compare import DENSE, MISSING, apart, records, side_by_side
from wanda_dvc.results.experiments import Experiment, at
from wanda_dvc.results.listing import WORKSPACE
from wanda_dvc.results.markup import one_line, table
from wanda_dvc.results.measures import Results
from wanda_dvc.stages import times
from wanda_dvc.study.artifact import PROVENANCE
from wanda_dvc.study.files import Json, json_text
from wanda_dvc.study.folder import Study

BOS = {"first window": ", BOS token in the first window only", "none": ", no BOS token"}  # by a protocol's entry


def show(*, study: Study, names: Sequence[str] = (), as_json: bool = False, text: bool = False) -> str:
    """Return the results of the workspace by model; or of the named experiments, branches, tags or commits.

    Every measure is a row; with `text`, every prompt that the models continued. Paired tests compare each model with
    the first: the dense one, or the first of several experiments.
    """
    if DENSE in names:
        raise UserError(f"{DENSE}: the dense model has this name in tables; give the experiment's commit instead")
    with tempfile.TemporaryDirectory(prefix="wanda-dvc-") as work:
        experiments = [at(study, name, Path(work, str(place))) for place, name in enumerate(names or [WORKSPACE])]
        first = experiments[0]
        models = {DENSE: first.results[DENSE]} | {one.name: one.made for one in experiments} if names else first.models
        base = names[0] if len(names) > 1 else DENSE
        if as_json and text:
            raise UserError("--json: given with --text; metrics/details/MODEL/continuations.json has the texts")
        if as_json:
            made = {one.name: {"settings": one.settings, "notes": one.notes} for one in experiments}
            record: Json = {"experiments": made, "models": records(models, base=base), "base": base}
            return json_text(record if names else record | {"times": times(study)})
        if text and (texts := continuations(models)):
            return texts
        if text:
            written = [one.details("continuations").get("skipped") for one in models.values()]
            skipped = [f"continuations: {why}" for why in written if why]
            todo = "continuations: missing; `dvc repro` writes them, of each line of prompts.txt"
            raise UserError(*skipped or [todo])
        parts = [
            "\n".join(title(one, named=bool(names)) for one in experiments),
            "\n".join(note for one in experiments for note in one.notes),
            table(*side_by_side(models, base=base)),
            *notes({one.name: one.params for one in experiments}, models, base=base),
        ]
        return "\n\n".join(part for part in parts if part)


def continuations(models: dict[str, Results], form: Callable[[object], str] = one_line) -> str:
    """Return a table of the prompts and each model's text; "" without a prompt that all models continued."""
    written = [one.details("continuations").get("prompts", []) for one in models.values()]
    texts = [{one["prompt"]: one["text"] for one in prompts} for prompts in written]
    rows = [[prompt, *(one[prompt] for one in texts)] for prompt in texts[0] if all(prompt in one for one in texts)]
    return table(["prompt", *models], [list(map(form, row)) for row in rows]) if rows else ""


def title(experiment: Experiment, *, named: bool) -> str:
    """Describe the settings behind the results of an experiment in one line."""
    params = experiment.params
    described = f"{params.model}: {recipe(params)}, sparsity {float(params.plan.sparsity):g}, pattern {params.pattern}"
    described += f", recovery.tokens {params.recovery.tokens:,}" if params.recovery.tokens else ""
    if named:
        return f"{experiment.name}: {described}"
    if not is_there(experiment.study.masks / PROVENANCE):
        return f"{params.model}: no masks yet; `dvc repro` makes them."
    if not is_there(experiment.study.model("pruned") / PROVENANCE):
        return f"{described}\nmodels/pruned is missing (DVC does not cache it): `dvc repro` writes it."
    return described


def recipe(params: Params) -> str:
    """Return the recipe, with the choices that were set separately."""
    usual = {name: getattr(RECIPES[params.recipe], name) for name in CHOICES}
    own = [f"{name}={getattr(params, name)}" for name in usual if getattr(params, name) not in (None, usual[name])]
    return f"{params.recipe} ({', '.join(own)})" if own else params.recipe


def notes(params: Mapping[str, Params], models: dict[str, Results], *, base: str = DENSE) -> Iterator[str]:
    """Yield what a reader of the table has to know: the texts, the items, the tests, and limits of the values.

    `params` has each experiment's settings by name; those of other models are the first's.
    """
    every = list(models.values())
    for name, one in models.items():
        if base in models and name not in (base, DENSE) and (found := apart(one, models[base])):
            each = ((what, key if key == MISSING else f"different {key}") for what, key in found.items())
            named = ", ".join(f"{what} ({reason})" for what, reason in each)
            todo = "`dvc pull` fetches missing details, `dvc repro` measures both models in the same way"
            yield f"{name} not compared with {base}: {named}. {todo}."
    yield from _protocols(params, models)
    if any(one.tasks for one in every) and any(one.tasks.source == EMBEDDED for one in params.values()):
        yield (
            "The tasks are samples written for wanda-dvc, not the benchmarks: they compare these models and "
            "nothing else."
        )
    if any(one.texts or one.tasks for one in every):
        yield (
            "In brackets: 95 % intervals over windows or items. *: a paired test on the same windows or items has "
            "p < 0.05, adjusted for the number of tests (Holm). Divergence is KL(dense ‖ pruned) of the next token's "
            "predictions."
        )
    for name, one in models.items():
        details = [one.details(f"perplexity/{text}") for text in one.texts] + [one.answers(task) for task in one.tasks]
        for where in dict.fromkeys(found["not_finite"] for found in details if "not_finite" in found):
            yield f"{name}: activations are not finite from here on: {where}."
        if skipped := one.details("continuations").get("skipped"):
            yield f"No continuations by the {name} model: {skipped}."


def _protocols(params: Mapping[str, Params], models: dict[str, Results]) -> Iterator[str]:
    """Yield a sentence on each text, and on the tasks; several where models were measured in several ways."""
    first, said = next(iter(params.values())), defaultdict[str, dict[str, str]](dict)  # by what, and model
    for name, one in models.items():
        own = params.get(name, first)
        for text in one.texts:
            if protocol := one.details(f"perplexity/{text}").get("protocol"):
                rest = "" if protocol["rest"] == "dropped" else f" and one of {protocol['rest']}"
                said[text][name] = (
                    f"Perplexity on {text}: {protocol['windows']} windows of {protocol['length']} tokens{rest} of "
                    f"{protocol['text']['source']} (sha256 {protocol['text']['sha256'][:12]}…), {protocol['dtype']}"
                    f"{BOS.get(protocol.get('bos'), '')}."
                )
                said[text][name] += f" {own.about_text(text)}." if text in own.perplexity.texts else ""
        for asked in (one.answers(task).get("protocol", {}) for task in one.tasks):
            items = f"the first {limit} items" if (limit := asked.get("limit", own.items)) else "all items"
            dtype = asked.get("dtype", own.dtype)
            said[""][name] = f"Zero-shot: no examples in the prompt, {items} of each task, {dtype}."
    for sentences in said.values():
        for sentence in dict.fromkeys(sentences.values()):
            names = ", ".join(name for name, own in sentences.items() if own == sentence)
            yield sentence if len(set(sentences.values())) == 1 else f"{names}: {sentence}"
