"""`wanda-dvc list`: the experiments of a repository as a table, and as flat records for a data frame.

A number appears only with the settings of its measurement. `dvc exp show`, in contrast, fills the row of a failed or
queued experiment with the numbers of its base commit.
"""

import math
from typing import Any

from wanda_dvc.results.compare import headings
from wanda_dvc.results.inference import Estimate
from wanda_dvc.results.measures import MEASURES, figures
from wanda_dvc.results.states import SUCCESS, WORKSPACE, Kind, list_states
from wanda_dvc.study.files import json_text
from wanda_dvc.study.markup import DASH, table
from wanda_dvc.study.project import Project

NAMED = 10  # names in a sentence


def experiments(*, project: Project, as_json: bool = False) -> str:
    """List the workspace, the branches and tags, and below each commit its experiments: pruned models' measures."""
    states = list_states(project)
    every = [one.results(project.root) for one in states]
    if as_json:
        records = [
            {
                "name": one.name,
                "state": one.state if one.kind is Kind.EXPERIMENT else one.kind.name.lower(),
                "change": dict(one.changes),
                "stale": one.stale(project.root),
                "results": {model: figures(of) for model, of in results.items()},
            }
            for one, results in zip(states, every, strict=True)
        ]
        return json_text(records)
    pruned = [results["pruned"] for results in every]
    columns = headings(pruned)
    rows = []
    for state, one in zip(states, pruned, strict=True):
        change = ", ".join(f"{key}={value}" for key, value in state.changes.items()) or DASH
        shown = state.state if state.kind is Kind.EXPERIMENT else state.kind.name.lower()
        values = [measure.text(measure.read(one, on), interval=False) for measure, on in columns.values()]
        rows.append([state.name, shown, change, *values])
    found = table(["experiment", "state", "change", *columns], rows)
    if stale := [one.name for one in states if one.stale(project.root)]:
        named = ", ".join(stale[:NAMED]) + (f" and {len(stale) - NAMED} more" if len(stale) > NAMED else "")
        found += f"\n\nNo numbers of stages that have not run on the current settings: {named}."
    return found


def results(project: Project) -> list[dict[str, Any]]:
    """Return every state of the study as a flat record with equal keys; None for values of other states."""
    found: list[dict[str, Any]] = []
    for state in list_states(project):
        commit = None if state.rev == WORKSPACE else state.rev
        record = {"experiment": state.name, "commit": commit, "state": state.state, **state.settings}
        for model, one in state.results(project.root).items() if state.state == SUCCESS else ():
            for measure in MEASURES:
                for on in measure.where(one):
                    value = measure.read(one, on)
                    name = ".".join(word for word in (model, measure.name, on) if word)
                    record[name] = value.value if isinstance(value, Estimate) else math.inf  # diverged
        found.append(record)
    keys = dict.fromkeys(key for record in found for key in record)
    return [dict.fromkeys(keys) | record for record in found]
