"""The experiments of a repository as rows: parameters, metrics, details and times.

`dvc.lock` says which numbers belong to which parameters. A stage that has not run on the current parameters or inputs
is stale, and so is every stage after it. Outputs of a stale stage are not read.
"""

import csv
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from wanda_dvc.errors import UserError
from wanda_dvc.params import Params
from wanda_dvc.stages import MODELS, times
from wanda_dvc.study.experiments import SUCCESS, WORKSPACE, Kind, list_experiments
from wanda_dvc.study.files import Json, load_json
from wanda_dvc.study.project import Project
from wanda_dvc.study.provenance import PROVENANCE
from wanda_dvc.study.ran import read_lock, stale_stages
from wanda_dvc.study.revisions import Revision
from wanda_dvc.study.settings import flatten
from wanda_dvc.study.times import Ledger

TAKEN = ("metrics", "stats")
# Whose hashes find the times of runs; they may be missing.
MADE = (
    "fisher/provenance.json",
    "fisher_gram/provenance.json",
    "gram/provenance.json",
    "masks/provenance.json",
    "models/dense/provenance.json",
    "data/calibration/provenance.json",
    "data/perplexity/provenance.json",
    "data/tasks",
)


@dataclass
class Row:
    """One set of parameters and its results."""

    name: str
    commit: str | None  # None: the workspace
    study: Project  # holds what could be read
    sizes: dict[str, int]  # bytes of its outs, by path, as DVC counted them
    hashes: dict[str, str]  # of its outs
    missing: list[str]  # paths that the cache lacks
    ledger: Ledger  # the times of all runs in the repository
    also: list[str] = field(default_factory=list)  # other names of the same results
    notes: list[str] = field(default_factory=list)
    _read: dict[Path, Json] = field(default_factory=dict, repr=False)  # a benchmark's answers are megabytes

    @property
    def params(self) -> Params:
        """The parameters that it ran with."""
        return self.study.params

    def whole(self, part: str) -> bool:
        """Whether nothing below a folder is missing from the cache."""
        return not any(path.split("/")[0] == part for path in self.missing)

    def settings(self) -> dict[str, Any]:
        """Every parameter but `runtime`, by dotted name."""
        content = flatten(self.params.model_dump(mode="json"))
        return {key: value for key, value in content if not key.startswith("runtime.")}

    def inputs(self) -> dict[str, str]:
        """The first digits of the SHA-256 of the dense model, of the tokens and of each task, where they are known."""
        found = {"models/dense": self._json(self.study.model("dense") / PROVENANCE).get("sha256")}
        found["data/perplexity"] = self.details("pruned", "perplexity").get("protocol", {}).get("tokens_sha256")
        for task in self.params.tasks.names:
            protocol = self.details("pruned", f"zero_shot/{task}").get("protocol", {})
            found[f"data/tasks/{task}"] = protocol.get("task", {}).get("sha256")
        return {path: digest[:8] for path, digest in found.items() if digest}

    def metric(self, model: str, name: str) -> Json:
        """A metrics file, such as `perplexity` of `dense`; {} if it is missing."""
        return self._json(self.study.metrics(model, name))

    def details(self, model: str, name: str) -> Json:
        """The protocol and the result of each window or item behind a metric; {} if missing."""
        return self._json(self.study.details(model, name))

    def _json(self, path: Path) -> Json:
        if path not in self._read:
            self._read[path] = load_json(path)
        return self._read[path]

    def plot(self, name: str) -> list[dict[str, str]]:
        """The lines of a plot's CSV file; [] if it is missing."""
        path = self.study.plots(name)
        if not path.is_file():
            return []
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    def times(self) -> dict[str, Json]:
        """By run, such as `zero-shot-pruned-piqa`: seconds, machine, device, peak memory, and `key`.

        Only of runs in this repository. Rows that share a run have the same key for it.
        """
        return times(self.study, self.ledger)


def peak_memory(times: dict[str, Json]) -> str | None:
    """The largest anonymous peak of the runs; the resident one, named so, where no anonymous peak is known."""
    for key, name in (("peak_anonymous_gb", ""), ("peak_resident_gb", " resident")):
        if peaks := [time[key] for time in times.values() if time.get(key) is not None]:
            return f"{max(peaks):.2f} GB{name}"
    return None


class Note(NamedTuple):
    """Why an experiment, a branch or the workspace is no row."""

    name: str
    text: str


class Unfinished(NamedTuple):
    """An experiment without results."""

    name: str
    state: str
    changes: str


@dataclass
class Collected:
    """The rows, and what is no row."""

    rows: list[Row]
    unfinished: list[Unfinished]
    notes: list[Note]


