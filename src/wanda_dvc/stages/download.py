"""Fetch the model, the texts and the tasks. The only stage that may touch a network."""

from wanda_dvc.params import ChosenText, Tasks
from wanda_dvc.sources import Source
from wanda_dvc.sources.models import find_model
from wanda_dvc.sources.tasks import find_tasks
from wanda_dvc.sources.texts import find_text
from wanda_dvc.stages import STAGES
from wanda_dvc.study.project import Project
from wanda_dvc.study.provenance import describe


def download(*, project: Project, part: str, text: str = "") -> None:
    """Sources → models/dense, data/calibration, data/recovery, data/perplexity/NAME or data/tasks."""
    named = f"{part}/{text}" if text else part
    target = project.model("dense") if part == "model" else project.data(named)
    source = _source(project, part, text)
    with project.work(describe(f"download {part}", version=STAGES["download"].version, **source.key)) as work:
        source.write(work.fresh(), work.path)
        work.publish(target)


def _source(project: Project, part: str, text: str) -> Source:
    """Find the source of a part."""
    mirror, planned = project.params.runtime.mirror, project.planned(f"download/{part}" + (f"/{text}" if text else ""))
    if part == "model":
        return find_model(planned["source"])
    if part == "tasks":
        return find_tasks(Tasks(**planned), mirror)
    if part in ("calibration", "recovery"):
        # Documents stay separate, because calibration draws windows within documents, as the Wanda authors do.
        return find_text(f"{part}.text", ChosenText(**planned), mirror, as_documents=True)
    return find_text(f"perplexity.texts.{text}", ChosenText(**planned), mirror)
