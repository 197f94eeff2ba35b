"""What does several stages or exports in one go: prune, export, evaluate, doctor; here, what they share."""

from pathlib import Path

from wanda_dvc.errors import UserError
from wanda_dvc.reading import is_there
from wanda_dvc.stages import STAGES, check_outside
from wanda_dvc.study.artifact import temporary_place
from wanda_dvc.study.dvc import repro
from wanda_dvc.study.folder import Study


def reproduce(root: Path, stage: str, variant: str = "", text: str = "", *, shown: bool = False) -> None:
    """Let DVC run a stage, or one variant of it, and those before it, as far as settings or inputs have changed."""
    runs = STAGES[stage].runs(Study(root).params.perplexity.texts, variant, text)
    repro(root, [name for name, _, _ in runs], shown=shown)


def check_target(study: Study, target: Path) -> Path:
    """Return the absolute path of a directory for a model. UserError unless it is new, or empty and not this one."""
    target = check_outside(study, target)
    unfinished = {"out"}  # what a killed copy leaves, which the next one replaces
    for path, allowed in ((target, set()), (temporary_place(target), unfinished)):
        if not is_there(path):
            continue
        if not path.is_dir() or {entry.name for entry in path.iterdir()} - allowed or path.samefile("."):
            raise UserError(f"{path}: exists already; name a new directory, or an empty one")
    return target


def check_new_file(study: Study, path: Path, target: Path) -> None:
    """Raise UserError if a file to write exists, or is inside `target`, another path to write."""
    file = check_outside(study, path.parent) / path.name
    if is_there(file) or file.resolve().is_relative_to(target.resolve()):
        raise UserError(f"{path}: exists already, or is in {target}; name a new file elsewhere")
