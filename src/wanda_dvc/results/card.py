"""The model card of a pruned model, in Markdown with the Hub's metadata."""

import json
from collections.abc import Mapping
from pathlib import Path

from wanda_dvc.catalog import HUB_ID, STRUCTURES, methods
from wanda_dvc.plan import Plan
from wanda_dvc.results.markup import code, inline, table
from wanda_dvc.study.artifact import read_provenance
from wanda_dvc.study.files import Json
from wanda_dvc.study.folder import Study

UNKNOWN_LICENSE = (
    "Unknown: the files of the dense model name none. Find the licence, and comply with it, before you share the model."
)
CARD = """\
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
    sparsity = metrics["sparsity"]
    masks = read_provenance(study.masks, "mask")
    dense = read_provenance(study.model("dense"), "download model")
    license_name, license_text = _license(study.model("dense"), dense)
    params, text, calibration = masks["params"], masks["calibration"]["text"], masks["calibration"]
    pattern, structure = params["pattern"], STRUCTURES.get(params["pattern"])
    metadata = {
        "base_model": dense["source"].partition("@")[0] if HUB_ID.fullmatch(dense["source"]) else None,
        "license": license_name,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["pruned", params["method"], "wanda-dvc"],
    }
    settings = {
        "dense model": code(dense["source"]),
        "sha256 of its files": f"{dense['sha256'][:12]}…",
        **{name: code(value) for name, value in params.items()},
        "measured sparsity": f"{sparsity:.6f} of the {structure.about if structure else 'linear layers of all blocks'}",
        "calibration": f"{calibration['windows']} windows of {calibration['length']} tokens of "
        f"{inline(text['source'])}, seed {calibration['seed']}, {calibration['dtype']}",
        **{f"config.json: {name}": code(value) for name, value in masks.get("config", {}).items()},
    }
    what = f"{100 * sparsity:.4g} % of the weights in the linear layers of the blocks are zero"
    if structure:
        what = f"{100 * sparsity:.4g} % of the {structure.about} were removed, "
        what += f"{100 * metrics['removed_parameters']:.4g} % of the model's parameters"
        limits = f"The model is dense, with fewer {structure.about}; it runs like any other model of its family."
    else:
        limits = "Zeros are stored like any number: the files are no smaller than the dense model's. " + (
            "Unstructured sparsity does not speed up GPU inference."
            if pattern == "unstructured"
            else f"A speed-up from {pattern} needs hardware and kernels for that pattern, which are not included."
        )
    method = methods().get(params["method"])  # None: of a missing package
    cited = f"{code(params['method'])} ({method.paper})" if method else inline(params["method"])
    chosen = Plan.read(params).solver
    if structure and method and method.needs == "gram":
        cited = "the rise of the layer error after the others compensate (Hassibi and Stork 1993)"
    return CARD.format(
        metadata="\n".join(f"{key}: {json.dumps(value)}" for key, value in metadata.items() if value),
        source=inline(dense["source"]),
        what=what,
        method=cited,
        kept=f"Weights that stay: {code(chosen.name)}: {chosen.about}.",
        settings=table(["setting", "value"], list(settings.items())),
        results="".join(f"\n## {title}\n\n{body}\n" for title, body in (results or {}).items()),
        limits=limits,
        license=license_text,
    )


def _license(folder: Path, dense: Json) -> tuple[str | None, str]:
    """Return the dense model's licence: its name on the Hub, and a sentence."""
    files = sorted([*folder.glob("LICENSE*"), *folder.glob("NOTICE*")])
    names = ", ".join(code(file.name) for file in files)
    note = f"; the full text is in {names}" if files else ""
    if name := dense.get("license"):
        return name, f"{code(name)}, according to its own model card{note}."
    return ("other", f"See {names}.") if files else (None, UNKNOWN_LICENSE)
