"""`wanda-dvc list`: the revisions of a study as a table, and as flat records for a data frame.

A revision is an experiment, a branch, a tag, a commit or the workspace, as DVC lists them. A number appears only with
the settings of its measurement. `dvc exp show`, in contrast, fills the row of a failed or queued experiment with the
numbers of its base commit.
"""

import contextlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from wanda_dvc.errors import UserError, shortened
from wanda_dvc.params import flatten, resolved
from wanda_dvc.reading import DIVERGED
from wanda_dvc.results.compare import headings
from wanda_dvc.results.current import changed_files, stale_stages, valid_params
from wanda_dvc.results.intervals import Estimate
from wanda_dvc.results.markup import one_line, table
from wanda_dvc.results.measures import MEASURES, Results, is_of_removed_text
from wanda_dvc.stages import MODELS
from wanda_dvc.study import dvc
from wanda_dvc.study.files import Json, json_text
from wanda_dvc.study.folder import Study
from wanda_dvc.study.lock import LOCK, Lock

WORKSPACE = "workspace"
MEASUREMENT_SETTINGS = ("model", "dtype", "perplexity.", "tasks.")
SUCCESS = "success"
# Of a revision; `branch` is also a tag, and `commit` has neither. Equal results get the name of the first kind.
KINDS = ("experiment", "branch", WORKSPACE, "commit")


class ListedRevision(NamedTuple):
    """An experiment, a branch or tag, a commit, or the workspace, as `wanda-dvc list` shows it."""

    name: str
    rev: str  # a commit, or `workspace`
    kind: str  # one of KINDS
    status: str = SUCCESS  # or the reason for missing results: `failed`, `queued`, `running`, `unreadable: …`
    settings: Mapping[str, Any] = {}  # by dotted name
    changes: Mapping[str, Any] = {}  # of the settings, against its base commit
    results: Mapping[str, Results] = {}  # by model, without details

    @property
    def final(self) -> Results:
        """The results of the model that the settings lead to."""
        return self.results.get("recovered" if self.settings.get("recovery.tokens") else "pruned", Results({}))


def listed_revisions(study: Study) -> list[ListedRevision]:
    """Return the workspace, branches, tags, commits with experiments, and after each its experiments."""
    Lock.read(study.root)  # UserError if it is damaged: DVC has an empty record then
    records = dvc.list_revisions(study.root)
    dvc_root, _ = dvc.repository_roots(study.root)
    prefix = dvc.prefix_of(study.root, dvc_root)  # of the study's files in DVC's records
    listed: list[ListedRevision] = []
    for index, record in enumerate(records):
        if record["rev"] == WORKSPACE:  # DVC lists it before its base commit; without one, it has no changes
            base = records[min(index + 1, len(records) - 1)]
            listed.append(_listed(study, prefix, WORKSPACE, WORKSPACE, record, base))
            continue
        name, commit = record.get("name"), record["rev"]
        if name or record.get("experiments"):  # results of a branch's older commits are not current
            kind = "branch" if name else "commit"
            listed.append(_listed(study, prefix, name or commit[:7], kind, record, record))
        for experiment in record.get("experiments") or []:
            last = experiment["revs"][0]
            name = experiment.get("name") or last.get("name") or last["rev"][:7]
            status = (experiment.get("executor") or {}).get("state") or SUCCESS
            listed.append(_listed(study, prefix, name, "experiment", last, record, status=status))
    # DVC may list a finished experiment also as running, or as queued.
    finished = {revision.rev for revision in listed if revision.status == SUCCESS}
    return [revision for revision in listed if revision.status == SUCCESS or revision.rev not in finished]


