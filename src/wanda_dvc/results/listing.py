"""`wanda-dvc list`: the states of a repository as a table, and as flat records for a data frame.

A state is an experiment, a branch, a tag, a commit or the workspace, as DVC lists them. A number appears only with the
settings of its measurement. `dvc exp show`, in contrast, fills the row of a failed or queued experiment with the
numbers of its base commit.
"""

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from wanda_dvc.errors import UserError, shortened
from wanda_dvc.params import check_params, flatten, nested, resolved
from wanda_dvc.results.compare import cells, headings
from wanda_dvc.results.intervals import Estimate
from wanda_dvc.results.markup import one_line, table
from wanda_dvc.results.measures import MEASURES, Results
from wanda_dvc.stages import MODELS
from wanda_dvc.stages.runs import LOCK, Lock
from wanda_dvc.study import dvc
from wanda_dvc.study.files import Json, finite, json_text
from wanda_dvc.study.folder import Study

WORKSPACE = "workspace"
MEASURED_BY = ("model", "dtype", "perplexity.", "tasks.", "zero_shot.")  # settings of measurements
SUCCESS = "success"
# Of a state; `branch` is also a tag, and `commit` has neither. If states share results, the first kind names them.
KINDS = ("experiment", "branch", WORKSPACE, "commit")


class State(NamedTuple):
    """One state of the study: an experiment, a branch or tag, a commit, or the workspace."""

    name: str
    rev: str  # a commit, or `workspace`
    kind: str  # one of KINDS
    state: str = SUCCESS  # or the reason for missing results: `failed`, `queued`, `running`, `unreadable: …`
    settings: Mapping[str, Any] = {}  # by dotted name
    changes: Mapping[str, Any] = {}  # of the settings, against its base commit
    stale: bool = False  # whether numbers of other settings are left out
    results: Mapping[str, Results] = {}  # by model, without details

    @property
    def made(self) -> Results:
        """The results of the model that the settings make: recovered, or pruned."""
        return self.results["recovered" if self.settings.get("recovery.tokens") else "pruned"]


def list_states(study: Study) -> list[State]:
    """Return the workspace, branches, tags, commits with experiments, and all experiments, each before its own.

    UserError without a repository, or if DVC cannot list it.
    """
    found: list[State] = []
    with dvc.repository(study.root) as repo:
        below, listed = dvc.below(study.root, repo.root_dir), dvc.states(study.root, repo)

        def add(name: str, kind: str, state: Any, base: Any, running: str = SUCCESS) -> None:
            settings, before = _settings(state, below), _settings(base, below)
            changes = {key: settings.get(key) for key in before | settings if before.get(key) != settings.get(key)}
            known = state.data and running == SUCCESS  # else they are the base commit's
            own, others = _measured(study, repo, state.rev, settings, state.data.metrics if known else {}, below)
            found.append(State(name, state.rev, kind, running, settings, changes, others, own))

        for place, state in enumerate(listed):
            if state.rev == WORKSPACE:  # DVC lists it before its base commit
                add(WORKSPACE, WORKSPACE, state, listed[min(place + 1, len(listed) - 1)])
                continue
            if state.name or state.experiments:  # results of a branch's older commits are not current
                add(state.name or state.rev[:7], "branch" if state.name else "commit", state, state)
            for experiment in state.experiments or []:
                last = experiment.revs[0]
                running = (experiment.executor.state if experiment.executor else None) or SUCCESS
                if running == SUCCESS and last.data is None:
                    running = f"unreadable: {last.error.msg}"
                add(experiment.name or last.name or last.rev[:7], "experiment", last, state, running)
    done = {one.rev for one in found if one.state == SUCCESS}
    return [one for one in found if one.state == SUCCESS or one.rev not in done]


def _settings(state: Any, below: str) -> dict[str, Any]:
    """Return the settings of a study in a folder of the repository, such as `studies/a/`, or in its root."""
    files = state.data.params if state.data else {}
    return dict(flatten(files.get(f"{below}params.yaml", {}).get("data") or {}))


def _measured(
    study: Study, repo: Any, rev: str, settings: Json, files: Mapping[str, Any], below: str
) -> tuple[dict[str, Results], bool]:
    """Return by model the results in files of metrics that have these settings, and whether other results are there."""
    every = {path.removeprefix(below): one.get("data") or {} for path, one in files.items() if path.startswith(below)}
    outs = set[str]()
    if every:
        runs, here = Lock({}), rev == WORKSPACE
        with contextlib.suppress(UserError, FileNotFoundError):  # a commit may have a lock with conflicts, or none
            runs = Lock.read(study.root) if here else Lock.parse(dvc.text_at(study.root, repo, rev, LOCK))
        outs = set(runs.outs(runs.stages.keys() - runs.stale(settings)))
        if here:  # a stage run by hand, or `git checkout`, leaves other files there
            outs -= runs.others(study.root)
    own = {path: content for path, content in every.items() if path in outs}
    found = {model: Results({}) for model in MODELS}
    for path, content in own.items():
        model, _, name = path.removeprefix("metrics/").partition("/")
        if content and model in found:
            found[model].metrics[name.removesuffix(".json")] = content
    return found, len(own) < len(every)


def experiments(*, study: Study, as_json: bool = False) -> str:
    """List the workspace, branches and tags, and below each commit its experiments: the measures of each."""
    states = list_states(study)
    if as_json:
        records = [{key: finite(x) if isinstance(x, float) else x for key, x in one.items()} for one in results(states)]
        return json_text(records)
    columns = headings([one.made for one in states])
    rows = []
    for one in states:
        change = one_line(", ".join(f"{key}={value}" for key, value in one.changes.items()))
        state = one_line(one.state) if one.kind == "experiment" else one.kind
        rows.append([one.name, state, change, *cells(one.made, columns, interval=False)])
    found = table(["experiment", "state", "change", *columns], rows)
    values: dict[str, set[str]] = {}
    for one in (one for one in states if one.made.metrics):
        every = one.settings
        with contextlib.suppress(UserError):  # of another version; else with defaults
            every = resolved(check_params(nested(every)))
        for key in (key for key in every if key.startswith(MEASURED_BY)):
            values.setdefault(key, set()).add(repr(every[key]))
    if different := [key for key, own in values.items() if len(own) > 1]:
        found += f"\n\nNot all comparable: {shortened(different, 3)} differ. `wanda-dvc show NAME NAME` tests only equal ones."
    if stale := [one.name for one in states if one.stale]:
        found += f"\n\nSome stages have not run on the current settings: {shortened(stale, 10)}."
    return found


def results(states: Sequence[State]) -> list[dict[str, Any]]:
    """Return every state as a flat record with equal keys; None for values of other states."""
    found: list[dict[str, Any]] = []
    for state in states:
        commit = None if state.rev == WORKSPACE else state.rev
        record = {"experiment": state.name, "commit": commit, "state": state.state, **state.settings}
        for model, one in state.results.items():
            for measure in MEASURES:
                diverged = math.inf if measure.name.startswith(("perplexity", "divergence")) else math.nan
                for on in measure.where(one):
                    value = measure.read(one, on)
                    name = ".".join(word for word in (model, measure.name, on) if word)
                    record[name] = value.value if isinstance(value, Estimate) else diverged
        found.append(record)
    keys = dict.fromkeys(key for record in found for key in record)
    return [dict.fromkeys(keys) | record for record in found]
