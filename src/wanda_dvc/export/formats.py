"""The table of export formats. Importing it is instant: no torch."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from wanda_dvc.errors import UserError

if TYPE_CHECKING:
    from wanda_dvc.study.files import Json
    from wanda_dvc.study.project import Project


@dataclass(frozen=True, kw_only=True)
class Format:
    """A storage format of pruned models."""

    name: str
    about: str  # one line
    # (study, empty directory, scratch) → the metrics of its sparsity, and the storage of zeros, for the model card.
    write: "Callable[[Project, Path, Path], tuple[Json, str]]"
    imports: str = ""  # Python code required for loading, for the model card


def _write_dense(study: "Project", target: Path, _scratch: Path) -> "tuple[Json, str]":
    """Write an ordinary Hugging Face directory, zeros included."""
    from wanda_dvc.stages.apply import prune
    from wanda_dvc.study.card import STORAGE

    written = prune(study, target)
    return written.metrics, STORAGE if written.removed is None else ""


def _write_packed(study: "Project", target: Path, scratch: Path) -> "tuple[Json, str]":
    """Write a packed directory: the pruned linears without their zeros."""
    from wanda_dvc.packed.directory import pack_directory
    from wanda_dvc.stages.apply import prune

    if structure := study.params.plan.structure:
        raise UserError(
            f"--format: got packed with pattern {structure.name}, expected huggingface: the smaller model has no zeros "
            "to leave out"
        )
    written = prune(study, scratch)
    sizes = pack_directory(scratch, target, list(written.zeros))
    shutil.rmtree(scratch)
    return written.metrics, sizes.summary()


FORMATS = {
    row.name: row
    for row in (
        Format(
            name="huggingface",
            about="a directory that transformers loads, as large as the dense model's",
            write=_write_dense,
        ),
        Format(
            name="packed",
            about="without the zeros, so smaller; transformers loads it after `import wanda_dvc`",
            write=_write_packed,
            imports="import wanda_dvc  # pip install wanda-dvc: it registers the format\n",
        ),
    )
}
DEFAULT = "huggingface"
