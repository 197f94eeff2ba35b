"""The model card of an exported model, as the Hub reads it."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from tabulate import tabulate

from wanda_dvc.catalog import ALLOCATIONS, GROUPS, HUB_ID, RECONSTRUCTIONS, methods
from wanda_dvc.export.formats import Written
from wanda_dvc.reading import DIVERGED
from wanda_dvc.stages import MODELS
from wanda_dvc.study.files import Json, load_json
from wanda_dvc.study.markup import code, inline
from wanda_dvc.study.project import Project
from wanda_dvc.study.provenance import read_provenance
from wanda_dvc.study.repeat import how_to_repeat
from wanda_dvc.views.show import HEADERS, comparison, measured_apart, not_compared

# The Hub's name of a licence, by a phrase of its text.
LICENSES = {
    "llama3.1": "LLAMA 3.1 COMMUNITY LICENSE",
    "llama3": "META LLAMA 3 COMMUNITY LICENSE",
    "llama2": "LLAMA 2 COMMUNITY LICENSE",
    "apache-2.0": "Apache License",
    "mit": "MIT License",
}
UNKNOWN_LICENSE = (
    "Unknown: nothing that is kept of the dense model names one. Find it out, and comply with it, before you share "
    "this model."
)

PROPAGATION = {
    "dense": "every block calibrated on the outputs of dense blocks",
    "pruned": "every block calibrated on the outputs of the blocks pruned before it",
    "corrected": "every block calibrated on the outputs of the blocks pruned before it, aiming at the dense model's",
}
TABLE = {"tablefmt": "github", "disable_numparse": True}

CARD = """\
---
{metadata}
---
# {source}, pruned

{percent:g} % of the weights in the linear layers of the blocks are zero, chosen by {method}. {kept}

## What was done

{facts}

## What it costs

{results}

{notes}

## Licence of the dense model

{license}

## How to load it

```python
{loading}
```

## What it does not give

{limits}

## How to repeat it

With wanda-dvc {version}, in a new study:

```
{commands}
```
{by_hand}"""


def card(study: Project, written: Written, loading: str, torn: Sequence[str] = ()) -> str:
    """Return the card of a study's pruned model, as it was written; `loading` is Python code that loads it.

    The study's `params` are those that ran. The results of `torn` stages are of inputs made again since.
    """
    from huggingface_hub import ModelCardData

    masks = read_provenance(study.masks, "mask")
    dense = read_provenance(study.model("dense"), "download model")
    params = masks["params"]
    name, described = _license(study.model("dense"), dense)
    on_hub = HUB_ID.fullmatch(dense["source"]) is not None
    metadata = ModelCardData(
        base_model=dense["source"].partition("@")[0] if on_hub else None,
        license=name,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["pruned", params["method"], "wanda-dvc"],
    )
    commands, by_hand = how_to_repeat(study.params)
    return CARD.format(
        metadata=metadata.to_yaml(),
        source=inline(dense["source"]),
        percent=round(100 * written.sparsity, 2),
        method=_cited(params["method"]),
        kept=RECONSTRUCTIONS[study.params.plan.reconstruction.name].kept,
        facts=tabulate(list(_facts(study, masks, dense, written.sparsity)), ["what", "value"], **TABLE),
        results=tabulate(comparison(study), HEADERS, **TABLE),
        notes="\n".join(f"- {note}" for note in _notes(study, torn)),
        license=described,
        loading=loading,
        limits=f"{written.storage} {_speed(params['pattern'])}",
        version=masks["wanda_dvc"],
        commands=commands,
        by_hand=by_hand,
    )


def _cited(name: str) -> str:
    """The title of a method, with its paper. A method of a package that is not installed has only its name."""
    method = methods().get(name)
    return f"{method.title} ([{method.citation}]({method.link}))" if method else inline(name)


def _facts(study: Project, masks: Json, dense: Json, measured: float) -> Iterator[tuple[str, str]]:
    """What was done, as rows."""
    params, calibration = masks["params"], masks["calibration"]
    yield "dense model", f"{code(dense['source'])} (sha256 of its files {dense['sha256'][:12]}…)"
    yield "method", code(params["method"])
    yield "sparsity", f"{params['sparsity']:g} wanted, {measured:.6f} measured, of the linear layers of all blocks"
    allocation = ALLOCATIONS[params.get("allocation", "uniform")]
    yield "allocation", f"{code(allocation.name)}: {allocation.about}"
    yield "pattern", code(params["pattern"])
    compete = f"weights compete within {GROUPS[params['group']].about}"
    yield "group", compete if params["pattern"] == "unstructured" else "neighbours along the input"
    propagation = params.get("propagation", "dense")
    yield "propagation", f"`{propagation}`: {PROPAGATION[propagation]}"
    reconstruction = RECONSTRUCTIONS[study.params.plan.reconstruction.name]
    yield "weights that stay", f"{code(reconstruction.name)}: {reconstruction.about}"
    yield (
        "calibration",
        f"{calibration['samples']} windows of {calibration['length']} tokens of "
        f"{inline(calibration['text']['source'])}, "
        f"seed {calibration['seed']}, {calibration['dtype']}",
    )


def _speed(pattern: str) -> str:
    """What the zeros bring in speed."""
    if pattern == "unstructured":
        return "Unstructured zeros make no GPU faster."
    return f"Speed from {pattern} needs hardware and kernels for that pattern; loading the model does not bring them."


def _notes(study: Project, torn: Sequence[str]) -> Iterator[str]:
    """How to read the numbers."""
    params = study.params
    if torn:
        yield f"Stale when this card was written, because inputs had been made again: {', '.join(torn)}."
    if apart := measured_apart(study):
        yield f"{not_compared(apart)} What follows is said of the pruned one."
    protocols = [load_json(study.details(model, "perplexity")).get("protocol") for model in MODELS]
    if protocol := protocols[1] or protocols[0]:
        yield (
            f"Perplexity: {protocol['windows']} windows of {protocol['length']} tokens of "
            f"{inline(protocol['text']['source'])} (sha256 {protocol['text']['sha256'][:12]}…), {protocol['dtype']}."
        )
    if any(load_json(study.metrics(model, "perplexity")).get("perplexity") == DIVERGED for model in MODELS):
        yield "`diverged`: the loss, or its exponential, was not finite."
    limit = params.zero_shot.limit
    yield (
        f"Zero-shot: no examples in the prompt, {f'the first {limit} items' if limit else 'all items'} of each task, "
        f"{params.dtype}; ± is one standard error, and a difference below two of them may be chance."
    )
    if params.tasks.source == "embedded":
        yield (
            "The tasks are samples, not benchmarks: questions written for wanda-dvc. They compare these two models and "
            "nothing else."
        )
    if any("–" in row[1:3] for row in comparison(study)[:-1]):
        yield "–: not measured on this model."


def _license(folder: Path, dense: Json) -> tuple[str | None, str]:
    """The dense model's licence: its name on the Hub, and a sentence."""
    files = sorted([*folder.glob("LICENSE*"), *folder.glob("NOTICE*")])
    beside = f"; the full text is in {', '.join(code(file.name) for file in files)}" if files else ""
    if name := dense.get("license"):
        return name, f"{code(name)}, according to its own card{beside}."
    for file in files:
        text = " ".join(file.read_text(encoding="utf-8", errors="replace").split()).lower()
        for name, phrase in LICENSES.items():
            if phrase.lower() in text:
                return name, f"{code(name)}, according to {code(file.name)}{beside}."
    if files:
        return "other", f"See {', '.join(code(file.name) for file in files)}."
    return None, UNKNOWN_LICENSE
