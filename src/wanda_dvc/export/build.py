"""Build the pruned model of any experiment, with a card that says all that is known of it.

Everything is taken out of DVC's cache and git into the work folder; the workspace is only read.
"""

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tabulate import tabulate

from wanda_dvc.catalog import HUB_ID
from wanda_dvc.engine.checkpoint import Checkpoint
from wanda_dvc.errors import UserError
from wanda_dvc.params import Params
from wanda_dvc.stages import MODELS
from wanda_dvc.stages.apply import check_masks, measured_sparsity, prune
from wanda_dvc.study.files import Json
from wanda_dvc.study.presets import flatten, names, read_preset
from wanda_dvc.study.project import Project
from wanda_dvc.study.provenance import PROVENANCE, digest, read_provenance
from wanda_dvc.study.revisions import Revision
from wanda_dvc.views.show import HEADERS, comparison

# The Hub's name of a licence, by a phrase of its text.
LICENSES = {
    "llama3.1": "LLAMA 3.1 COMMUNITY LICENSE",
    "llama3": "META LLAMA 3 COMMUNITY LICENSE",
    "llama2": "LLAMA 2 COMMUNITY LICENSE",
    "apache-2.0": "Apache License",
    "mit": "MIT License",
}
UNKNOWN_LICENSE = (
    "Unknown: nothing that came with the dense model names one. Whoever passes this model on must find it out and "
    "keep to it."
)

CARD = """\
---
{metadata}
---
# {source}, pruned

{percent:g} % of the weights in the linear layers of every block are zero, chosen by {method}{citation}. Nothing was
trained afterwards; embeddings, norms and output head are the dense model's to the bit.

## What was done

{facts}

## What it costs

{results}

{notes}

## Licence of the dense model

{license}

## How to load it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

where = "path/to/this/directory"  # or its id on the Hub
model = AutoModelForCausalLM.from_pretrained(where)
tokenizer = AutoTokenizer.from_pretrained(where)
```

## What it does not give

{limits}

## How to repeat it

With wanda-dvc {version}, in a study of its own:

```
{commands}
```
{by_hand}"""


def export(*, project: Project, experiment: str | None, target: Path) -> str:
    """The pruned model of an experiment (name, commit, branch or tag; None: the workspace) in a new directory."""
    target = target.absolute()
    _check_target(target)
    with project.work({"kind": "export", "experiment": experiment}) as work:
        work.forget()  # links that an export which was killed has left
        study = Project(work.path / "study")
        study.root.mkdir(parents=True)
        if experiment is None:
            _take_workspace(project, study)
        else:
            _take_experiment(project, study, experiment)
        checkpoint = Checkpoint(study.model("dense"))
        zeros = prune(checkpoint, study.masks, work.out)
        _drop_metrics_of_others(study)
        (work.out / "README.md").write_text(card(study, measured_sparsity(zeros)), encoding="utf-8")
        work.publish(target)
    return f"{target}: the pruned model of {experiment or 'the workspace'}; its card is README.md"


def _check_target(target: Path) -> None:
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{target}: already there, expected a new or an empty directory; name another")
    beside = target.with_name(target.name + ".part")
    if beside.exists():
        raise UserError(f"{beside}: in the way of writing {target}; remove it, or name another directory")


# --- what an experiment is made of, in a folder laid out like a project ---


def _take_workspace(project: Project, study: Project) -> None:
    read_provenance(project.masks, "mask")
    read_provenance(project.model("dense"), "download model")
    study.model("dense").parent.mkdir()
    study.model("dense").symlink_to(project.model("dense"))
    study.masks.symlink_to(project.masks)
    shutil.copyfile(project.root / "params.yaml", study.root / "params.yaml")
    if (project.root / "metrics").is_dir():
        shutil.copytree(project.root / "metrics", study.root / "metrics")


