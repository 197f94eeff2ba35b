"""The model card of a pruned model, in Markdown with the Hub's metadata."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from wanda_dvc.catalog import (
    ALLOCATIONS,
    GROUPS,
    HUB_ID,
    RECONSTRUCTIONS,
    SOLVED_UNITS,
    STRUCTURES,
    Reconstruction,
    methods,
)
from wanda_dvc.study.files import Json
from wanda_dvc.study.markup import code, inline
from wanda_dvc.study.project import Project
from wanda_dvc.study.provenance import read_provenance
from wanda_dvc.study.tensors import block_count, read_masks

UNKNOWN_LICENSE = (
    "Unknown: the files of the dense model name none. Find the licence, and comply with it, before you share the model."
)
PROPAGATION = {
    "dense": "each block was calibrated on the outputs of dense blocks",
    "pruned": "each block was calibrated on the outputs of the pruned blocks before it",
    "corrected": "each block was calibrated on the outputs of the pruned blocks before it, towards the dense outputs",
}
NEIGHBOURS = "neighbours along the input"
STORAGE = "Zeros are stored like any number: the files are no smaller than the dense model's."
LOADING = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

where = "path/to/this/directory"  # or its id on the Hub
model = AutoModelForCausalLM.from_pretrained(where)
tokenizer = AutoTokenizer.from_pretrained(where)
```"""
CARD = """\
---
{metadata}
---
# {source}, pruned

{what}, chosen by {method}. {kept}
{sections}"""


def card(
    study: Project,
    sparsity: float,
    *,
    removed: float | None = None,
    storage: str = STORAGE,
    results: Mapping[str, str] | None = None,
) -> str:
    """Return the model card of a study's pruned model; `sparsity` is its measured sparsity.

    `removed` is the share of the model's weights that were removed with complete units; None: zeros are stored.
    `storage` describes the storage of zeros. `results` are more sections, by title.
    """
    masks = read_provenance(study.masks, "mask")
    dense = read_provenance(study.model("dense"), "download model")
    license_name, license_text = _license(study.model("dense"), dense)
    pattern = masks["params"]["pattern"]
    metadata = {
        "base_model": dense["source"].partition("@")[0] if HUB_ID.fullmatch(dense["source"]) else None,
        "license": license_name,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["pruned", masks["params"]["method"], "wanda-dvc"],
    }
    sections = {
        "Pruning": table(["what", "value"], _facts(study, masks, dense, sparsity)),
        **(results or {}),
        "Load the model": LOADING,
        "Limits": " ".join([*([storage] if removed is None else []), _speed(pattern)]),
        "Licence of the dense model": license_text,
    }
    return CARD.format(
        metadata="\n".join(f"{key}: {json.dumps(value)}" for key, value in metadata.items() if value),
        source=inline(dense["source"]),
        what=what_was_pruned(pattern, sparsity, removed),
        method=_cited(masks["params"]["method"], of_units=pattern in STRUCTURES),
        kept=_kept(_reconstruction(masks)),
        sections="".join(f"\n## {title}\n\n{body}\n" for title, body in sections.items()),
    )


def what_was_pruned(pattern: str, sparsity: float, removed: float | None) -> str:
    """Return what was pruned, as the beginning of a sentence."""
    percent = round(100 * sparsity, 2)
    if removed is None:
        return f"{percent:g} % of the weights in the linear layers of the blocks are zero"
    units = STRUCTURES[pattern].about
    return f"{percent:g} % of the {units} were removed, {round(100 * removed, 2):g} % of the model's parameters"


