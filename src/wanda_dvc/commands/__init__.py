"""What does several stages or exports in one go: prune, export, evaluate, doctor; here, what they share."""

from pathlib import Path

from wanda_dvc.errors import UserError
from wanda_dvc.reading import is_there
from wanda_dvc.stages import STAGES, check_outside
from wanda_dvc.study.dvc import repro
from wanda_dvc.study.folder import Study


def reproduce(root: Path, stage: str, variant: str = "", text: str = "", *, shown: bool = False) -> None:
    """Let DVC run a stage, or one variant of it, and those before it, as far as settings or inputs have changed."""
    runs = STAGES[stage].runs(Study(root).params.perplexity.texts, variant, text)
    repro(root, [name for name, _, _ in runs], shown=shown)


def check_target(study: Study, target: Path) -> Path:
    """Return the absolute path of a directory for a model. UserError unless it is new, or empty and not this one."""
    target = check_outside(study, target.resolve() if target.is_symlink() else target)
    is_used = is_there(target) and (not target.is_dir() or any(target.iterdir()) or target.samefile("."))
    if is_used or target.is_mount():
        raise UserError(f"{target}: exists already; name a new directory, or an empty one that is no mount point")
    return target