def _take_experiment(project: Project, study: Project, experiment: str) -> None:
    """Out of git and the cache."""
    revision = Revision.open(project, experiment, otherwise="`wanda-dvc export DIRECTORY` takes the workspace")
    if not revision.take_whole("params.yaml", study):
        raise UserError(f"{experiment}: no params.yaml, expected an experiment of this study")
    if not revision.take_whole("masks", study):
        raise UserError(
            f"{experiment}: its masks are not in DVC's cache, expected all of masks/; `dvc pull --all-commits` fetches "
            f"them where a remote has them, `dvc exp apply {experiment}` and `dvc exp run` make them anew"
        )
    wanted = read_provenance(study.masks, "mask")["model"]
    here = project.model("dense")
    if (here / PROVENANCE).is_file() and read_provenance(here, "download model")["sha256"] == wanted["sha256"]:
        study.model("dense").parent.mkdir()
        study.model("dense").symlink_to(here)
    elif not revision.take_whole("models/dense", study):
        raise UserError(
            f"{experiment}: its dense model ({wanted['source']}) is not in DVC's cache, expected all of models/dense; "
            f"`dvc exp apply {experiment}` and `dvc exp run` fetch it"
        )
    for model in MODELS:
        revision.take_whole(f"metrics/{model}", study)
        revision.take_whole(f"metrics/details/{model}", study)


def _drop_metrics_of_others(study: Project) -> None:
    """A workspace may hold numbers of the experiment before. What stands behind each says whose it is."""
    made_from = check_masks(Checkpoint(study.model("dense")), study.masks)
    dense = read_provenance(study.model("dense"), "download model")
    for model, whose in zip(MODELS, (digest(dense), digest(made_from)), strict=True):
        for path in (study.root / "metrics" / model).rglob("*.json"):
            details = _json(study.root / "metrics/details" / path.relative_to(study.root / "metrics"))
            if details.get("protocol", {}).get("model", whose) != whose:
                path.unlink()


# --- the card ---


def card(study: Project, measured: float) -> str:
    """The README of an exported model, as the Hub reads it."""
    from huggingface_hub import ModelCardData

    masks = read_provenance(study.masks, "mask")
    dense = read_provenance(study.model("dense"), "download model")
    params, calibration = masks["params"], masks["calibration"]
    name, described = _license(study.model("dense"), dense)
    on_hub = HUB_ID.fullmatch(dense["source"]) is not None
    metadata = ModelCardData(
        base_model=dense["source"].partition("@")[0] if on_hub else None,
        license=name,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["pruned", params["method"], "wanda-dvc"],
    )
    unstructured = params["pattern"] == "unstructured"
    facts = {
        "dense model": f"`{dense['source']}` (sha256 of its files {dense['sha256'][:12]}…)",
        "method": f"`{params['method']}`",
        "sparsity": f"{params['sparsity']:g} wanted, {measured:.6f} measured, of the linear layers of every block",
        "pattern": f"`{params['pattern']}`",
        "group": f"weights compete within a {params['group']}" if unstructured else "neighbours along the input",
        "propagation": {
            "dense": "`dense`: every block calibrated on the outputs of dense blocks",
            "pruned": "`pruned`: every block calibrated on the outputs of the blocks pruned before it",
        }[params.get("propagation", "dense")],
        "calibration": f"{calibration['samples']} windows of {calibration['length']} tokens of "
        f"{calibration['text']['source']}, seed {calibration['seed']}, {calibration['dtype']}",
    }
    commands, by_hand = how_to_repeat(study.params)
    limits = "The zeros are stored like any other number: the files are no smaller than the dense model's. " + (
        "Zeros that stand anywhere make no GPU faster."
        if unstructured
        else f"Speed from {params['pattern']} needs hardware and kernels for that pattern, which loading alone does "
        "not bring."
    )
    return CARD.format(
        metadata=metadata.to_yaml(),
        source=dense["source"],
        percent=round(100 * measured, 2),
        method={"wanda": "Wanda", "magnitude": "magnitude"}.get(params["method"], params["method"]),
        citation=" ([Sun et al.](https://arxiv.org/abs/2306.11695))" if params["method"] == "wanda" else "",
        facts=tabulate(list(facts.items()), ["what", "value"], tablefmt="github", disable_numparse=True),
        results=tabulate(comparison(study), HEADERS, tablefmt="github", disable_numparse=True),
        notes="\n".join(f"- {note}" for note in _notes(study)),
        license=described,
        limits=limits,
        version=masks["wanda_dvc"],
        commands=commands,
        by_hand=by_hand,
    )


