"""The experiments of a repository, as DVC lists them: names, states, settings and metrics."""

import contextlib
from collections.abc import Iterator, Mapping
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

from wanda_dvc.errors import UserError
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
    from dvc.exceptions import DvcException, NotDvcRepoError
    from dvc.repo import Repo
    from dvc.scm import NoSCM, SCMError

    no_git = UserError(f"{project.root}: no git repository, expected one with experiments; run `git init`")
    try:
        repo = Repo(str(project.root))
    except NotDvcRepoError:
        raise UserError(
            f"{project.root}: no DVC repository, expected one with experiments; `wanda-dvc show` needs none"
        ) from None
    except SCMError:  # stages run by hand leave .dvc/
        raise no_git from None
    if isinstance(repo.scm, NoSCM):
        raise no_git
    with repo:
        try:
            states = repo.experiments.show(all_branches=True, all_tags=True, all_commits=True)
        except DvcException as error:
            raise UserError(
                f"{project.root}: DVC can't list its experiments ({error}); look at `dvc exp show`"
            ) from None
        except OSError as error:  # DVC reads files of an experiment that never started
            raise UserError(
                f"{project.root}: DVC can't list its experiments ({error}); one that was killed may still count as "
                "running: `dvc queue status` names it, `dvc queue kill NAME` clears it"
            ) from None
        below = project.root.resolve().relative_to(Path(repo.root_dir).resolve()).as_posix()
        found = list(_experiments(states, "" if below == "." else f"{below}/"))
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
    path = (project.root.resolve().relative_to(Path(repo.scm.root_dir).resolve()) / LOCK).as_posix()
    kept: Json = {}
    with contextlib.suppress(UserError):  # a damaged file is written again
        kept = load_json(project.locks).get(path, {})
    kept = kept if isinstance(kept, dict) else {}
    found = {rev: read_lock(project.root) if rev == WORKSPACE else kept.get(rev) for rev in dict.fromkeys(revs)}
    known = {rev: _stages_at(repo, rev, path) if stages is None else stages for rev, stages in found.items()}
    commits = {rev: stages for rev, stages in known.items() if rev != WORKSPACE}
    if commits != kept:
        with contextlib.suppress(OSError, TypeError, ValueError):  # read-only folder; a user's stage with dates
            write_json(project.locks, {path: commits})
    return known


def _stages_at(repo: Any, rev: str, path: str) -> Json:
    try:
        content: str = repo.scm.get_fs(rev).read_text(path, encoding="utf-8")
        return load_lock(content)
    except (FileNotFoundError, UserError):  # a commit may have a lock with conflicts
        return {}
