"""Fetch the model, the texts and the tasks. The only stage that may touch a network."""

from pathlib import Path

from wanda_dvc.params import ChosenText, Tasks
from wanda_dvc.reading import is_there
from wanda_dvc.sources.tasks import find_tasks
from wanda_dvc.sources.texts import find_texts
from wanda_dvc.stages import STAGES
from wanda_dvc.study.artifact import describe
from wanda_dvc.study.folder import Study


def download(*, study: Study, source: str, text: str = "") -> None:
    """Sources → models/dense, data/calibration, data/recovery, data/perplexity/NAME or data/tasks.

    Several texts of a calibration or a recovery are in a folder each, by their numbers.
    """
    name = f"{source}/{text}" if text else source
    settings, mirror = study.stage_input(f"download/{name}"), study.params.runtime.mirror
    if source == "model":
        from wanda_dvc.sources.models import find_model  # imports transformers, which takes seconds

        fetched = find_model(settings["source"])
    elif source == "tasks":
        fetched = find_tasks(Tasks(**settings), mirror)
    else:
        setting = f"{source}.texts.{text}" if text else f"{source}.text"
        fetched = find_texts(setting, [ChosenText(**chosen) for chosen in settings["texts"]], mirror)
    with study.work(describe(f"download {source}", version=STAGES["download"].version, **fetched.key)) as work:
        fetched.write(work.new(), work.path)
        work.commit(study.model("dense") if source == "model" else study.data(name))


def find_model_config(study: Study) -> Path | None:
    """Return the config.json of a study's model, before its download too; None of a package before its download."""
    from wanda_dvc.sources.models import find_config  # imports transformers, which takes seconds

    source, downloaded = study.params.model, study.model("dense") / "config.json"
    if is_there(downloaded) and not Path(source).is_absolute():  # a directory may have changed; the Hub is not asked
        return downloaded
    return find_config(source)
