"""The rule for stale results: results are shown only if the settings and models next to them are those of their run.

Two digests decide. `dvc.lock` has DVC's digest of each file that a stage read and wrote: after an edit of
metrics/pruned/sparsity.json, or a `git checkout` without `dvc checkout`, the file has another. The details of results
have the digest of the measured model's provenance: after `wanda-dvc apply` by hand, models/pruned has another.
"""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wanda_dvc.errors import UserError, shortened
from wanda_dvc.params import Params, check_params, nested
from wanda_dvc.results.measures import Results
from wanda_dvc.stages import MODELS, stage_inputs
from wanda_dvc.study.artifact import PROVENANCE, digest
from wanda_dvc.study.files import load_json
from wanda_dvc.study.folder import Study
from wanda_dvc.study.lock import Lock, md5

MADE_FROM = {"pruned": "masks", "recovered": "models/pruned"}


def valid_params(settings: Mapping[str, Any]) -> Params | None:
    """Return settings, nested or by dotted name, checked; None for those of another version."""
    with contextlib.suppress(UserError):
        return check_params(nested(settings))
    return None


def stale_stages(lock: Lock, settings: Mapping[str, Any]) -> list[str]:
    """Return the stages of a lock that have not run on the current inputs, and on settings as of `valid_params`."""
    params = valid_params(settings)
    return lock.stale(stage_inputs(params) if params else {})  # of another version, DVC's digests alone decide


def changed_files(lock: Lock, root: Path) -> set[str]:
    """Return the files below metrics/, by path, that are not those of the lock."""
    files = {path.relative_to(root).as_posix(): path for path in (root / "metrics").rglob("*") if path.is_file()}
    return {name for name, path in files.items() if lock.digests.get(name) != md5(path.read_bytes())}


def current_results(study: Study, lock: Lock) -> tuple[dict[str, Results], list[str]]:
    """Return a study's current results by model, and sentences on results that are left out.

    The study has the settings of the lock. Without a lock, as after stages by hand, only the provenance decides.
    """
    left_out, notes = set[str](), list[str]()
    if lock.stages:
        stale = stale_stages(lock, lock.settings)
        changed = changed_files(lock, study.root)
        left_out = changed | {path for path, stage in lock.writers.items() if stage in stale}
        known = ("", *study.params.perplexity.texts)  # dvc.lock keeps the stages of a removed text
        to_run = [stage for stage in stale if stage.partition("@")[2] in known]
        to_run += (lock.writers.get(name, name) for name in sorted(changed) if name.endswith(".json"))
        if to_run:
            names = shortened(list(dict.fromkeys(to_run)))
            notes.append(
                f"Left out, because inputs or files have changed since the run: {names}; run `dvc repro`, or "
                "`dvc checkout` after `git checkout`."
            )
    results = {model: Results.of(study, model, left_out=left_out) for model in MODELS}
    reasons, foreign = other_settings(study), unrelated_model(study)
    if foreign:
        reasons.append(f"models/{foreign} belongs to another experiment than {MADE_FROM[foreign]}/: run `dvc repro`.")
    if reasons and not lock.stages:  # then nothing says with which settings these models were measured
        results |= {"pruned": Results({}), "recovered": Results({})}
    for model in MODELS:
        provenance = load_json(study.model(model) / PROVENANCE)
        if not provenance or model == foreign == "pruned":
            continue  # DVC does not cache models/pruned: the figures may be those of the lock, whose model is not here
        others = results[model].leave_out_others(digest(provenance))
        if others:
            notes.append(
                f"Left out, because measured on another models/{model} than the one here: {', '.join(others)}; run "
                "`dvc repro`."
            )
    return results, [*notes, *reasons]


def unrelated_model(study: Study) -> str | None:
    """Return the first model that is not made from what is next to it now, if any."""
    for model, source in MADE_FROM.items():
        made_from = load_json(study.model(model) / PROVENANCE).get(Path(source).name)
        expected = load_json(study.root / source / PROVENANCE)
        if made_from and expected and made_from != digest(expected):
            return model
    return None


def other_settings(study: Study) -> list[str]:
    """Return sentences if masks/ or models/recovered have other settings than the study, as after a stage by hand."""
    inputs, sentences = stage_inputs(study.params), list[str]()  # by stage
    for what, folder, stage, key in (
        ("masks/ were", study.masks, "mask", "params"),
        ("models/recovered was", study.model("recovered"), "recover", "recovery"),
    ):
        ran = load_json(folder / PROVENANCE).get(key, {}) if inputs[stage] else {}
        different = [f"{name}={value}" for name, value in ran.items() if inputs[stage].get(name, value) != value]
        if different:
            sentences.append(f"{what} made with other settings: {', '.join(different)}; run `dvc repro`.")
    return sentences
