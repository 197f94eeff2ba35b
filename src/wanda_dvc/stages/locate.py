"""Link the local sources, so that DVC watches their content. No file is copied or hashed."""

from wanda_dvc.study.local import SETTINGS, link_source
from wanda_dvc.study.project import Project


def locate(*, project: Project) -> None:
    """Settings → sources/model, sources/calibration, sources/perplexity and sources/tasks."""
    for part in SETTINGS:
        link_source(project, part)
