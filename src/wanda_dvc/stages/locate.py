"""Link the local sources, so that DVC watches their content. No file is copied or hashed."""

from wanda_dvc.study.local import link_source, sources
from wanda_dvc.study.project import Project, remove


def locate(*, project: Project) -> None:
    """Settings → sources/model, sources/calibration, sources/perplexity/NAME and sources/tasks."""
    remove(project.source("perplexity"))  # a text may have been removed
    for part in sources(project.params):
        link_source(project, part)