def _notes(study: Project) -> Iterator[str]:
    """How the numbers are to be read."""
    params = study.params
    protocols = [_json(study.details(model, "perplexity")).get("protocol") for model in MODELS]
    if protocol := protocols[1] or protocols[0]:
        yield (
            f"Perplexity: {protocol['windows']} windows of {protocol['length']} tokens of "
            f"{protocol['text']['source']} (sha256 {protocol['text']['sha256'][:12]}…), {protocol['dtype']}."
        )
    if any(_json(study.metrics(model, "perplexity")).get("perplexity") == "diverged" for model in MODELS):
        yield "`diverged`: the loss was not finite, or its exponential is no number any more."
    limit = params.zero_shot.limit
    yield (
        f"Zero-shot: no examples in the prompt, {f'the first {limit} items' if limit else 'all items'} of each task, "
        f"{params.dtype}; ± is one standard error, and differences of less than two are within luck."
    )
    if params.tasks.source == "samples":
        yield (
            "The tasks are samples, not benchmarks: questions written for wanda-dvc, which compare these two models "
            "and nothing else."
        )
    if any("–" in row[1:3] for row in comparison(study)[:-1]):
        yield "–: not measured on this model."


def _license(folder: Path, dense: Json) -> tuple[str | None, str]:
    """The licence that came with the dense model, as the Hub names it and in words."""
    from huggingface_hub import ModelCard

    files = sorted([*folder.glob("LICENSE*"), *folder.glob("NOTICE*")])
    beside = f"; the full text is in {', '.join(f'`{file.name}`' for file in files)}" if files else ""
    readme = folder / "README.md"
    text = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
    name = dense.get("license") or (ModelCard(text).data.get("license") if text.startswith("---") else None)
    if name:
        return name, f"`{name}`, as its own card says{beside}."
    for file in files:
        text = " ".join(file.read_text(encoding="utf-8", errors="replace").split()).lower()
        for name, phrase in LICENSES.items():
            if phrase.lower() in text:
                return name, f"`{name}`, going by `{file.name}`{beside}."
    if files:
        return "other", f"See {', '.join(f'`{file.name}`' for file in files)}."
    return None, UNKNOWN_LICENSE


def how_to_repeat(params: Params) -> tuple[str, str]:
    """Commands that run this experiment again, from the preset that needs the fewest changes; and what they can't say.

    A path says where something lay on the machine that ran it; only its last part is passed on.
    """
    wanted = {key: value for key, value in flatten(params.model_dump(mode="json")) if not key.startswith("runtime.")}
    for key in ("model", "calibration.text.source", "perplexity.text.source"):
        if Path(wanted[key]).is_absolute():
            wanted[key] = f"/path/to/{Path(wanted[key]).name}"
    changes = {
        preset.name: {key: value for key, value in wanted.items() if preset.settings[key] != value}
        for preset in map(read_preset, names())
    }
    name = min(changes, key=lambda name: len(changes[name]))
    words, by_hand = [], []
    for key, value in changes[name].items():
        if isinstance(value, str) and re.search(r"[\n\t\\\"$]", value):
            by_hand.append(f"`{key}: {json.dumps(value, ensure_ascii=False)}`")  # DVC's -S knows no escapes
        else:
            words.append(f"-S {shlex.quote(f'{key}={_override(value)}')}")
    commands = f"wanda-dvc preset {name}\n" + " \\\n    ".join(["dvc exp run", *words])
    return commands, f"\nafter setting {', '.join(by_hand)} in params.yaml.\n" if by_hand else ""


def _override(value: Any) -> str:
    """A value as `dvc exp run --set-param` reads it."""
    if isinstance(value, str) and not re.fullmatch(r"[A-Za-z/][\w./@:\-]*|\d+:\d+", value):
        return f'"{value}"'
    return "null" if value is None else f"[{','.join(value)}]" if isinstance(value, list) else f"{value}"


def _json(path: Path) -> Json:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
