"""The model card of a pruned model, in Markdown with the Hub's metadata."""

import json
from collections.abc import Mapping
from importlib.resources import files

from wanda_dvc.catalog import HUB_ID, STRUCTURES, methods
from wanda_dvc.plan import Plan
from wanda_dvc.results.markup import inline, table
from wanda_dvc.study.artifact import read_provenance
from wanda_dvc.study.files import Json
from wanda_dvc.study.folder import Study

ZEROS = """\
Zeros are stored like any number: the files are no smaller than the dense model's. Unstructured sparsity does not speed
up GPU inference; a pattern such as 2:4 does with hardware and kernels for it, which are not included."""
NO_LICENSE = "Unknown: the files of the dense model name none. Find it, and comply, before you share the model."


def card(study: Study, metrics: Json, sections: Mapping[str, str] | None = None) -> str:
    """Return the model card of a pruned model, with the `metrics` of `apply`, and more sections by title."""
    dense = read_provenance(study.model("dense"), "download model")
    masks = read_provenance(study.masks, "mask")
    choices, calibration = masks["params"], masks["calibration"]
    structure, method = STRUCTURES.get(choices["pattern"]), methods().get(choices["method"])
    percent = f"{100 * metrics['sparsity']:.4g} %"
    if structure:
        of_model = f"{100 * metrics['removed_parameters']:.4g} % of the model's parameters"
        what = f"{percent} of the {structure.about} were removed, {of_model}"
        limits = f"The model is dense, with fewer {structure.about}; it runs like any other model of its family."
    else:
        what = f"{percent} of the weights in the linear layers of the blocks are zero"
        limits = ZEROS
    chosen_by = inline(choices["method"])
    if method:  # else of a package that is not installed
        chosen_by += f" ({method.paper})"
    reconstruction = Plan.from_dict(choices).used_reconstruction
    counts = calibration["shares"]  # of each text
    settings = {
        "dense model": dense["source"],
        "sha256 of its files": f"{dense['sha256'][:12]}…",
        **choices,
        "measured sparsity": f"{metrics['sparsity']:.6f}",
        "calibration": f"{' + '.join(map(str, counts))} windows of {calibration['length']} tokens of "
        f"{calibration['text']['source']}, seed {calibration['seed']}, {calibration['dtype']}",
        **{f"config.json: {name}": value for name, value in masks.get("config", {}).items()},
    }
    folder, license_name = study.model("dense"), dense.get("license")
    names = [path.name for path in sorted([*folder.glob("LICENSE*"), *folder.glob("NOTICE*")])]
    licenses = [inline(name) for name in (license_name, *names) if name]
    metadata = {
        "base_model": dense["source"].partition("@")[0] if HUB_ID.fullmatch(dense["source"]) else None,
        "license": license_name or ("other" if names else None),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["pruned", choices["method"], "wanda-dvc"],
    }
    template = (files("wanda_dvc.results") / "card.md").read_text(encoding="utf-8")
    return template.format(
        metadata="\n".join(f"{key}: {json.dumps(value)}" for key, value in metadata.items() if value),
        source=inline(dense["source"]),
        what=what,
        method=chosen_by,
        kept=f"Kept weights: {reconstruction.name}: {reconstruction.about}.",
        settings=table(["setting", "value"], [(name, inline(value)) for name, value in settings.items()]),
        results="".join(f"\n## {title}\n\n{body}\n" for title, body in (sections or {}).items()),
        limits=limits,
        license=f"{', '.join(licenses)}, as its files have it." if licenses else NO_LICENSE,
    )
