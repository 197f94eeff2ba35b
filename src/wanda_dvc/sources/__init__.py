"""What `download` fetches: a model, texts, tasks. Nothing but `stages/download.py` imports this package."""

from pathlib import Path
from typing import Protocol

from wanda_dvc.study.files import Json


class Source(Protocol):
    """A model, text or tasks that were found and checked, but not yet fetched."""

    @property
    def key(self) -> Json:
        """The settings and the commit that decide what is fetched; a killed download is resumed by them."""
        ...

    @property
    def gated(self) -> tuple[str, ...]:
        """The names of what is gated on the Hub: its licence decides who may have it."""
        ...

    def write(self, out: Path, scratch: Path) -> str:
        """Fetch it and write the artifact, with its provenance, into `out`, an empty directory; return its SHA-256.

        Files in `scratch` survive a kill. The next run with the same key finds them there.
        """
        ...