class _Candidate(NamedTuple):
    rev: str  # `workspace`, or a commit
    name: str
    kind: Kind


def collect(*, project: Project, model: str | None, revs: list[str], work: Path) -> Collected:
    """Collect the rows of the workspace, branches, tags, and commits with experiments; or of `revs` alone.

    `model`: only rows whose model's name contains it. Files taken out of the cache are placed in `work`.
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
        twin = rows.setdefault(identity(row), row)
        if twin is row:
            continue
        if candidate.kind < Kind.COMMIT and row.name not in (twin.name, *twin.also):
            twin.also.append(row.name)
        if len(row.missing) < len(twin.missing):  # the same results with more of their details
            twin.study, twin.missing = row.study, row.missing
    for row in rows.values():
        if row.missing:
            some = ", ".join(row.missing[:3]) + (f" and {len(row.missing) - 3} more" if len(row.missing) > 3 else "")
            row.notes.append(f"not in DVC's cache, and so not read: {some}; `dvc pull` may fetch it")
    return Collected(list(rows.values()), unfinished, notes)


def _states(project: Project, revs: list[str]) -> tuple[list[_Candidate], list[Unfinished]]:
    """The revisions to read, and the experiments that have not finished or have failed."""
    if revs:
        opened = [(Revision.open(project, rev, otherwise="").files.repo.get_rev(), rev) for rev in revs]
        return [_Candidate(commit, rev, Kind.EXPERIMENT) for commit, rev in opened], []
    every = list_experiments(project)
    found = [_Candidate(one.rev, one.name, one.kind) for one in every if one.state == SUCCESS]
    return found, [
        Unfinished(one.name, one.state, ", ".join(f"{key}={value}" for key, value in one.changes.items()))
        for one in every
        if one.state != SUCCESS
    ]


def _row(project: Project, candidate: _Candidate, folder: Path) -> Row | str:
    """The row; or, as text, why there is none."""
    study = Project(folder)
    folder.mkdir(parents=True)
    if candidate.rev == WORKSPACE:
        missing = _take_workspace(project, study)
    else:
        revision = Revision.open(project, candidate.rev, otherwise="")
        for part in ("params.yaml", "dvc.lock"):
            if revision.take(part, study):
                return f"no {part}: nothing has run"
        missing = [path for part in (*TAKEN, *MADE) for path in revision.take(part, study)]
    try:
        params = study.params
    except UserError as error:
        return str(error.problems[0])
    stages = read_lock(folder)
    outs = {out["path"]: out for stage in stages.values() for out in stage.get("outs", [])}
    notes, stale = [], stale_stages(stages, dict(flatten(params.model_dump(mode="json"))))
    dropped = {out["path"] for name in stale for out in stages[name].get("outs", [])}
    for path in list(_files(folder)):
        name = path.relative_to(folder).as_posix()
        if name in ("params.yaml", "dvc.lock"):
            continue
        out = outs.get(name) or next((outs[key] for key in outs if name.startswith(f"{key}/")), None)
        of_another = out and name.startswith("metrics/") and name in outs and _md5(path) != out["md5"]
        if out is None or out["path"] in dropped or of_another:
            path.unlink()
    if stale:
        notes.append(f"not run on these parameters, and left out: {', '.join(sorted(stale))}")
    # Missing masks/ need no note: only the key of a time is read from there.
    missing = [path for path in missing if path.split("/")[0] in TAKEN and path not in dropped]
    if not any((folder / "metrics").glob("pruned/*.json")):
        return "; ".join(notes) or "no results"
    sizes = {path: out.get("size", 0) for path, out in outs.items()}
    hashes = {path: out["md5"] for path, out in outs.items() if "md5" in out}
    commit = None if candidate.rev == WORKSPACE else candidate.rev
    return Row(candidate.name, commit, study, sizes, hashes, missing, project.times, notes=notes)


def _take_workspace(project: Project, study: Project) -> list[str]:
    for name in ("params.yaml", "dvc.lock"):
        source = project.root / name
        shutil.copyfile(source, study.root / name) if source.is_file() else (study.root / name).write_text("{}")
    for part in (*TAKEN, *MADE):
        whole = project.root / part
        for path in [whole] if whole.is_file() else _files(whole):
            place = study.root / path.relative_to(project.root)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(path)
    return []


def identity(row: Row) -> str:
    """A text that is equal for rows with the same parameters and the same numbers."""
    numbers = {f"{model}/{path.name}": path.read_text() for model in MODELS for path in _metric_files(row, model)}
    return json.dumps([row.settings(), numbers], sort_keys=True)


def _metric_files(row: Row, model: str) -> Iterable[Path]:
    return sorted(row.study.metrics(model, "x").parent.rglob("*.json"))


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
