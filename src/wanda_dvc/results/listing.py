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
from wanda_dvc.results.current import changed_files, stale_stages
from wanda_dvc.results.intervals import Estimate
from wanda_dvc.results.markup import one_line, table
from wanda_dvc.results.measures import MEASURES, Results
from wanda_dvc.stages import MODELS
from wanda_dvc.study import dvc
from wanda_dvc.study.files import Json, json_number, json_text
from wanda_dvc.study.folder import Study
from wanda_dvc.study.lock import LOCK, Lock

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
    def final(self) -> Results:
        """The results of the model that the settings lead to: recovered, or pruned."""
        model = "recovered" if self.settings.get("recovery.tokens") else "pruned"
        return self.results.get(model) or Results({})


def list_states(study: Study) -> list[State]:
    """Return the workspace, branches, tags, commits with experiments, and all experiments, each before its own.

    UserError without a repository, or if DVC cannot list it, or for a damaged dvc.lock.
    """
    lock = Lock.read(study.root)
    revisions = dvc.list_revisions(study.root)
    around, _ = dvc.repository_roots(study.root)
    prefix = dvc.prefix_of(study.root, around)  # of the study's files in DVC's records
    states: list[State] = []
    for place, record in enumerate(revisions):
        if record["rev"] == WORKSPACE:  # DVC lists it before its base commit
            base = revisions[min(place + 1, len(revisions) - 1)]
            states.append(_state(study, prefix, WORKSPACE, WORKSPACE, record, base, lock=lock))
            continue
        name, commit = record.get("name"), record["rev"]
        if name or record.get("experiments"):  # results of a branch's older commits are not current
            kind = "branch" if name else "commit"
            states.append(_state(study, prefix, name or commit[:7], kind, record, record))
        for experiment in record.get("experiments") or []:
            last = experiment["revs"][0]
            name = experiment.get("name") or last.get("name") or last["rev"][:7]
            running = (experiment.get("executor") or {}).get("state") or SUCCESS
            states.append(_state(study, prefix, name, "experiment", last, record, running=running))
    finished = {state.rev for state in states if state.state == SUCCESS}
    return [state for state in states if state.state == SUCCESS or state.rev not in finished]


def _state(
    study: Study,
    prefix: str,
    name: str,
    kind: str,
    record: Json,
    base: Json,
    *,
    running: str = SUCCESS,
    lock: Lock | None = None,
) -> State:
    if running == SUCCESS and not record.get("data"):
        running = f"unreadable: {(record.get('error') or {}).get('msg')}"
    settings, before = _settings_of(record, prefix), _settings_of(base, prefix)
    changes = {key: settings.get(key) for key in before | settings if before.get(key) != settings.get(key)}
    state = State(name, record["rev"], kind, running, settings, changes)
    if running != SUCCESS:
        return state  # DVC has its base commit's results
    files = _study_files(record, "metrics", prefix)
    if not files:
        return state
    current = _current(study, lock or _lock_at(study, record["rev"]), settings, is_workspace=lock is not None)
    results = {model: Results({}) for model in MODELS}
    for path, content in files.items():
        model, _, name = path.removeprefix("metrics/").partition("/")
        if content and path in current and model in results:
            results[model].metrics[name.removesuffix(".json")] = content
    return state._replace(stale=not files.keys() <= current, results=results)


def _study_files(record: Json, kind: str, prefix: str) -> dict[str, Json]:
    files = (record.get("data") or {}).get(kind, {})
    return {
        path.removeprefix(prefix): file.get("data") or {} for path, file in files.items() if path.startswith(prefix)
    }


def _settings_of(record: Json, prefix: str) -> dict[str, Any]:
    return dict(flatten(_study_files(record, "params", prefix).get("params.yaml", {})))


def _lock_at(study: Study, rev: str) -> Lock:
    with contextlib.suppress(UserError):
        return Lock.parse(dvc.text_at(study.root, rev, LOCK) or "")
    return Lock({})


def _current(study: Study, lock: Lock, settings: Mapping[str, Any], *, is_workspace: bool) -> set[str]:
    """Return the files of results that are current with these settings, by path."""
    stale = stale_stages(lock, settings)
    current = {path for path, stage in lock.writers.items() if stage not in stale}
    return current - changed_files(lock, study.root) if is_workspace else current


def experiments(*, study: Study, as_json: bool = False) -> str:
    """List the workspace, branches and tags, and below each commit its experiments: the measures of each."""
    states = list_states(study)
    if as_json:
        return json_text([{key: _json_value(value) for key, value in record.items()} for record in results(states)])
    columns = headings([state.final for state in states])
    rows = []
    for state in states:
        change = one_line(", ".join(f"{key}={value}" for key, value in state.changes.items()))
        progress = one_line(state.state) if state.kind == "experiment" else state.kind
        rows.append([state.name, progress, change, *cells(state.final, columns, interval=False)])
    text = table(["experiment", "state", "change", *columns], rows)
    different = _different_measurements(states)
    if different:
        text += f"\n\nNot all comparable: {shortened(different)} differ. "
        text += "`wanda-dvc show NAME NAME` tests only equal ones."
    stale = [state.name for state in states if state.stale]
    if stale:
        text += f"\n\nSome stages have not run on the current settings: {shortened(stale, 10)}."
    return text


def _json_value(value: Any) -> Any:
    return json_number(value) if isinstance(value, float) else value


def _different_measurements(states: Sequence[State]) -> list[str]:
    values: dict[str, set[str]] = {}
    for state in states:
        if not state.final.metrics:
            continue
        settings = state.settings
        with contextlib.suppress(UserError):  # of another version; else with defaults
            settings = resolved(check_params(nested(settings)))
        for key, value in settings.items():
            if key.startswith(MEASURED_BY):
                values.setdefault(key, set()).add(repr(value))
    return [key for key, different in values.items() if len(different) > 1]


def results(states: Sequence[State]) -> list[dict[str, Any]]:
    """Return every state as a flat record with equal keys; None for values of other states."""
    records: list[dict[str, Any]] = []
    for state in states:
        commit = None if state.rev == WORKSPACE else state.rev
        record = {"experiment": state.name, "commit": commit, "state": state.state, **state.settings}
        for model, measured in state.results.items():
            for measure in MEASURES:
                diverged = math.inf if measure.name.startswith(("perplexity", "divergence")) else math.nan
                for on in measure.where(measured):
                    value = measure.read(measured, on)
                    name = ".".join(part for part in (model, measure.name, on) if part)
                    record[name] = value.value if isinstance(value, Estimate) else diverged
        records.append(record)
    keys = dict.fromkeys(key for record in records for key in record)
    return [dict.fromkeys(keys) | record for record in records]
