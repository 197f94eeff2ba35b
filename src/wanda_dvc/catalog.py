"""What a setting of params.yaml can name: methods and texts. Importing it is instant: no torch."""

import re
from dataclasses import dataclass, field

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