def _listed(
    study: Study, prefix: str, name: str, kind: str, record: Json, base: Json, *, status: str = SUCCESS
) -> ListedRevision:
    """Read DVC's record of a revision; `base` is that of the commit on which it began."""
    if status == SUCCESS and not record.get("data"):
        status = f"unreadable: {(record.get('error') or {}).get('msg')}"
    settings, before = _settings_of(record, prefix), _settings_of(base, prefix)
    changes = {}
    if settings:  # else they are not known
        changes = {key: settings.get(key) for key in before | settings if before.get(key) != settings.get(key)}
    results = {model: Results({}) for model in MODELS}
    if status == SUCCESS:  # DVC gives an unfinished one its base commit's results
        lock, left_out, params = Lock({}), set[str](), valid_params(settings)
        if kind == WORKSPACE:
            lock = Lock.read(study.root)
            left_out = changed_files(lock, study.root)
        else:
            with contextlib.suppress(UserError):
                lock = Lock.parse(dvc.git(study.root, "show", f"{record['rev']}:./{LOCK}").stdout)  # "" without a lock
        stale = stale_stages(lock, settings)
        current = {path for path, stage in lock.writers.items() if stage not in stale} - left_out
        texts = params.perplexity.texts if params else None
        for path, content in _study_files(record, "metrics", prefix).items():
            model, _, file = path.removeprefix("metrics/").partition("/")
            metric = file.removesuffix(".json")
            if content and path in current and model in results and not is_of_removed_text(metric, texts):
                results[model].metrics[metric] = content
    return ListedRevision(name, record["rev"], kind, status, settings, changes, results)


def _study_files(record: Json, kind: str, prefix: str) -> dict[str, Json]:
    data = (record.get("data") or {}).get(kind, {})
    return {path.removeprefix(prefix): file.get("data") or {} for path, file in data.items() if path.startswith(prefix)}


def _settings_of(record: Json, prefix: str) -> dict[str, Any]:
    return dict(flatten(_study_files(record, "params", prefix).get("params.yaml", {})))


def list_text(*, study: Study, as_json: bool = False) -> str:
    """List the workspace, branches and tags, and below each commit its experiments: the measures of each."""
    revisions = listed_revisions(study)
    if as_json:  # which has no NaN
        return json_text(json.loads(json.dumps(flat_records(revisions)), parse_constant=lambda _: DIVERGED))
    columns = headings([revision.final for revision in revisions])
    rows = []
    for revision in revisions:
        change = one_line(", ".join(f"{key}={value}" for key, value in revision.changes.items()))
        has_state = revision.kind == "experiment" or revision.status != SUCCESS
        status = one_line(revision.status) if has_state else revision.kind
        values = [measure.formatted(revision.final, target, interval=False) for measure, target in columns.values()]
        rows.append([revision.name, status, change, *values])
    text = table(["experiment", "state", "change", *columns], rows)
    measured = [(valid_params(revision.settings), revision) for revision in revisions if revision.final.metrics]
    settings = [resolved(params) if params else revision.settings for params, revision in measured]
    keys = [key for key in differing_settings(settings) if key.startswith(MEASUREMENT_SETTINGS)]
    if keys:
        text += f"\n\nNot all comparable: {shortened(keys)} differ. "
        text += "`wanda-dvc show NAME NAME` tests only equal ones."
    return text


def differing_settings(experiments: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the settings that have several values, by dotted name. A missing one has no value."""
    values: dict[str, set[str]] = {}
    for settings in experiments:
        for key, value in settings.items():
            values.setdefault(key, set()).add(repr(value))
    return [key for key, several in values.items() if len(several) > 1]


def flat_records(revisions: Sequence[ListedRevision]) -> list[dict[str, Any]]:
    """Return every revision as a flat record with equal keys; None for values that only other revisions have."""
    records: list[dict[str, Any]] = []
    for revision in revisions:
        commit = None if revision.rev == WORKSPACE else revision.rev
        record = {"experiment": revision.name, "commit": commit, "state": revision.status, **revision.settings}
        for model, results in revision.results.items():
            for measure in MEASURES:
                not_finite = math.inf if measure.lower_is_better else math.nan  # it must rank last
                for target in measure.where(results):
                    value = measure.read(results, target)
                    name = ".".join(part for part in (model, measure.name, target) if part)
                    record[name] = value.value if isinstance(value, Estimate) else not_finite
        records.append(record)
    keys = dict.fromkeys(key for record in records for key in record)
    return [dict.fromkeys(keys) | record for record in records]
