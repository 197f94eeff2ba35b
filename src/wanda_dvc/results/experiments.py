"""The experiments of a study: the workspace, and what git and DVC's cache have of experiments, branches, tags, commits.

Results belong to the settings in `dvc.lock`. Results of other runs are left out, and the notes say so.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from wanda_dvc.errors import UserError, shortened
from wanda_dvc.params import Params, resolved
from wanda_dvc.reading import is_there
from wanda_dvc.results.compare import DENSE
from wanda_dvc.results.listing import KINDS, SUCCESS, WORKSPACE, State, list_states
from wanda_dvc.results.measures import Results
from wanda_dvc.stages import MODELS, stage_inputs
from wanda_dvc.stages.runs import LOCK, Lock
from wanda_dvc.study.artifact import MODEL_COMMANDS, PROVENANCE, digest, read_provenance
from wanda_dvc.study.dvc import Revision
from wanda_dvc.study.folder import Study


@dataclass(eq=False)
class Experiment:
    """One set of settings and its results."""

    name: str  # of the experiment, branch, tag or commit; or `workspace`
    commit: str | None  # None for the workspace
    study: Study  # a folder with its params.yaml, dvc.lock and metrics/
    results: dict[str, Results]  # by model: dense, pruned, and recovered, empty without a recovery
    notes: list[str] = field(default_factory=list)  # sentences on results that are missing, stale, or of another run
    also: list[str] = field(default_factory=list)  # other names of the same results

    @property
    def params(self) -> Params:
        """The settings of its results."""
        return self.study.params

    @property
    def made(self) -> Results:
        """The results of the model that the settings make: recovered, or pruned."""
        return self.results["recovered" if self.params.recovery.tokens else "pruned"]

    @property
    def models(self) -> dict[str, Results]:
        """The results of the models that it has: without a recovery two."""
        return {model: one for model, one in self.results.items() if model != "recovered" or one.metrics}

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Every setting but `runtime` and `recipe`, by dotted name, with nulls replaced by their values."""
        return resolved(self.params)


# --- reading one ---


def workspace(study: Study) -> Experiment:
    """Read the results of the workspace, where its files are."""
    runs = Lock.read(study.root)
    others = runs.others(study.root)
    found = _experiment(study, WORKSPACE, None, runs, others)
    if unmet := runs.unmet(study.params):
        asked = ", ".join(f"{name}={value}".replace("\n", "\\n") for name, value in unmet.items())
        found.notes.append(f"params.yaml has {asked}, which has not run: `dvc repro` runs it.")
    if hidden := sorted(path for path in others - runs.outs(runs.stale()).keys() if path.endswith(".json")):
        found.notes.append(
            f"Left out, because dvc.lock has other results: {shortened(hidden)}; run `dvc repro`, or `dvc checkout` after "
            "`git checkout`."
        )
    found.notes += [*made_with_others(found), *_of_other_models(found)]
    return found


def made_with_others(experiment: Experiment) -> list[str]:
    """Return sentences if masks/ or models/recovered have other settings than the experiment, as by a stage by hand."""
    own_study, trained, found = experiment.study, stage_inputs(experiment.params)["recover"], list[str]()
    for what, folder, stage, part, settings in (
        ("masks/ were", own_study.masks, "mask", "params", experiment.settings),
        ("models/recovered was", own_study.model("recovered"), "recover", "recovery", trained),
    ):
        made = read_provenance(folder, stage)[part] if settings and is_there(folder / PROVENANCE) else {}
        if others := [f"{key}={value}" for key, value in made.items() if settings.get(key, value) != value]:
            found.append(f"{what} made with other settings: {', '.join(others)}; run `dvc repro`.")
    return found


def at(study: Study, name: str, folder: Path) -> Experiment:
    """Read an experiment, branch, tag or commit into an empty folder, as links into DVC's cache; or the workspace.

    UserError for an unknown name, one without settings, or with those of another version.
    """
    if name == WORKSPACE:
        return workspace(study)
    folder.mkdir(parents=True, exist_ok=True)
    own_study, revision = Study(folder), Revision.open(study.root, name)
    for part in ("params.yaml", LOCK):
        if revision.take(part, folder):
            raise UserError(f"{name}: no {part}, expected an experiment of this study that has run; run `dvc repro`")
    missing = revision.take("metrics", folder)
    runs = Lock.read(folder)
    found = _experiment(own_study, name, revision.commit, runs, runs.others(folder))
    if missing:
        found.notes.append(f"Not in DVC's cache, and so not read: {shortened(missing)}; `dvc pull` may fetch it.")
    return found


def _experiment(own_study: Study, name: str, commit: str | None, runs: Lock, others: set[str]) -> Experiment:
    made = own_study.with_params(runs.params(own_study.params))
    results = {model: Results.of(made, model, left_out=others) for model in MODELS}
    notes = [f"Stale: {', '.join(stale)}."] if (stale := runs.stale()) else []
    return Experiment(name, commit, made, results, notes)


def _of_other_models(experiment: Experiment) -> Iterator[str]:
    """Leave out results of other models than the workspace's, as after a stage run by hand; yield the reasons."""
    own_study = experiment.study
    for model, results in experiment.models.items():
        if not is_there(own_study.model(model) / PROVENANCE):
            continue  # models/pruned is not cached
        own = read_provenance(own_study.model(model), MODEL_COMMANDS[model])
        if model == "pruned" and own["masks"] != digest(read_provenance(own_study.masks, "mask")):
            yield "models/pruned belongs to another experiment than masks/: `dvc repro` writes this one's."
        elif others := results.keep_of(digest(own)):
            named = ", ".join(others)
            yield f"Left out, because measured on another models/{model} than the one here: {named}; run `dvc repro`."


# --- reading many ---


Excluded = list[tuple[str, str]]  # names, with the reasons


def collect(*, study: Study, revs: list[str], work: Path) -> tuple[list[Experiment], Excluded]:
    """Collect the workspace, branches, tags, and commits with experiments; or `revs` alone. Equal results are one.

    Also return those that are unfinished or have no results. Files from the cache are placed in `work`.
    """
    found: dict[str, Experiment] = {}
    excluded: Excluded = []
    named = [State(rev, rev, "experiment") for rev in revs]
    for place, state in enumerate(sorted(named or list_states(study), key=lambda one: KINDS.index(one.kind))):
        if state.state != SUCCESS:
            changes = ", ".join(f"{key}={value}" for key, value in state.changes.items())
            excluded.append((state.name, state.state.lower() + (f" ({changes})" if changes else "")))
            continue
        is_named = state.kind != "commit"
        try:
            one = at(study, state.rev, work / str(place))
            problem = "" if one.made.metrics else " ".join(one.notes) or "no results"
        except UserError as error:
            problem = error.problems[0]
        if not problem:
            one.name = state.name
            key = json.dumps([one.settings, one.results[DENSE].metrics, one.made.metrics], sort_keys=True)
            first = found.setdefault(key, one)
            if is_named and state.name not in (first.name, *first.also):
                first.also.append(state.name)
        elif is_named:  # an old commit without results needs no note
            excluded.append((state.name, problem))
    return list(found.values()), excluded
