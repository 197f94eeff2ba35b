"""What `download` fetches: a model, texts, tasks. Nothing but `stages/download.py` imports this package."""

from abc import ABC, abstractmethod
from pathlib import Path

from wanda_dvc.study.files import Json


class Source(ABC):
    """A model, text or tasks that were found and checked, but not yet fetched."""

    @property
    @abstractmethod
    def key(self) -> Json:
        """The settings and the commit that decide what is fetched; an interrupted download is resumed by them."""

    @property
    def gated(self) -> tuple[str, ...]:
        """The names of the repositories that are gated on the Hub: a licence decides who may have them."""
        return ()

    @abstractmethod
    def write(self, out: Path, scratch: Path) -> str:
        """Fetch it and write the artifact, with its provenance, into `out`, an empty directory; return its SHA-256.

        Files in `scratch` survive an interruption. The next run with the same key finds them there.
        """
