"""Link the local sources, so that DVC watches their content. No file is copied or hashed."""

from wanda_dvc.study.local import link_source, sources
from wanda_dvc.study.project import Project, remove


def locate(*, project: Project) -> None:
    """Settings → sources/model, sources/calibration, sources/perplexity/NAME and sources/tasks."""
    parts, texts = sources(project.params), project.source("perplexity")
    if texts.is_symlink() or texts.is_file():  # of a study of one text
        texts.unlink()
    for part in parts:
        link_source(project, part)
    for place in texts.iterdir():
        if f"perplexity/{place.name}" not in parts:  # of a removed text
            remove(place)
