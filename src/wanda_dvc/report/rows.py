"""The experiments of a repository as rows: parameters, metrics and details.

`dvc.lock` connects numbers with parameters. A stage is stale if it has not run on the current parameters or inputs;
then all later stages are stale too. Outputs of a stale stage are not read.
"""

import csv
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from wanda_dvc.catalog import RECIPES, Recipe
from wanda_dvc.errors import UserError
from wanda_dvc.params import Params
from wanda_dvc.plan import CHOICES, UNSTRUCTURED
from wanda_dvc.report.formatting import setting
from wanda_dvc.report.measures import Measured, mean_layer_error
from wanda_dvc.study.dvc import Revision
from wanda_dvc.study.experiments import SUCCESS, WORKSPACE, Experiment, Kind, list_experiments
from wanda_dvc.study.files import Json, load_json
from wanda_dvc.study.project import Project
from wanda_dvc.study.provenance import PROVENANCE
from wanda_dvc.study.ran import md5, read_lock, stale_stages, without_removed_texts
from wanda_dvc.study.settings import flatten, resolved

TAKEN = ("metrics",)
MADE = ("models/dense/provenance.json",)  # it may be missing


@dataclass
class Row:
    """One set of parameters and its results."""

    name: str
    commit: str | None  # None: the workspace
    study: Project  # holds the readable files
    outs: dict[str, Json]  # of each output in dvc.lock, by path: its hash and size
    missing: list[str]  # paths missing in the cache
    also: list[str] = field(default_factory=list)  # other names of the same results
    notes: list[str] = field(default_factory=list)
    text: str = ""  # the text of its results; "": the first

    def on(self, text: str) -> "Row":
        """Return the row with its results on another text."""
        return replace(self, text=text)

    @property
    def params(self) -> Params:
        """The parameters of its run."""
        return self.study.params

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Every parameter but `runtime` and `recipe`, by dotted name, with nulls replaced by their values."""
        return resolved(self.params)

    @property
    def damage(self) -> str | None:
        """The first problem of the files of results, if any."""
        try:
            for text in self.params.perplexity.texts:
                one = self.on(text)
                one.dense, one.pruned  # reads them  # noqa: B018
            mean_layer_error(self.study)
        except UserError as error:
            return str(error.problems[0]).removeprefix(f"{self.study.root}/")
        return None

    @cached_property
    def dense(self) -> Measured:
        """The dense model's results."""
        return Measured.of(self.study, "dense", self.text)

    @cached_property
    def pruned(self) -> Measured:
        """The pruned model's results."""
        return Measured.of(self.study, "pruned", self.text)

    @cached_property
    def recipe(self) -> tuple[int, int, str]:
        """The nearest recipe of the row's method: its place, the number of different choices, and both in words.

        A method without a recipe counts as a separate recipe, after all others.
        """
        plan, known = self.params.plan, list(RECIPES.values())
        names = [name for name in CHOICES if plan.pattern == UNSTRUCTURED or name not in ("group", "allocation")]
        strength = ["allocation_strength"] if plan.strength != plan.allocation.strength else []
        found = []
        for place, recipe in enumerate([*known, Recipe(name=plan.method.name, about="", method=plan.method.name)]):
            if recipe.method == plan.method.name:
                differing = [name for name in names if self.settings[name] != getattr(recipe, name)] + strength
                words = ", ".join(f"{name}={self.settings[name]}" for name in differing)
                name = f"{recipe.name} ({words})" if words else recipe.name
                found.append((place == len(known), len(differing), place, name))
        _, count, place, text = min(found)
        return place, count, text

    @property
    def sparsity(self) -> str:
        """The sparsity in percent."""
        return f"{100 * self.params.sparsity:g} %"

    @property
    def pattern(self) -> str:
        """The pattern as an addition to a name; empty if unstructured."""
        return "" if self.params.pattern == UNSTRUCTURED else f" {self.params.pattern}"

    @cached_property
    def removed(self) -> float | None:
        """The share of all parameters that went with complete units; None: zeros are stored, or it is unknown."""
        found: float | None = load_json(self.study.metrics("pruned", "sparsity")).get("removed_parameters")
        return found

    @property
    def amount(self) -> str:
        """The pattern n:m, or the sparsity in percent."""
        return self.params.pattern if ":" in self.params.pattern else self.sparsity

    def inputs(self) -> dict[str, str]:
        """The first digits of the known SHA-256 of the dense model, the tokens and each task; the stages' versions."""
        found = {"models/dense": load_json(self.study.model("dense") / PROVENANCE).get("sha256")}
        for text in self.params.perplexity.texts:
            protocol = self.on(text).pruned.windows.get("protocol", {})
            found[f"data/perplexity/{text}"] = protocol.get("tokens_sha256")
            found["perplexity --version"] = protocol.get("version")
        found |= {f"data/tasks/{task}": self.pruned.digest(task) for task in self.params.tasks.names}
        for task in self.pruned.tasks.values():
            found["zero-shot --version"] = task["protocol"].get("version")
            found["items of a task"] = task["protocol"].get("limit")
        return {path: str(value)[:8] for path, value in found.items() if value}

    def plot(self, name: str) -> list[dict[str, str]]:
        """The lines of a plot's CSV file; [] if it is missing."""
        path = self.study.plots(name)
        return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines())) if path.is_file() else []


