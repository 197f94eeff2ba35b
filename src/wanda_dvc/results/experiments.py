"""The experiments of a study: the workspace, and what git and DVC's cache have of experiments, branches, tags, commits.

Results belong to the settings in `dvc.lock`. Results of other runs are left out, and the notes say so.
"""

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from wanda_dvc.errors import UserError, shortened
from wanda_dvc.params import Params, resolved
from wanda_dvc.results.compare import DENSE
from wanda_dvc.results.current import current_results
from wanda_dvc.results.listing import KINDS, SUCCESS, WORKSPACE, ListedRevision, listed_revisions
from wanda_dvc.results.measures import Results
from wanda_dvc.study.dvc import Revision
from wanda_dvc.study.folder import Study
from wanda_dvc.study.lock import LOCK, Lock


@dataclass(eq=False)
class Experiment:
    """One set of settings and its results."""

    name: str  # of the experiment, branch, tag or commit; or `workspace`
    commit: str | None  # None for the workspace
    study: Study  # a folder with its params.yaml, dvc.lock and metrics/
    results: dict[str, Results]  # by model: dense, pruned, and recovered, empty without a recovery
    notes: list[str] = field(default_factory=list)  # sentences on results that are missing, stale, or of another run

    @property
    def params(self) -> Params:
        """The settings of its results."""
        return self.study.params

    @property
    def final(self) -> Results:
        """The results of the model that the settings lead to."""
        return self.results["recovered" if self.params.recovery.tokens else "pruned"]

    @property
    def models(self) -> dict[str, Results]:
        """The results of the models that it has: without a recovery two."""
        return {model: results for model, results in self.results.items() if model != "recovered" or results.metrics}

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Every setting but `runtime` and `recipe`, by dotted name, with nulls replaced by their values."""
        return resolved(self.params)


def workspace(study: Study) -> Experiment:
    """Read the results of the workspace, where its files are."""
    experiment = _read(study, WORKSPACE, None)
    not_run = Lock.read(study.root).not_run(study.params)
    if not_run:
        requested = ", ".join(f"{name}={value!r}" for name, value in not_run.items())
        experiment.notes.insert(0, f"params.yaml has {requested}, which has not run: `dvc repro` runs it.")
    return experiment


def read_at(study: Study, name: str, folder: Path) -> Experiment:
    """Read an experiment, branch, tag or commit into an empty folder, as links into DVC's cache; or the workspace."""
    if name == WORKSPACE:
        return workspace(study)
    folder.mkdir(parents=True, exist_ok=True)
    revision = Revision.open(study.root, name)
    for file in ("params.yaml", LOCK):  # `take` returns the files that are missing
        if revision.take(file, folder):
            raise UserError(f"{name}: no {file}, expected an experiment of this study that has run; run `dvc repro`")
    missing = revision.take("metrics", folder)
    experiment = _read(Study(folder), name, revision.commit)
    if missing:
        experiment.notes.append(f"Not in DVC's cache, and so not read: {shortened(missing)}; `dvc pull` may fetch it.")
    return experiment


def _read(study: Study, name: str, commit: str | None) -> Experiment:
    lock = Lock.read(study.root)
    study = study.with_params(lock.params(study.params))
    results, notes = current_results(study, lock)
    return Experiment(name, commit, study, results, notes)


Excluded = list[tuple[str, str]]  # names, with the reasons


def collect(*, study: Study, revs: list[str], work: Path) -> tuple[list[Experiment], Excluded]:
    """Collect the workspace, branches, tags, and commits with experiments; or `revs` alone. Equal results are one.

    Also return those that are unfinished, equal or without results. Files from the cache are placed in `work`.
    """
    revisions = [ListedRevision(rev, rev, "experiment") for rev in revs] or listed_revisions(study)
    experiments: dict[str, Experiment] = {}
    excluded: Excluded = []
    for index, revision in enumerate(sorted(revisions, key=lambda revision: KINDS.index(revision.kind))):
        if revision.status != SUCCESS:
            changes = [f"{key}={value}" for key, value in revision.changes.items()]
            excluded.append((revision.name, ", ".join([revision.status, *changes])))
            continue
        try:
            experiment = read_at(study, revision.rev, work / str(index))
        except UserError as error:
            excluded.append((revision.name, error.problems[0]))
            continue
        if not experiment.final.metrics:
            excluded.append((revision.name, " ".join(experiment.notes) or "no results"))
            continue
        experiment.name = revision.name  # it was read by its commit
        measured = [experiment.settings, experiment.results[DENSE].metrics, experiment.final.metrics]
        first = experiments.setdefault(json.dumps(measured, sort_keys=True), experiment)
        if revision.name != first.name:
            excluded.append((revision.name, f"equal to {first.name}"))
    return list(experiments.values()), excluded
