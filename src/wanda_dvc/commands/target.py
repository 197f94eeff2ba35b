"""The places that `export` and `prune` write to, checked before any work and before torch is imported."""

from pathlib import Path

from wanda_dvc.errors import UserError
from wanda_dvc.reading import is_there
from wanda_dvc.stages import check_outside
from wanda_dvc.study.artifact import temporary_place
from wanda_dvc.study.folder import Study


def check_target(study: Study, target: Path) -> Path:
    """Return the absolute path of a directory for a model. UserError unless it is new, or empty and not this one."""
    target = check_outside(study, target)
    _check_empty(target, set())
    _check_empty(temporary_place(target), {"out"})  # an unfinished copy
    return target


def check_new_file(study: Study, path: Path, target: Path) -> Path:
    """Return the absolute path of a new file. UserError if it exists, or if it is inside `target`."""
    file = check_outside(study, path.parent) / path.name
    if is_there(file) or file.resolve().is_relative_to(target.resolve()):
        raise UserError(f"{path}: exists already, or is in {target}; name a new file elsewhere")
    return file


def _check_empty(path: Path, allowed: set[str]) -> None:
    """Raise UserError for a path with other content than the allowed names, and for the current directory."""
    if not is_there(path):
        return
    if not path.is_dir() or {entry.name for entry in path.iterdir()} - allowed or path.samefile("."):
        raise UserError(f"{path}: exists already; name a new directory, or an empty one")
