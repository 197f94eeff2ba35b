"""The experiments of a repository as a table: state, change of settings, perplexity, divergence and mean accuracy.

A number appears only with the settings of its measurement. `dvc exp show`, in contrast, fills the row of a failed or
queued experiment with the numbers of its base commit.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from wanda_dvc.errors import UserError
from wanda_dvc.reading import DIVERGED
from wanda_dvc.study.details import mean_accuracy
from wanda_dvc.study.experiments import SUCCESS, Experiment, Kind, list_experiments
from wanda_dvc.study.files import Json, json_text
from wanda_dvc.study.markup import decimal, on_text, table
from wanda_dvc.study.project import Project
from wanda_dvc.study.ran import md5, stale_stages
from wanda_dvc.study.settings import flatten

NAMED = 10  # names in a sentence
ON_TEXT = ("perplexity", "divergence", "agreement, %")
FOLDER = "metrics/pruned/perplexity/"
REMOVED = "parameters removed, %"  # a column if a pattern of units removed some
FLIPS = "right → wrong / wrong → right"  # a column if real tasks were answered


def experiments(*, project: Project, as_json: bool = False) -> str:
    """List the workspace, the branches and tags, and below each commit its experiments."""
    records = [_record(one, project.root) for one in list_experiments(project, locks=True)]
    if as_json:
        return json_text(records)
    texts = list(dict.fromkeys(text for record in records for text in record["texts"])) or [""]
    smaller = any(record["removed_parameters"] is not None for record in records)
    flips = any(record["flips"] for record in records)
    rows = [
        [
            record["name"],
            record["state"],
            ", ".join(f"{key}={value}" for key, value in record["change"].items()) or "–",
            *(cell for text in texts for cell in on_text(**record["texts"].get(text, {}))),
            decimal(record["accuracy"], "{:.1f}", 100),
            *([" / ".join(map(str, record["flips"].values())) or "–"] if flips else []),
            *([decimal(record["removed_parameters"], "{:.1f}", 100)] if smaller else []),
        ]
        for record in records
    ]
    of_texts = [what + (f", {text}" if len(texts) > 1 else "") for text in texts for what in ON_TEXT]
    headers = [
        "experiment",
        "state",
        "change",
        *of_texts,
        "mean acc, %",
        *([FLIPS] if flips else []),
        *([REMOVED] if smaller else []),
    ]
    stale = [record["name"] for record in records if record["stale"]]
    named = ", ".join(stale[:NAMED]) + (f" and {len(stale) - NAMED} more" if len(stale) > NAMED else "")
    said = f"No numbers of stages that have not run on the current settings: {named}." if stale else ""
    parts = (table(headers, rows), _about_texts(project), said)
    return "\n\n".join(part for part in parts if part)


def _about_texts(project: Project) -> str:
    """Return a sentence on each text of the workspace; empty if params.yaml is not valid."""
    lines = []
    with contextlib.suppress(UserError):
        for name, text in project.params.perplexity.texts.items():
            source = ", ".join(word for word in (text.source, text.chosen.split) if word)
            lines.append(f"Perplexity in the workspace, {name}: on {source}. {project.params.about_text(name)}.")
    return "\n".join(lines)


def results(project: Project) -> list[dict[str, Any]]:
    """Return every state of the study as a flat record with equal keys; None for values of other states."""
    found = [
        {"experiment": one.name, "commit": None if one.kind is Kind.WORKSPACE else one.rev, "state": one.state}
        | dict(one.settings)
        | dict(_figures(_own_metrics(one, project.root)))
        for one in list_experiments(project, locks=True)
    ]
    keys = dict.fromkeys(key for record in found for key in record)
    return [dict.fromkeys(keys) | record for record in found]


def _figures(metrics: Mapping[str, Json]) -> Iterator[tuple[str, Any]]:
    """Yield every number with its name: the path below metrics/, and its key if that is no name of file or folder."""
    for path, content in metrics.items():
        *folders, file = path.removeprefix("metrics/").removesuffix(".json").split("/")
        for name, value in flatten(content):
            yield (
                ".".join([*folders, file] + [name] * (name not in (file, *folders[-1:]))),
                math.inf if value == DIVERGED else value,
            )


def _record(one: Experiment, root: Path) -> Json:
    """Return one row; None for a number of another experiment."""
    own = _own_metrics(one, root)
    answered = own.get("metrics/pruned/zero_shot.json", {})
    texts = {
        path.removeprefix(FOLDER).removesuffix(".json"): {
            "perplexity": content.get("perplexity"),
            "divergence": mean(content.get("divergence")),
            "agreement": mean(content.get("top1_agreement")),
        }
        for path, content in own.items()
        if path.startswith(FOLDER)
    }
    changed = [scores["flips"]["acc"] for scores in answered.values() if "flips" in scores]
    accuracies = [scores.get("acc") for scores in answered.values()]
    return {
        "name": one.name,
        "state": one.state if one.kind is Kind.EXPERIMENT else one.kind.name.lower(),
        "change": dict(one.changes),
        "texts": texts,
        "accuracy": mean_accuracy(accuracies),
        "flips": {way: sum(one[way] for one in changed) for way in ("lost", "gained")} if changed else {},
        "removed_parameters": own.get("metrics/pruned/sparsity.json", {}).get("removed_parameters"),
        "stale": one.state == SUCCESS and len(own) < len(one.metrics),
    }


def mean(measure: Json | str | None) -> float | str | None:
    """Return the mean of a measure; `diverged` and None stay."""
    return measure["mean"] if isinstance(measure, dict) else measure


def _own_metrics(one: Experiment, root: Path) -> Mapping[str, Json]:
    """Return the metrics measured with the experiment's settings, by `dvc.lock`; `root` is the workspace's."""
    if one.state != SUCCESS:
        return {}
    stale = stale_stages(one.stages, one.settings)
    ran = {name: stage for name, stage in one.stages.items() if name not in stale}
    measured = {out["path"]: out.get("md5") for stage in ran.values() for out in stage.get("outs", [])}
    if one.kind is Kind.WORKSPACE:  # a stage run by hand, or `git checkout`, leaves other files there
        measured = {path: known for path, known in measured.items() if md5(root / path) == known}
    return {path: content for path, content in one.metrics.items() if path in measured}
