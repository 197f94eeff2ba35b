"""The experiments of a repository, as DVC lists them: names, states, settings and metrics."""

import contextlib
from collections.abc import Iterator, Mapping
from enum import IntEnum
from typing import Any, NamedTuple

from wanda_dvc.errors import UserError
from wanda_dvc.study import dvc
from wanda_dvc.study.files import Json, load_json, write_json
from wanda_dvc.study.project import Project
from wanda_dvc.study.ran import LOCK, load_lock, read_lock
from wanda_dvc.study.settings import flatten

WORKSPACE = "workspace"
SUCCESS = "success"


class Kind(IntEnum):
    """The kind of a state. If states share results, the lowest kind names them."""

    EXPERIMENT, BRANCH, WORKSPACE, COMMIT = range(4)  # a branch or a tag; a commit without either


class Experiment(NamedTuple):
    """One state of the study: an experiment, a branch or tag, a commit, or the workspace."""

    name: str
    rev: str  # a commit, or `workspace`
    kind: Kind
    state: str  # `success`, or the reason for missing results: `failed`, `queued`, `running`, `unreadable: …`
    settings: Mapping[str, Any]  # by dotted name
    changes: Mapping[str, Any]  # of the settings, against its base commit
    metrics: Mapping[str, Json]  # by path; of an experiment without success, the base commit's
    stages: Json  # of its dvc.lock


def list_experiments(project: Project, *, locks: bool = False) -> list[Experiment]:
    """Return the workspace, branches, tags, commits with experiments, and all experiments, each before its own.

    Only `locks` reads their `stages`. UserError without a repository, or if DVC cannot list it.
    """
    with dvc.repository(project.root, "`wanda-dvc show` needs none") as repo:
        found = list(_experiments(dvc.states(project.root, repo), dvc.below(project.root, repo.root_dir)))
        done = {one.rev for one in found if one.state == SUCCESS}
        found = [one for one in found if one.state == SUCCESS or one.rev not in done]
        if not locks:
            return found
        stages = _stages(project, repo, [one.rev for one in found])
        return [one._replace(stages=stages[one.rev]) for one in found]


def _experiments(states: list[Any], below: str) -> Iterator[Experiment]:
    """Yield the experiments of a study in a folder of the repository, such as `studies/a/`, or in its root."""
    workspace: Experiment | None = None
    for state in states:
        kind = Kind.WORKSPACE if state.rev == WORKSPACE else Kind.BRANCH if state.name else Kind.COMMIT
        name = state.name or (state.rev if kind is Kind.WORKSPACE else state.rev[:7])
        own, metrics = _settings(state, below), _metrics(state, below)
        if kind is Kind.WORKSPACE:
            workspace = Experiment(name, state.rev, kind, SUCCESS, own, {}, metrics, {})
            continue
        if workspace:  # DVC lists it before its base commit
            yield workspace._replace(changes=_changes(own, workspace.settings))
            workspace = None
        if kind < Kind.COMMIT or state.experiments:  # results of a branch's older commits are not current
            yield Experiment(name, state.rev, kind, SUCCESS, own, {}, metrics, {})
        for experiment in state.experiments or []:
            last = experiment.revs[0]
            running = (experiment.executor.state if experiment.executor else None) or SUCCESS
            if running == SUCCESS and last.data is None:
                running = f"unreadable: {last.error.msg}"
            title, settings = experiment.name or last.name or last.rev[:7], _settings(last, below)
            changes = _changes(own, settings)
            yield Experiment(title, last.rev, Kind.EXPERIMENT, running, settings, changes, _metrics(last, below), {})
    if workspace:
        yield workspace


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


def _stages(project: Project, repo: Any, revs: list[str]) -> dict[str, Json]:
    """Return the stages of the dvc.lock of each revision.

    A commit's stages never change, so they are kept as JSON: reading a lock as YAML takes a twentieth of a second.
    """
    path = dvc.below(project.root, repo.scm.root_dir) + LOCK
    kept: Json = {}
    with contextlib.suppress(UserError):  # a damaged file is written again
        kept = load_json(project.locks).get(path, {})
    kept = kept if isinstance(kept, dict) else {}
    found = {rev: read_lock(project.root) if rev == WORKSPACE else kept.get(rev) for rev in dict.fromkeys(revs)}
    known = {rev: _stages_at(project, repo, rev) if stages is None else stages for rev, stages in found.items()}
    commits = {rev: stages for rev, stages in known.items() if rev != WORKSPACE}
    if commits != kept:
        with contextlib.suppress(OSError, TypeError, ValueError):  # read-only folder; a user's stage with dates
            write_json(project.locks, {path: commits})
    return known


def _stages_at(project: Project, repo: Any, rev: str) -> Json:
    with contextlib.suppress(UserError):  # a commit may have a lock with conflicts
        return load_lock(dvc.text_at(project.root, repo, rev, LOCK) or "{}")
    return {}