def table(headers: list[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table in Markdown."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _reconstruction(masks: Json) -> Reconstruction:
    """Return what gave the weights that stay their values."""
    chosen, pattern = RECONSTRUCTIONS[masks["params"]["reconstruction"]], masks["params"]["pattern"]
    return SOLVED_UNITS if pattern in STRUCTURES and chosen.function and not chosen.trains else chosen


def _kept(reconstruction: Reconstruction) -> str:
    """Return sentences on the weights that stay, and on the weights outside linears."""
    if reconstruction.function is None:
        return "Nothing was trained afterwards: all other weights are the dense model's, bit for bit."
    if reconstruction.trains:
        return (
            "Each block was then trained on the calibration text, so that its output comes near the dense block's. "
            "Embeddings and output head are the dense model's, bit for bit."
        )
    return (
        "Linears that lose weights got new values for the others, solved for on the calibration text; nothing was "
        "trained. Embeddings, norms and output head are the dense model's, bit for bit."
    )


def _cited(name: str, *, of_units: bool) -> str:
    """Return the name of a method, with its paper; for a method of a missing package, only the name."""
    method = methods().get(name)
    if method and method.needs == "gram" and of_units:
        return "the rise of the layer error after the others compensate (Hassibi and Stork 1993)"
    return f"{code(name)} ({method.paper})" if method else inline(name)


def _facts(study: Project, masks: Json, dense: Json, measured: float) -> Iterator[tuple[str, str]]:
    """Return the settings of the pruning, as rows."""
    params, calibration = masks["params"], masks["calibration"]
    yield "dense model", code(dense["source"])
    yield "sha256 of its files", f"{dense['sha256'][:12]}…"
    yield "method", code(params["method"])
    structure = STRUCTURES.get(params["pattern"])
    of = structure.about if structure else "linear layers of all blocks"
    yield "sparsity", f"{params['sparsity']:g} requested, {measured:.6f} measured, of the {of}"
    if config := masks.get("config"):
        yield "config.json", ", ".join(f"{field} {value}" for field, value in config.items())
        if gone := _removed_blocks(study):
            yield "removed blocks, counted from 0", ", ".join(map(str, gone))
    if structure is None:
        allocation = ALLOCATIONS[params.get("allocation", "uniform")]
        yield "allocation", f"{code(allocation.name)}: {allocation.about}"
    yield "pattern", code(params["pattern"])
    compete = f"weights are compared within {GROUPS[params['group']]}"
    yield "group", structure.about if structure else compete if ":" not in params["pattern"] else NEIGHBOURS
    propagation = params.get("propagation", "dense")
    yield "propagation", f"{code(propagation)}: {PROPAGATION[propagation]}"
    reconstruction = _reconstruction(masks)
    yield "weights that stay", f"{code(reconstruction.name)}: {reconstruction.about}"
    yield (
        "calibration",
        f"{calibration['windows']} windows of {calibration['length']} tokens of "
        f"{inline(calibration['text']['source'])}, seed {calibration['seed']}, {calibration['dtype']}",
    )


def _removed_blocks(study: Project) -> list[int]:
    """Return the blocks without a weight that stays."""
    blocks = range(block_count(study.masks, "mask"))
    return [block for block in blocks if not any(keep.any() for keep in read_masks(study.masks, block).values())]


def _speed(pattern: str) -> str:
    """Return a sentence on the speed of the pruned model."""
    if structure := STRUCTURES.get(pattern):
        return f"The model is dense, with fewer {structure.about}; it runs like any other model of its family."
    if pattern == "unstructured":
        return "Unstructured sparsity does not speed up GPU inference."
    return f"A speed-up from {pattern} needs hardware and kernels for that pattern, which this model does not contain."


def _license(folder: Path, dense: Json) -> tuple[str | None, str]:
    """Return the dense model's licence: its name on the Hub, and a sentence."""
    files = sorted([*folder.glob("LICENSE*"), *folder.glob("NOTICE*")])
    names = ", ".join(code(file.name) for file in files)
    note = f"; the full text is in {names}" if files else ""
    if name := dense.get("license"):
        return name, f"{code(name)}, according to its own model card{note}."
    return ("other", f"See {names}.") if files else (None, UNKNOWN_LICENSE)
