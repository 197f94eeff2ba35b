"""The formats that a pruned model is exported in, as a table. Importing it is instant: no torch."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wanda_dvc.study.project import Project


@dataclass(frozen=True, kw_only=True)
class Format:
    """How a pruned model is stored."""

    name: str
    about: str  # one line
    write: "Callable[[Project, Path], float]"  # (study, empty directory) → the measured sparsity
    # For the model card:
    storage: str  # what the zeros take on disk
    loading: str  # Python code that loads the model


def _write_dense(study: "Project", target: Path) -> float:
    """Write an ordinary Hugging Face directory, zeros included."""
    from wanda_dvc.stages.apply import measured_sparsity, prune

    return measured_sparsity(prune(study, target, study.params.reconstruction))


_LOAD_DENSE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

where = "path/to/this/directory"  # or its id on the Hub
model = AutoModelForCausalLM.from_pretrained(where)
tokenizer = AutoTokenizer.from_pretrained(where)"""

FORMATS = {
    row.name: row
    for row in (
        Format(
            name="huggingface",
            about="a directory that transformers loads, as large as the dense model's",
            write=_write_dense,
            storage="The zeros are stored like any other number: the files are no smaller than the dense model's.",
            loading=_LOAD_DENSE,
        ),
    )
}
DEFAULT = "huggingface"
