"""Where texts and tasks' items lie on the Hub, and so in a mirror."""

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wanda_dvc.params import Text

# The name of anything on the Hub: an owner's name, one slash, and for a model perhaps @ and a revision.
HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*/[\w.\-]+(@[\w.\-/]+)?")


@dataclass(frozen=True)
class NamedText:
    """A data set of text, its configuration, and the splits that it has."""

    dataset: str
    config: str | None
    column: str
    splits: tuple[str, ...] = ("train", "validation", "test")
    revision: str | None = None  # None: its main branch
    # Of a data set too large to be taken whole, the one file that stands for each split. Its rows are documents,
    # which calibration draws from as the Wanda authors do instead of joining them.
    shards: dict[str, str] = field(default_factory=dict)


TEXTS = {
    "wikitext2": NamedText("Salesforce/wikitext", "wikitext-2-raw-v1", "text"),
    "c4": NamedText(
        "allenai/c4",
        None,
        "text",
        splits=("train", "validation"),
        shards={
            "train": "en/c4-train.00000-of-01024.json.gz",
            "validation": "en/c4-validation.00000-of-00008.json.gz",
        },
    ),
    # Its main branch is a script, which nothing here runs; the Hub keeps its rows as Parquet beside it.
    "ptb": NamedText("ptb-text-only/ptb_text_only", "penn_treebank", "sentence", revision="refs/convert/parquet"),
}


def on_the_hub(wanted: "Text") -> tuple[NamedText, str | None, tuple[str, ...]] | None:
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
