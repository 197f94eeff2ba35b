"""The states of a repository, as DVC lists them: experiments, branches, tags, commits and the workspace."""

import contextlib
from collections.abc import Iterator, Mapping
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

from wanda_dvc.errors import UserError
from wanda_dvc.results.measures import ON_TEXT, Results
from wanda_dvc.stages import MODELS
from wanda_dvc.stages.runs import LOCK, Runs, md5
from wanda_dvc.study import dvc
from wanda_dvc.study.files import Json, load_json, write_json
from wanda_dvc.study.project import Project
from wanda_dvc.study.settings import flatten

WORKSPACE = "workspace"
SUCCESS = "success"
SOURCE = ".source"


class Kind(IntEnum):
    """The kind of a state. If states share results, the lowest kind names them."""

    EXPERIMENT, BRANCH, WORKSPACE, COMMIT = range(4)  # a branch or a tag; a commit without either


class State(NamedTuple):
    """One state of the study: an experiment, a branch or tag, a commit, or the workspace."""

    name: str
    rev: str  # a commit, or `workspace`
    kind: Kind
    state: str  # `success`, or the reason for missing results: `failed`, `queued`, `running`, `unreadable: …`
    settings: Mapping[str, Any]  # by dotted name
    changes: Mapping[str, Any]  # of the settings, against its base commit
    metrics: Mapping[str, Json]  # by path; of an experiment without success, the base commit's
    runs: Runs

    def stale(self, root: Path) -> bool:
        """Whether some of its numbers are left out."""
        return self.state == SUCCESS and len(self.own(root)) < len(self.metrics)

    def own(self, root: Path) -> dict[str, Json]:
        """Return the metrics measured with its settings, by path; `root` is the workspace's."""
        if self.state != SUCCESS:
            return {}
        stale = self.runs.stale_for(self.settings)
        ran = [one for name, one in self.runs.stages.items() if name not in stale]
        outs = [out["path"] for one in ran for out in one.get("outs", [])]
        if self.rev == WORKSPACE:  # a stage run by hand, or `git checkout`, leaves other files there
            outs = [path for path in outs if (root / path).is_file() and md5(root / path) == self.runs.made[path]]
        return {path: content for path, content in self.metrics.items() if path in outs}

    def results(self, root: Path) -> dict[str, Results]:
        """Return the results of the two models, without details."""
        own, found = self.own(root), {}
        named = [key.removeprefix("perplexity.texts.") for key in self.settings if key.startswith("perplexity.texts.")]
        for model in MODELS:
            folder = f"metrics/{model}/"
            below = {path.removesuffix(".json"): content for path, content in own.items() if path.startswith(folder)}
            numbers = {path.removeprefix(folder): content for path, content in below.items()}
            texts = [name.removesuffix(SOURCE) for name in named if name.endswith(SOURCE)]
            found[model] = Results(numbers, [text for text in texts if ON_TEXT + text in numbers])
        return found


def list_states(project: Project) -> list[State]:
    """Return the workspace, branches, tags, commits with experiments, and all experiments, each before its own.

    UserError without a repository, or if DVC cannot list it.
    """
    with dvc.repository(project.root, "`wanda-dvc show` needs none") as repo:
        found = list(_states(dvc.states(project.root, repo), dvc.below(project.root, repo.root_dir)))
        done = {one.rev for one in found if one.state == SUCCESS}
        found = [one for one in found if one.state == SUCCESS or one.rev not in done]
        runs = _runs(project, repo, [one.rev for one in found])
        return [one._replace(runs=runs[one.rev]) for one in found]


def _states(states: list[Any], below: str) -> Iterator[State]:
    """Yield the states of a study in a folder of the repository, such as `studies/a/`, or in its root."""
    here: State | None = None
    for state in states:
        kind = Kind.WORKSPACE if state.rev == WORKSPACE else Kind.BRANCH if state.name else Kind.COMMIT
        name = state.name or (state.rev if kind is Kind.WORKSPACE else state.rev[:7])
        own, metrics = _settings(state, below), _metrics(state, below)
        if kind is Kind.WORKSPACE:
            here = State(name, state.rev, kind, SUCCESS, own, {}, metrics, Runs({}))
            continue
        if here:  # DVC lists it before its base commit
            yield here._replace(changes=_changes(own, here.settings))
            here = None
        if kind < Kind.COMMIT or state.experiments:  # results of a branch's older commits are not current
            yield State(name, state.rev, kind, SUCCESS, own, {}, metrics, Runs({}))
        for experiment in state.experiments or []:
            last = experiment.revs[0]
            running = (experiment.executor.state if experiment.executor else None) or SUCCESS
            if running == SUCCESS and last.data is None:
                running = f"unreadable: {last.error.msg}"
            title, settings = experiment.name or last.name or last.rev[:7], _settings(last, below)
            changes, metrics = _changes(own, settings), _metrics(last, below)
            yield State(title, last.rev, Kind.EXPERIMENT, running, settings, changes, metrics, Runs({}))
    if here:
        yield here


def _settings(state: Any, below: str) -> dict[str, Any]:
    files = state.data.params if state.data else {}
    return dict(flatten(files.get(f"{below}params.yaml", {}).get("data") or {}))


def _metrics(state: Any, below: str) -> dict[str, Json]:
    files = state.data.metrics if state.data else {}
    return {
        path.removeprefix(below): content.get("data") or {} for path, content in files.items() if path.startswith(below)
    }


def _changes(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in own.items() if base.get(key) != value}


def _runs(project: Project, repo: Any, revs: list[str]) -> dict[str, Runs]:
    """Return the runs in the dvc.lock of each revision.

    A commit's runs never change, so they are kept as JSON: reading a lock as YAML takes a twentieth of a second.
    """
    path = dvc.below(project.root, repo.scm.root_dir) + LOCK
    kept: Json = {}
    with contextlib.suppress(UserError):  # a damaged file is written again
        kept = load_json(project.locks).get(path, {})
    found = {WORKSPACE: Runs.read(project.root)}
    for rev in revs:
        if rev not in found:
            stages = kept[rev] if rev in kept else _stages_at(project, repo, rev)
            found[rev] = Runs(stages)
    commits = {rev: one.stages for rev, one in found.items() if rev != WORKSPACE}
    if commits != kept:
        with contextlib.suppress(OSError, TypeError, ValueError):  # read-only folder; a user's stage with dates
            write_json(project.locks, {path: commits})
    return found


def _stages_at(project: Project, repo: Any, rev: str) -> Json:
    with contextlib.suppress(UserError):  # a commit may have a lock with conflicts
        return Runs.parse(dvc.text_at(project.root, repo, rev, LOCK) or "{}").stages
    return {}
