"""Run a stage of a study through DVC, with the stages before it."""

from pathlib import Path

from wanda_dvc.stages import STAGES
from wanda_dvc.study.dvc import repro
from wanda_dvc.study.folder import Study


def reproduce(root: Path, stage: str, variant: str = "", text: str = "", *, shown: bool = False) -> None:
    """Run a stage, or one variant of it, and the stages before it, as far as settings or inputs have changed."""
    runs = STAGES[stage].runs(Study(root).params.perplexity.texts, variant, text)
    repro(root, [name for name, _, _ in runs], shown=shown)
