"""Link the local sources, so that DVC watches their content. It copies and hashes nothing."""

from wanda_dvc.engine.costs import Setting
from wanda_dvc.engine.sizes import Need
from wanda_dvc.params import Params
from wanda_dvc.study.local import SETTINGS, link_source
from wanda_dvc.study.project import Project


def locate(*, project: Project) -> None:
    """Settings → sources/model, sources/calibration, sources/perplexity and sources/tasks."""
    for part in SETTINGS:
        link_source(project, part)


def need(_: Project, __: str | None = None) -> Need:
    """Return nothing: links take no space."""
    return Need()


def cost(_: Params, __: Setting) -> None:
    """None: it computes nothing."""
