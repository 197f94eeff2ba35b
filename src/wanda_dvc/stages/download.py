"""Fetch the model, the texts and the tasks. The only stage that may touch a network."""

from wanda_dvc.params import ChosenText, Tasks
from wanda_dvc.sources.tasks import find_tasks
from wanda_dvc.sources.texts import find_text
from wanda_dvc.stages import STAGES
from wanda_dvc.study.artifact import describe
from wanda_dvc.study.folder import Project


def download(*, project: Project, part: str, text: str = "") -> None:
    """Sources → models/dense, data/calibration, data/recovery, data/perplexity/NAME or data/tasks."""
    named = f"{part}/{text}" if text else part
    mirror, planned = project.params.runtime.mirror, project.planned(f"download/{named}")
    if part == "model":
        from wanda_dvc.sources.models import find_model  # imports transformers, which takes seconds

        source = find_model(planned["source"])
    elif part == "tasks":
        source = find_tasks(Tasks(**planned), mirror)
    else:
        setting = f"perplexity.texts.{text}" if text else f"{part}.text"
        source = find_text(setting, ChosenText(**planned), mirror)
    with project.work(describe(f"download {part}", version=STAGES["download"].version, **source.key)) as work:
        source.write(work.fresh(), work.path)
        work.publish(project.model("dense") if part == "model" else project.data(named))
