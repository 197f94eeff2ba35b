"""The sources of `download`: a model, texts, tasks. Only `stages/download.py` imports this package."""

from abc import ABC, abstractmethod
from pathlib import Path

from wanda_dvc.study.files import Json


class Source(ABC):
    """A model, text or tasks, found and checked, but not yet fetched."""

    @property
    @abstractmethod
    def key(self) -> Json:
        """The settings and the commit that identify the content, also to resume an interrupted download."""

    @property
    def gated(self) -> tuple[str, ...]:
        """The names of the gated repositories on the Hub, with access by licence."""
        return ()

    @abstractmethod
    def write(self, out: Path, scratch: Path) -> None:
        """Fetch it and write the artifact, with its provenance, into `out`, an empty directory.

        Files in `scratch` survive an interruption. The next run with the same key finds them there.
        """
