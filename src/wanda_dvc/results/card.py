"""The model card of a pruned model, in Markdown with the Hub's metadata."""

import json
from collections.abc import Mapping
from pathlib import Path

from wanda_dvc.catalog import HUB_ID, STRUCTURES, Structure, methods
from wanda_dvc.plan import UNSTRUCTURED, Plan
from wanda_dvc.results.markup import code, inline, table
from wanda_dvc.study.artifact import read_provenance
from wanda_dvc.study.files import Json
from wanda_dvc.study.folder import Study

CARD_TEMPLATE = """\
---
{metadata}
---
# {source}, pruned

{what}, chosen by {method}. {kept}

## Pruning

{settings}
{results}
## Load the model

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

where = "path/to/this/directory"  # or its id on the Hub
model = AutoModelForCausalLM.from_pretrained(where)
tokenizer = AutoTokenizer.from_pretrained(where)
```

## Limits

{limits}

## Licence of the dense model

{license}
"""


def card(study: Study, metrics: Json, results: Mapping[str, str] | None = None) -> str:
    """Return the model card of a pruned model, with the `metrics` of `apply`, and `results`, more sections by title."""
    dense = read_provenance(study.model("dense"), "download model")
    masks = read_provenance(study.masks, "mask")
    choices, structure = masks["params"], STRUCTURES.get(masks["params"]["pattern"])
    solver = Plan.from_dict(choices).reconstructor
    license_name, license_text = _license(study.model("dense"), dense)
    metadata = {
        "base_model": dense["source"].partition("@")[0] if HUB_ID.fullmatch(dense["source"]) else None,
        "license": license_name,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["pruned", choices["method"], "wanda-dvc"],
    }
    percent = f"{100 * metrics['sparsity']:.4g} %"
    what = f"{percent} of the weights in the linear layers of the blocks are zero"
    if structure:
        of_model = f"{100 * metrics['removed_parameters']:.4g} % of the model's parameters"
        what = f"{percent} of the {structure.about} were removed, {of_model}"
    return CARD_TEMPLATE.format(
        metadata="\n".join(f"{key}: {json.dumps(value)}" for key, value in metadata.items() if value),
        source=inline(dense["source"]),
        what=what,
        method=_method(choices["method"], structure),
        kept=f"Kept weights: {code(solver.name)}: {solver.about}.",
        settings=table(["setting", "value"], _settings_rows(dense, masks, metrics["sparsity"], structure)),
        results="".join(f"\n## {title}\n\n{body}\n" for title, body in (results or {}).items()),
        limits=_limits(choices["pattern"], structure),
        license=license_text,
    )


def _method(name: str, structure: Structure | None) -> str:
    method = methods().get(name)
    if method is None:  # of a missing package
        return inline(name)
    if structure and method.needs == "gram":
        return "the rise of the layer error after the others compensate (Hassibi and Stork 1993)"
    return f"{code(name)} ({method.paper})"


def _settings_rows(dense: Json, masks: Json, sparsity: float, structure: Structure | None) -> list[tuple[str, str]]:
    calibration = masks["calibration"]
    of = structure.about if structure else "linear layers of all blocks"
    return [
        ("dense model", code(dense["source"])),
        ("sha256 of its files", f"{dense['sha256'][:12]}…"),
        *((name, code(value)) for name, value in masks["params"].items()),
        ("measured sparsity", f"{sparsity:.6f} of the {of}"),
        (
            "calibration",
            f"{calibration['windows']} windows of {calibration['length']} tokens of "
            f"{inline(calibration['text']['source'])}, seed {calibration['seed']}, {calibration['dtype']}",
        ),
        *((f"config.json: {name}", code(value)) for name, value in masks.get("config", {}).items()),
    ]


def _limits(pattern: str, structure: Structure | None) -> str:
    if structure:
        return f"The model is dense, with fewer {structure.about}; it runs like any other model of its family."
    stored = "Zeros are stored like any number: the files are no smaller than the dense model's."
    if pattern == UNSTRUCTURED:
        return f"{stored} Unstructured sparsity does not speed up GPU inference."
    return f"{stored} A speed-up from {pattern} needs hardware and kernels for that pattern, which are not included."


def _license(folder: Path, dense: Json) -> tuple[str | None, str]:
    """Return the dense model's licence: its name on the Hub, and a sentence."""
    files = sorted([*folder.glob("LICENSE*"), *folder.glob("NOTICE*")])
    names = ", ".join(code(file.name) for file in files)
    note = f"; the full text is in {names}" if files else ""
    if name := dense.get("license"):
        return name, f"{code(name)}, according to its own model card{note}."
    if files:
        return "other", f"See {names}."
    return None, "Unknown: the files of the dense model name none. Find it, and comply, before you share the model."
