"""Where texts and tasks' items lie on the Hub, and so in a mirror."""

from dataclasses import dataclass
from typing import Any

from wanda_dvc.catalog import HUB_ID, TEXTS, NamedText
from wanda_dvc.params import Text


def on_the_hub(wanted: Text) -> tuple[NamedText, str | None, tuple[str, ...]] | None:
    """The data set that a text is, its shard if one stands for the split, and the file's place below the data set's
    id in a mirror. None for a text that is embedded or a file."""
    named = TEXTS.get(wanted.source)
    if not named and not HUB_ID.fullmatch(wanted.source):
        return None
    text = named or NamedText(wanted.source, wanted.config, wanted.column)
    shard = text.shards.get(wanted.split)
    return text, shard, (shard,) if shard else tuple(name for name in (text.config, f"{wanted.split}.jsonl") if name)


@dataclass(frozen=True)
class TaskItems:
    """The split of a data set that holds a task's items."""

    role: str  # of the split, for lm-eval: test or validation
    split: str
    dataset: str
    config: str | None

    @property
    def place(self) -> tuple[str, ...]:
        """The file's place in a mirror."""
        return tuple(part for part in (self.dataset, self.config, f"{self.split}.jsonl") if part)


def task_items(definition: dict[str, Any]) -> TaskItems | None:
    """Where the items of one of lm-eval's tasks are, by its definition; None if that names no data set and split."""
    role = "test" if definition.get("test_split") else "validation"
    dataset, split = definition.get("dataset_path"), definition.get(f"{role}_split")
    if not dataset or not split or definition.get("custom_dataset"):
        return None
    return TaskItems(role, split, dataset, definition.get("dataset_name"))
