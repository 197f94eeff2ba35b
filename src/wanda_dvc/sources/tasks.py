"""The items of the zero-shot tasks: samples, or the benchmarks from the mirror or the Hub; lm-eval's task of them."""

import json
import logging
import shutil
from collections.abc import Mapping
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from wanda_dvc.errors import UserError, reason
from wanda_dvc.params import Tasks
from wanda_dvc.reading import read_lines
from wanda_dvc.sources import EMBEDDED_FOLDER, Source
from wanda_dvc.sources.hub import Repository, in_mirror, load_rows, resolve
from wanda_dvc.study.artifact import describe, file_digest, write_provenance
from wanda_dvc.study.files import Json
from wanda_dvc.study.folder import ITEMS

logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns about every data set without a Hub id
DOWNLOAD_AGAIN = "run `wanda-dvc download tasks` again"
NOT_FOR_DATASETS = ("revision", "trust_remote_code", "streaming", "split")  # a data set's code never runs


class Items(NamedTuple):
    """A task's items, in a file or in a commit of a data set on the Hub."""

    definition: str  # the task's file in lm-eval
    role: str  # of the split, for lm-eval: test or validation
    split: str
    config: str | None
    title: str  # of the data set, in the provenance
    options: dict[str, Any]  # for `datasets`, from the task's definition
    origin: Path | Repository


def find_tasks(tasks: Tasks, mirror: str | None) -> Source:
    """Find the items of every task."""
    items = {name: _find_items(name, tasks.source, mirror) for name in tasks.names}
    return Source({"tasks": tasks.model_dump(mode="json")}, partial(_write_tasks, items, tasks.source == "embedded"))


def _find_items(name: str, source: str, mirror: str | None) -> Items:
    where = f"params.yaml: tasks.names: {name}"
    file, content = task_definition(name) or ("", {})
    metrics = [entry.get("metric") for entry in content.get("metric_list") or [{"metric": "acc"}]]
    role = "test" if content.get("test_split") else "validation"
    dataset, config, split = (content.get(key) for key in ("dataset_path", "dataset_name", f"{role}_split"))
    is_multiple_choice = content.get("output_type") == "multiple_choice" and "acc" in metrics
    own_code = any(map(content.get, ("custom_dataset", "process_results")))  # whose acc may be no right or wrong
    if not is_multiple_choice or not dataset or not split or own_code:
        problem = f"no multiple-choice task of lm-eval {version('lm_eval')} with an accuracy (acc) and a data set"
        raise UserError(f"{where}: {problem}; see `lm-eval ls tasks`")
    arguments = content.get("dataset_kwargs") or {}
    options = {name: value for name, value in arguments.items() if name not in NOT_FOR_DATASETS}
    folders = [dataset, config] if config else [dataset]
    if source == "embedded":  # the samples are laid out like a mirror
        mirror = str(EMBEDDED_FOLDER / "tasks")
        if not Path(mirror, *folders, f"{split}.jsonl").is_file():
            raise UserError(f"{where}: no embedded questions; remove this task, or set tasks.source=benchmark")
    mirrored = in_mirror(mirror, *folders, f"{split}.jsonl")
    origin = mirrored or resolve("dataset", dataset, arguments.get("revision"), where)
    return Items(file, role, split, config, "/".join(folders), options, origin)


def task_definition(name: str) -> tuple[str, Json] | None:
    """Return the file of an lm-eval task, relative to the tasks' folder, and its content; None for an unknown task.

    Functions stay names in it.
    """
    import lm_eval.tasks

    entry = _task_index().get(name)
    if entry is None or not entry.yaml_path:
        return None
    return entry.yaml_path.relative_to(Path(lm_eval.tasks.__file__).parent).as_posix(), entry.cfg


@cache
def _task_index() -> dict[str, Any]:
    """Return lm-eval's index of tasks, which takes 5 s."""
    from lm_eval.tasks import TaskManager

    return dict(TaskManager().task_index)


def _write_tasks(items_by_task: Mapping[str, Items], are_samples: bool, out: Path, _: Path) -> None:
    if not items_by_task:  # DVC warns of an empty directory
        (out / "none").touch()
    for name, items in items_by_task.items():
        target = out / name / ITEMS
        target.parent.mkdir()
        if isinstance(items.origin, Path):
            file, revision = items.origin, None
            shutil.copyfile(file, target)
        else:
            file, revision = target, items.origin.commit
            rows = load_rows(items.origin, items.config, items.split, **items.options)
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            target.write_text("".join(lines), encoding="utf-8", newline="\n")
        load_task(items.definition, items.role, file, todo="correct that file, or remove the task")
        source = "samples written for wanda-dvc" if are_samples else items.title
        provenance = describe(
            "download tasks", task=name, source=source, revision=revision, samples=are_samples,
            definition=items.definition, role=items.role, lm_eval=version("lm_eval"), sha256=file_digest(target),
        )  # fmt: skip
        write_provenance(target.parent, provenance)


def load_task(definition: str, role: str, items: Path, *, todo: str = DOWNLOAD_AGAIN) -> Any:
    """Return lm-eval's task: its own YAML file, with the items as the split in that role alone.

    UserError, which ends in `todo`, if there are no items, an item has other fields than the first, or lm-eval
    finds no label among the item's choices. lm-eval alone would count these items as wrong answers.
    """
    import lm_eval.tasks
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    rows = [row for _, row in read_lines(items, todo)]
    if not rows:
        raise UserError(f"{items}: no items, expected one a line; {todo}")
    for number, row in enumerate(rows, start=1):
        if not row.keys() >= rows[0].keys():
            raise UserError(f"{items}: item {number}: lacks a field, expected those of the first item; {todo}")
    tasks = Path(lm_eval.tasks.__file__).parent
    # Definitions may name Python files, and lm-eval runs them. So only lm-eval's own definitions are read.
    if not (tasks / definition).resolve().is_relative_to(tasks.resolve()) or not (tasks / definition).is_file():
        raise UserError(f"{items}: got the definition {definition}, expected one of lm-eval's; {todo}")
    config = load_yaml(tasks / definition)
    # lm-eval would look for the split of the examples, even without examples.
    config |= dict.fromkeys(("training_split", "validation_split", "test_split", "fewshot_split"))
    config |= {f"{role}_split": role, "num_fewshot": 0, "custom_dataset": lambda **_: {role: Dataset.from_list(rows)}}
    try:
        task = ConfigurableTask(config=config)
        for number, item in enumerate(task.eval_docs, start=1):
            _check_label(task, item, f"{items}: item {number}", todo)
    except UserError:
        raise
    except Exception as error:  # the definitions' templates and functions raise any of them
        raise UserError(f"{items}: lm-eval cannot read the items ({reason(error)}); {todo}") from error
    return task


def _check_label(task: Any, item: Any, where: str, todo: str) -> None:
    choices = task.doc_to_choice(item)
    # With a context for each choice, such as WinoGrande's, lm-eval has the label in place of the text.
    labels = task.doc_to_text(item) if task.multiple_input else task.doc_to_target(item)
    for label in labels if isinstance(labels, list) else [labels]:
        is_choice = label in choices if isinstance(label, str) else isinstance(label, int) and 0 <= label < len(choices)
        if not is_choice:
            raise UserError(f"{where}: label {label!r:.40}, expected one of {len(choices)} choices; {todo}")
