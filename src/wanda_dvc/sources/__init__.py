"""The sources of `download`: a model, texts, tasks. `evaluate` also reads models here."""

from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from wanda_dvc.study.files import Json

EMBEDDED_FOLDER = Path(str(files("wanda_dvc"))) / "embedded"


class Source(NamedTuple):
    """A model, text or tasks, found and checked, but not yet fetched."""

    key: Json  # the settings and the commit that identify the content, also to resume an interrupted download
    # Writes it, with its provenance, into an empty directory, the first. Files in the second survive an interruption.
    write: Callable[[Path, Path], None]
