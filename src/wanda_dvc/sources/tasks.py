"""The items of the zero-shot tasks: samples, or the benchmarks from the mirror or the Hub."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from wanda_dvc.catalog import HUB_ID
from wanda_dvc.engine.items import load_task
from wanda_dvc.errors import UserError
from wanda_dvc.params import Tasks
from wanda_dvc.sources import Source
from wanda_dvc.sources.hub import Repository, gated_names, load_rows, resolve
from wanda_dvc.sources.places import EMBEDDED, TaskItems, in_mirror, task_definition, task_items
from wanda_dvc.study.files import Json
from wanda_dvc.study.project import ITEMS
from wanda_dvc.study.provenance import describe, file_digest, write_provenance


@dataclass(frozen=True)
class Items(TaskItems):
    """A task's items, in a file or in a commit of a data set on the Hub."""

    definition: str  # the task's file in lm-eval
    options: dict[str, Any]  # for `datasets`, from the task's definition
    origin: Path | Repository

    @property
    def title(self) -> str:
        """The name of the data set in the provenance."""
        return "/".join(part for part in (self.dataset, self.config) if part)

    def write(self, target: Path) -> None:
        """Write the items as JSON lines. UserError for items without labels among their choices."""
        if isinstance(self.origin, Path):
            load_task(self.definition, self.role, self.origin, todo="correct that file")
            shutil.copyfile(self.origin, target)
            return
        name = f"{self.origin.where}: {self.title}"
        rows = load_rows(self.origin, self.config, self.split, **self.options)
        try:
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        except TypeError as error:
            raise UserError(f"{name} has a value that JSON cannot hold ({error}); remove it") from error
        target.write_text("".join(lines), encoding="utf-8", newline="\n")
        load_task(self.definition, self.role, target, name=name, todo="remove the task")


def find_tasks(wanted: Tasks, mirror: str | None) -> Source:
    """Find the items of every task. UserError with the problems of all tasks."""
    items: dict[str, Items] = {}
    problems: list[str] = []
    definitions = {name: task_definition(name) for name in wanted.names}
    for name, found in definitions.items():
        metrics = [one.get("metric") for one in found[1].get("metric_list") or [{"metric": "acc"}]] if found else []
        if found is None or found[1].get("output_type") != "multiple_choice":
            problem = f"is no multiple-choice task of lm-eval {version('lm_eval')}; `lm-eval ls tasks` lists them"
        elif "acc" not in metrics:
            problem = f"is measured by {', '.join(map(str, metrics))}, expected acc; remove it"
        else:
            continue
        problems.append(f"params.yaml: tasks.names: {name} {problem}")
    if problems:  # reported before requests to the Hub
        raise UserError(*problems)
    for name, found in definitions.items():
        assert found
        try:
            items[name] = _find_items(name, *found, wanted.source, mirror)
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)
    gated = gated_names(*(one.origin for one in items.values()))
    return Source({"tasks": wanted.model_dump(mode="json")}, partial(_write, items, wanted.source == "embedded"), gated)


def _find_items(name: str, path: str, definition: Json, source: str, mirror: str | None) -> Items:
    """Find one task's items."""
    where = f"params.yaml: tasks.names: {name}"
    found = task_items(definition)
    if found is None:
        raise UserError(f"{where}: its definition has no data set or no split; remove it")
    options = dict(definition.get("dataset_kwargs") or {})
    revision = options.pop("revision", None)
    for option in ("trust_remote_code", "streaming", "split"):  # a data set's code never runs
        options.pop(option, None)
    origin: Path | Repository | None
    if source == "embedded":
        origin = Path(EMBEDDED, "tasks", *found.place)
        if not origin.is_file():
            raise UserError(f"{where}: no embedded samples; remove it, or set tasks.source to benchmark")
    else:
        origin = in_mirror(mirror, *found.place)
    if origin is None:
        if not HUB_ID.fullmatch(found.dataset):
            raise UserError(
                f"{where}: got items of {found.dataset}, expected a data set on the Hub, ORG/NAME; remove it"
            )
        origin = resolve("dataset", found.dataset, revision, where)
    return Items(**vars(found), definition=path, options=options, origin=origin)


def _write(items: Mapping[str, Items], samples: bool, out: Path, _: Path) -> None:
    """Write the items and the provenance of every task into a separate directory."""
    for name, one in items.items():
        folder = out / name
        folder.mkdir()
        one.write(folder / ITEMS)
        provenance = describe(
            "download tasks",
            task=name,
            source="samples written for wanda-dvc" if samples else one.title,
            revision=one.origin.commit if isinstance(one.origin, Repository) else None,
            samples=samples,
            definition=one.definition,
            role=one.role,
            lm_eval=version("lm_eval"),
            sha256=file_digest(folder / ITEMS),
        )
        write_provenance(folder, provenance)
