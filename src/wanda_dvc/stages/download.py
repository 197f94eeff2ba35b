"""Fetch the model, the texts and the tasks. The only stage that may touch a network."""

from collections.abc import Callable

from wanda_dvc.errors import notice
from wanda_dvc.params import Params
from wanda_dvc.sources import Source
from wanda_dvc.sources.models import find_model
from wanda_dvc.sources.tasks import find_tasks
from wanda_dvc.sources.texts import find_text
from wanda_dvc.stages import STAGES
from wanda_dvc.study.local import take_from_the_study
from wanda_dvc.study.project import Project
from wanda_dvc.study.provenance import describe

# The source of each part, by the settings and the text's name, "" for other parts.
SOURCES: dict[str, Callable[[Params, str], Source]] = {
    "model": lambda params, _: find_model(params.model),
    # Documents stay separate, because calibration draws windows within documents, as the Wanda authors do.
    "calibration": lambda params, _: find_text(
        "calibration.text", params.calibration.text.chosen, params.runtime.mirror, as_documents=True
    ),
    "perplexity": lambda params, text: find_text(
        f"perplexity.texts.{text}", params.perplexity.texts[text].chosen, params.runtime.mirror
    ),
    "tasks": lambda params, _: find_tasks(params.tasks, params.runtime.mirror),
}


def download(*, project: Project, part: str, text: str = "") -> None:
    """Sources → models/dense, data/calibration, data/perplexity/NAME or data/tasks."""
    named = f"{part}/{text}" if text else part
    target = project.model("dense") if part == "model" else project.data(named)
    if take_from_the_study(project, named, target):
        return
    source = SOURCES[part](project.params, text)
    if source.gated:
        names = ", ".join(source.gated)
        notice(
            f"download: {names} is gated or private, and `dvc push` shares it; `cache: false` in dvc.yaml prevents it"
        )
    with project.work(describe(f"download {part}", version=STAGES["download"].version, **source.key)) as work:
        source.write(work.fresh(), work.path)
        work.publish(target)
