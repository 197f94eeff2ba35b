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

from ruamel.yaml import YAML

from wanda_dvc.errors import UserError
from wanda_dvc.params import Params
from wanda_dvc.stages import MODELS, times
from wanda_dvc.study.files import Json, load_json
from wanda_dvc.study.project import Project
from wanda_dvc.study.revisions import Revision
from wanda_dvc.study.settings import flatten
from wanda_dvc.study.times import Times

TAKEN = ("metrics", "stats")
# Whose hashes find the times of runs; they may be missing.
MADE = (
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
    ledger: Times  # the times of all runs in the repository
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


def machine_of(time: Json) -> str:
    """The machine and device of a time."""
    return f"{time['machine']}, {time['device']}"


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
    kind: int  # in which order names are preferred: experiment, branch or tag, workspace, commit


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
            if candidate.kind < 3:  # an old commit without results needs no note
                notes.append(Note(candidate.name, row))
            continue
        if model and model.lower() not in row.params.model.lower():
            continue
        twin = rows.setdefault(identity(row), row)
        if twin is row:
            continue
        if candidate.kind < 3 and row.name not in (twin.name, *twin.also):
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
    from dvc.exceptions import DvcException, NotDvcRepoError
    from dvc.repo import Repo
    from dvc.scm import NoSCM

    try:
        repo = Repo(str(project.root))
    except NotDvcRepoError:
        raise UserError(
            f"{project.root}: no DVC repository, expected one with experiments; `wanda-dvc show` needs none"
        ) from None
    if isinstance(repo.scm, NoSCM):
        raise UserError(f"{project.root}: no git repository, expected one with experiments; run `git init`")
    with repo:
        if revs:
            opened = [(Revision.open(project, rev, otherwise="").files.repo.get_rev(), rev) for rev in revs]
            return [_Candidate(commit, rev, 0) for commit, rev in opened], []
        try:
            states = repo.experiments.show(all_branches=True, all_tags=True, all_commits=True)
        except DvcException as error:
            raise UserError(
                f"{project.root}: DVC can't list its experiments ({error}); look at `dvc exp show`"
            ) from None
        except OSError as error:  # DVC reads files of an experiment that never began
            raise UserError(
                f"{project.root}: DVC can't list its experiments ({error}); one that was killed may still count as "
                "running: `dvc queue status` names it, `dvc queue kill NAME` clears it"
            ) from None
        found: list[_Candidate] = []
        unfinished: dict[str, Unfinished] = {}
        for state in states:
            name = state.name or (state.rev if state.rev == "workspace" else state.rev[:7])
            kind = 2 if state.rev == "workspace" else 1 if state.name else 3
            if kind < 3 or state.experiments:  # an older commit of a branch is no result of today
                found.append(_Candidate(state.rev, name, kind))
            base = _settings_of(state)
            for experiment in state.experiments or []:
                last = experiment.revs[0]
                title = experiment.name or last.name or last.rev[:7]
                running = experiment.executor.state if experiment.executor else "success"
                if running in ("success", None) and last.data is not None:
                    found.append(_Candidate(last.rev, title, 0))
                else:
                    state_name = running if running != "success" else f"unreadable: {last.error.msg}"
                    unfinished[last.rev] = Unfinished(title, state_name, _changes(base, _settings_of(last)))
    done = {candidate.rev for candidate in found}
    return found, [one for rev, one in unfinished.items() if rev not in done]


def _settings_of(state: Any) -> dict[str, Any]:
    files = state.data.params if state.data else {}
    return dict(flatten(files.get("params.yaml", {}).get("data") or {}))


def _changes(base: dict[str, Any], own: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in own.items() if base.get(key) != value)


def _row(project: Project, candidate: _Candidate, folder: Path) -> Row | str:
    """The row; or, as text, why there is none."""
    study = Project(folder)
    folder.mkdir(parents=True)
    if candidate.rev == "workspace":
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
    lock = YAML(typ="safe", pure=True).load((folder / "dvc.lock").read_text(encoding="utf-8")) or {}
    stages = lock.get("stages") or {}
    outs = {out["path"]: out for stage in stages.values() for out in stage.get("outs", [])}
    notes, stale = [], stale_stages(stages, params)
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
    commit = None if candidate.rev == "workspace" else candidate.rev
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


def stale_stages(stages: Json, params: Params) -> set[str]:
    """The stages of a dvc.lock that ran on other parameters, or on inputs that have been made again since."""
    settings = dict(flatten(params.model_dump(mode="json")))
    made = {out["path"]: (name, out.get("md5")) for name, stage in stages.items() for out in stage.get("outs", [])}
    stale = set()
    for name, stage in stages.items():  # in any order: the stages after them are found below
        asked = dict(flatten((stage.get("params") or {}).get("params.yaml") or {}))
        if any(key in settings and settings[key] != value for key, value in asked.items()):
            stale.add(name)
    waiting = True
    while waiting:
        waiting = False
        for name, stage in stages.items():
            for dep in stage.get("deps", []):
                maker = _maker(dep["path"], made)
                if maker is None or name in stale:
                    continue
                whole = made.get(dep["path"])
                if maker in stale or (whole and whole[1] != dep.get("md5")):
                    stale.add(name)
                    waiting = True
    return stale


def _maker(path: str, made: dict[str, tuple[str, Any]]) -> str | None:
    for out, (name, _) in made.items():
        if path == out or path.startswith(f"{out}/"):
            return name
    return None


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
