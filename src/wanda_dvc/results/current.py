"""The rule for stale figures: figures are shown if the digests that they name are those of the artifacts next to them.

Two digests are known. `dvc.lock` has DVC's digest of each file that a stage read and wrote; a commit has it in place of
the artifacts. The details of figures name the digest of the measured model's provenance; the workspace may have another
model, as after a stage that was run by hand.
"""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wanda_dvc.errors import UserError, shortened
from wanda_dvc.params import check_params, nested
from wanda_dvc.reading import is_there
from wanda_dvc.results.measures import Results
from wanda_dvc.stages import MODELS, stage_inputs
from wanda_dvc.study.artifact import MODEL_COMMANDS, PROVENANCE, digest, read_provenance
from wanda_dvc.study.files import Json
from wanda_dvc.study.folder import Study
from wanda_dvc.study.lock import Lock, md5


def stale_stages(lock: Lock, settings: Mapping[str, Any]) -> list[str]:
    """Return the stages of a lock that have not run on the current inputs, and on these settings, by dotted name."""
    plan: dict[str, Json] = {}
    with contextlib.suppress(UserError):  # settings of another version
        plan = stage_inputs(check_params(nested(settings)))
    return lock.stale(plan)


def changed_files(lock: Lock, root: Path) -> set[str]:
    """Return the files below metrics/, by path, that are not those of the lock.

    They were written by a stage without DVC, or, after `git checkout` without `dvc checkout`, belong to another commit.
    """
    paths = [path for path in (root / "metrics").rglob("*") if path.is_file()]
    digests = {path.relative_to(root).as_posix(): md5(path.read_bytes()) for path in paths}
    return {name for name, content in digests.items() if lock.digests.get(name) != content}


def current_results(study: Study, lock: Lock) -> tuple[dict[str, Results], list[str]]:
    """Return a study's current results by model, and sentences on results that are left out.

    The study has the settings of the lock. Without a lock, as of stages that ran without DVC, all files count.
    """
    left_out, notes = set[str](), list[str]()
    if lock.stages:
        stale = stale_stages(lock, lock.settings)
        changed = changed_files(lock, study.root)
        left_out = changed | {path for path, stage in lock.writers.items() if stage in stale}
        rerun = [*stale, *(lock.writers.get(name, name) for name in sorted(changed) if name.endswith(".json"))]
        if rerun:
            names = shortened(list(dict.fromkeys(rerun)))
            notes.append(
                f"Left out, because inputs or files have changed since the run: {names}; run `dvc repro`, or "
                "`dvc checkout` after `git checkout`."
            )
    results = {model: Results.of(study, model, left_out=left_out) for model in MODELS}
    others = [*other_settings(study), *_other_masks(study)]
    if others and not lock.stages:  # then nothing says with which settings these models were measured
        results |= {"pruned": Results({}), "recovered": Results({})}
    for model in MODELS:
        expected = model_digest(study, model)
        measured = results[model].leave_out_others(expected) if expected else []
        if measured:
            notes.append(
                f"Left out, because measured on another models/{model} than the one here: {', '.join(measured)}; run "
                "`dvc repro`."
            )
    return results, [*notes, *others]


def model_digest(study: Study, model: str) -> str | None:
    """Return the digest of a model's provenance; None if the model is missing, or is not the one of masks/."""
    if not is_there(study.model(model) / PROVENANCE) or (model == "pruned" and _other_masks(study)):
        return None
    return digest(read_provenance(study.model(model), MODEL_COMMANDS[model]))


def _other_masks(study: Study) -> list[str]:
    if not is_there(study.model("pruned") / PROVENANCE):
        return []
    pruned = read_provenance(study.model("pruned"), MODEL_COMMANDS["pruned"])
    if pruned["masks"] == digest(read_provenance(study.masks, "mask")):
        return []
    return ["models/pruned belongs to another experiment than masks/: `dvc repro` writes this one's."]


def other_settings(study: Study) -> list[str]:
    """Return sentences if masks/ or models/recovered have other settings than the study, as after a stage by hand."""
    plan, sentences = stage_inputs(study.params), list[str]()
    for what, folder, stage, key in (
        ("masks/ were", study.masks, "mask", "params"),
        ("models/recovered was", study.model("recovered"), "recover", "recovery"),
    ):
        if not (plan[stage] and is_there(folder / PROVENANCE)):
            continue
        ran = read_provenance(folder, stage)[key]
        others = [f"{name}={value}" for name, value in ran.items() if plan[stage].get(name, value) != value]
        if others:
            sentences.append(f"{what} made with other settings: {', '.join(others)}; run `dvc repro`.")
    return sentences
