"""Build the pruned model of any experiment in a new directory.

The experiment's files are copied from DVC's cache and git into the work folder. The workspace is only read.
"""

import os
import shutil
from pathlib import Path

from wanda_dvc.errors import UserError
from wanda_dvc.export.card import results
from wanda_dvc.plan import Plan
from wanda_dvc.reading import check_place
from wanda_dvc.stages import MODELS
from wanda_dvc.stages.apply import describe_pruned, prune
from wanda_dvc.study.card import STORAGE, card
from wanda_dvc.study.details import is_of
from wanda_dvc.study.dvc import Revision
from wanda_dvc.study.files import Json, load_json, write_json
from wanda_dvc.study.project import TRACKED, Project, temporary_place
from wanda_dvc.study.provenance import PROVENANCE, digest, read_provenance, write_provenance
from wanda_dvc.study.ran import LOCK, Ran
from wanda_dvc.views.show import staleness


def export(*, project: Project, experiment: str | None, target: Path) -> str:
    """Write the pruned model of an experiment into a new directory that transformers loads.

    The experiment is a name, commit, branch or tag; None is the workspace.
    """
    target = check_place(target)
    _check_target(project, target)
    with project.work({"kind": "export", "experiment": experiment}) as work:
        work.forget()  # the links of a killed export
        study = Project(work.path / "study")
        study.root.mkdir(parents=True)
        if experiment is None:
            _take_workspace(project, study)
        else:
            _take_experiment(project, study, experiment)
        ran = Ran.of(study if experiment else project)
        _check_current(ran, experiment or "the workspace")
        study = study.with_params(ran.params)
        made_from = describe_pruned(study)
        written = prune(study, work.out)
        write_provenance(work.out, made_from)
        _drop_metrics_of_others(study, made_from)
        write_json(study.metrics("pruned", "sparsity"), written.metrics)
        sections = results(study, ran.outdated)
        text = card(
            study,
            written.metrics["sparsity"],
            removed=written.metrics.get("removed_parameters"),
            storage=STORAGE if written.removed is None else "",
            results=sections,
        )
        (work.out / "README.md").write_text(text, encoding="utf-8")
        work.publish(target)
    said = f"{target}: the pruned model of {experiment or 'the workspace'}; the model card is README.md"
    if ran.unmet:
        said += f"\nThe model and the model card are of the last run. {staleness(ran)}"
    return said


def _check_target(project: Project, target: Path) -> None:
    root, place = project.root.resolve(), target.resolve()
    if place.is_relative_to(root) and place.relative_to(root).parts[:1] in {(name,) for name in TRACKED}:
        raise UserError(f"{target}: inside {place.relative_to(root).parts[0]}/, which DVC or git tracks; name another")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{target}: exists already, expected a new or empty directory; name another")
    if target.exists() and (os.path.ismount(target) or not os.access(target.parent, os.W_OK | os.X_OK)):
        raise UserError(f"{target}: cannot be replaced by a new directory; name one inside it, such as {target}/model")
    if (temporary := temporary_place(target)).exists():
        raise UserError(
            f"{temporary}: exists already, expected a free name for the unfinished {target.name}; remove it, or name "
            "another directory"
        )


def _check_current(ran: Ran, what: str) -> None:
    """Raise UserError if the inputs of the masks have changed: no settings describe these masks."""
    if "mask" in ran.outdated:
        before = ", ".join(name for name in ran.outdated if name.startswith(("calibrate", "mask")))
        raise UserError(
            f"{what}: dvc.lock: the inputs of {before} changed after the run, expected masks of the current model and "
            "statistics; run `dvc repro`"
        )


# --- the parts of an experiment, in a folder laid out like a project ---


def _take_workspace(project: Project, study: Project) -> None:
    read_provenance(project.masks, "mask")
    read_provenance(project.model("dense"), "download model")
    study.link_to(project, ("models/dense", "masks", "stats", "weights"), ("params.yaml", LOCK))
    if (project.root / "metrics").is_dir():
        shutil.copytree(project.root / "metrics", study.root / "metrics")


def _take_experiment(project: Project, study: Project, experiment: str) -> None:
    """Take an experiment out of git and the cache."""
    revision = Revision.open(project.root, experiment, otherwise="without --rev, the workspace is exported")

    def take(part: str, what: str) -> None:
        if not revision.copy_all(part, study.root):
            raise UserError(
                f"{experiment}: {what} not in DVC's cache, expected all of {part}/; `dvc pull --all-commits` fetches "
                f"it from a remote that has it, `dvc exp apply {experiment}` and `dvc exp run` compute it again"
            )

    if not revision.copy_all("params.yaml", study.root):
        raise UserError(f"{experiment}: no params.yaml, expected an experiment of this study")
    revision.copy_all(LOCK, study.root)
    take("masks", "its masks are")
    try:
        study.params  # noqa: B018 - reads it
    except UserError as error:
        raise UserError(
            f"{experiment}: its settings are not those of this version ({error.problems[0]}); export it with the "
            "wanda-dvc that made it"
        ) from None
    made = read_provenance(study.masks, "mask")
    plan = Plan.read(made["params"])
    parts = {"weights": ["weights"], "gram": ["stats/gram"]}.get(plan.weights_come_from or "", [])
    if plan.weights_come_from == "gram" and plan.by_gradients:
        parts.append("stats/gradients")
    for part in parts:
        take(part, f"what reconstruction {plan.reconstruction.name} reads is")
    wanted = made["model"]
    here = project.model("dense")
    if (here / PROVENANCE).is_file() and read_provenance(here, "download model")["sha256"] == wanted["sha256"]:
        study.model("dense").parent.mkdir()
        study.model("dense").symlink_to(here)
    else:
        take("models/dense", f"its dense model ({wanted['source']}) is")
    for model in MODELS:
        revision.copy_all(f"metrics/{model}", study.root)
        revision.copy_all(f"metrics/details/{model}", study.root)


def _drop_metrics_of_others(study: Project, made_from: Json) -> None:
    """Drop a workspace's leftover metrics of another experiment. The details record the experiment of each."""
    dense = read_provenance(study.model("dense"), "download model")
    for model, whose in zip(MODELS, (digest(dense), digest(made_from)), strict=True):
        details = study.root / "metrics/details"
        for path in (details / model).rglob("*.json"):
            if not is_of(load_json(path), whose):
                (study.root / "metrics" / path.relative_to(details)).unlink(missing_ok=True)
                path.unlink()
