"""The places of texts and of tasks' items: embedded, on the Hub, or in a mirror with the Hub's layout."""

import contextlib
import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

from wanda_dvc.catalog import TEXTS, NamedText
from wanda_dvc.errors import UserError
from wanda_dvc.params import ChosenText
from wanda_dvc.reading import check_file, is_there
from wanda_dvc.study.files import Json

EMBEDDED = Path(str(files("wanda_dvc"))) / "embedded"


def on_the_hub(wanted: ChosenText) -> tuple[NamedText, str | None, tuple[str, ...]] | None:
    """Return the data set of a text, the shard used for its split (or None), and its place in a mirror.

    The place is a path below the data set's id. None for an embedded text or a file.
    """
    if wanted.dataset is None:
        return None
    text = TEXTS.get(wanted.source) or NamedText(wanted.dataset, wanted.config, wanted.column)
    shard = text.shards.get(wanted.split or "")
    return text, shard, (shard,) if shard else tuple(name for name in (text.config, f"{wanted.split}.jsonl") if name)


@dataclass(frozen=True)
class TaskItems:
    """The data set split with a task's items."""

    role: str  # of the split, for lm-eval: test or validation
    split: str
    dataset: str
    config: str | None

    @property
    def place(self) -> tuple[str, ...]:
        """The file's place in a mirror."""
        return tuple(part for part in (self.dataset, self.config, f"{self.split}.jsonl") if part)


def task_definition(name: str) -> tuple[str, Json] | None:
    """Return the file of an lm-eval task, relative to the tasks' folder, and its content; None for an unknown task.

    Functions stay names in it. The file is lm-eval's index entry for the name. Indexing all 14,000 files takes 5 s, so
    this indexes only files with the name in their text: every definition contains its task's name.
    """
    from lm_eval.tasks._index import Entry, TaskIndex
    from lm_eval.tasks._yaml_loader import load_yaml

    root, texts = _task_files()
    named, index = re.compile(rf"(?<!\w){re.escape(name)}(?!\w)".encode()), dict[str, Entry]()
    for path in (path for path, text in texts.items() if named.search(text)):
        with contextlib.suppress(Exception):  # lm-eval also skips unreadable files
            TaskIndex.process_cfg(load_yaml(path, resolve_func=False), path, index)
    found = index.get(name)
    return (found.yaml_path.relative_to(root).as_posix(), found.cfg) if found and found.yaml_path else None


@cache
def _task_files() -> tuple[Path, dict[Path, bytes]]:
    """Return the folder of lm-eval's tasks, and all definitions below it, in the order of lm-eval's index."""
    import lm_eval.tasks
    from lm_eval.tasks._index import TaskIndex

    root = Path(lm_eval.tasks.__file__).parent
    return root, {path: path.read_bytes() for path in TaskIndex._iter_yaml_files(root)}


def task_items(definition: Json) -> TaskItems | None:
    """Return the items of a task's definition; None if it names no data set and split."""
    role = "test" if definition.get("test_split") else "validation"
    dataset, split = definition.get("dataset_path"), definition.get(f"{role}_split")
    if not dataset or not split or definition.get("custom_dataset"):
        return None
    return TaskItems(role, split, dataset, definition.get("dataset_name"))


def in_mirror(mirror: str | None, *parts: str) -> Path | None:
    """Return a file in the mirror; None without a mirror. UserError if the mirror lacks the file."""
    if mirror is None:
        return None
    path = Path(mirror, *parts)
    if ".." in path.parts or not path.is_relative_to(mirror):
        raise UserError(f"runtime.mirror: got {'/'.join(parts)}, expected a place inside {mirror}; correct the setting")
    if is_there(path):
        check_file(path)
    else:
        how = "as the Hub has it" if path.suffix == ".gz" else "as JSONL, one row a line"
        raise UserError(f"runtime.mirror: {path} not found; put it there {how}, or set runtime.mirror to null")
    return path