class Note(NamedTuple):
    """The reason for the exclusion of an experiment, a branch or the workspace."""

    name: str
    text: str


@dataclass
class Collected:
    """The rows, and the excluded experiments."""

    rows: list[Row]
    unfinished: list[Note]  # experiments without results
    notes: list[Note]


def collect(*, project: Project, model: str | None, revs: list[str], work: Path) -> Collected:
    """Collect the rows of the workspace, branches, tags, and commits with experiments; or of `revs` alone.

    `model` selects rows by a part of the model's name. Files from the cache are placed in `work`.
    """
    candidates, unfinished = _states(project, revs)
    rows: dict[str, Row] = {}
    notes = []
    for candidate in sorted(candidates, key=lambda one: one.kind):
        folder = work / candidate.rev
        shutil.rmtree(folder, ignore_errors=True)
        row = _row(project, candidate, folder)
        if isinstance(row, str):
            if candidate.kind < Kind.COMMIT:  # an old commit without results needs no note
                notes.append(Note(candidate.name, row))
            continue
        if model and model.lower() not in row.params.model.lower():
            continue
        twin = rows.setdefault(key := identity(row), row)
        if twin is row:
            continue
        if candidate.kind < Kind.COMMIT and row.name not in (twin.name, *twin.also):
            twin.also.append(row.name)
        if len(row.missing) < len(twin.missing):  # the same results with more of their details
            rows[key] = replace(twin, study=row.study, missing=row.missing)
    for row in rows.values():
        if row.missing:
            some = ", ".join(row.missing[:3]) + (f" and {len(row.missing) - 3} more" if len(row.missing) > 3 else "")
            row.notes.append(f"not in DVC's cache, and so not read: {some}; `dvc pull` may fetch it")
    return Collected(list(rows.values()), unfinished, notes)


def _states(project: Project, revs: list[str]) -> tuple[list[Experiment], list[Note]]:
    """Return the revisions to read, and the unfinished and failed experiments."""
    if revs:
        opened = [(Revision.open(project.root, rev, otherwise="").commit, rev) for rev in revs]
        return [Experiment(rev, commit, Kind.EXPERIMENT, SUCCESS, {}, {}, {}, {}) for commit, rev in opened], []
    every = list_experiments(project)
    unfinished = []
    for one in every:
        changes = ", ".join(f"{key}={setting(value)}" for key, value in one.changes.items())
        if one.state != SUCCESS:
            unfinished.append(Note(one.name, one.state.lower() + (f" ({changes})" if changes else "")))
    return [one for one in every if one.state == SUCCESS], unfinished


def _row(project: Project, candidate: Experiment, folder: Path) -> Row | str:
    """Return the row, or the reason for its exclusion as text."""
    study = Project(folder)
    folder.mkdir(parents=True)
    if candidate.rev == WORKSPACE:
        missing = _take_workspace(project, study)
    else:
        revision = Revision.open(project.root, candidate.rev, otherwise="")
        for part in ("params.yaml", "dvc.lock"):
            if revision.take(part, study.root):
                return f"no {part}: nothing has run"
        missing = [path for part in (*TAKEN, *MADE) for path in revision.take(part, study.root)]
    try:
        params = study.params
    except UserError as error:
        return f"its settings are not those of this version ({error.problems[0]})"
    stages = read_lock(folder)
    outs = {out["path"]: out for stage in stages.values() for out in stage.get("outs", [])}
    notes, stale = [], stale_stages(stages, dict(flatten(params.model_dump(mode="json"))))
    dropped = {out["path"] for name in stale for out in stages[name].get("outs", [])}
    for path in list(_files(folder)):
        name = path.relative_to(folder).as_posix()
        if name in ("params.yaml", "dvc.lock"):
            continue
        out = outs.get(name) or next((outs[key] for key in outs if name.startswith(f"{key}/")), None)
        of_another = out and name.startswith("metrics/") and name in outs and md5(path) != out["md5"]
        if out is None or out["path"] in dropped or of_another:
            path.unlink()
    if left_out := without_removed_texts(stale, params):
        notes.append(f"not run on these parameters, and left out: {', '.join(sorted(left_out))}")
    missing = [path for path in missing if path.startswith(TAKEN) and path not in dropped]
    if not any((folder / "metrics/pruned").rglob("*.json")):
        return "; ".join(notes) or "no results"
    commit = None if candidate.rev == WORKSPACE else candidate.rev
    row = Row(candidate.name, commit, study, outs, missing, notes=notes)
    return row.damage or row


def _take_workspace(project: Project, study: Project) -> list[str]:
    for name in ("params.yaml", "dvc.lock"):
        source = project.root / name
        shutil.copyfile(source, study.root / name) if source.is_file() else (study.root / name).write_text("{}")
    for part in (*TAKEN, *MADE):
        source = project.root / part
        for path in [source] if source.is_file() else _files(source):
            place = study.root / path.relative_to(project.root)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(path)
    return []


def identity(row: Row) -> str:
    """Return a text that is equal for rows with equal parameters and numbers."""
    texts = [row.on(text) for text in row.params.perplexity.texts]
    numbers = [[model.perplexity, model.accuracies] for one in texts for model in (one.dense, one.pruned)]
    return json.dumps([row.settings, numbers], sort_keys=True)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())
