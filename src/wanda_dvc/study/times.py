"""How long runs took, and on what machine: a file a run, in DVC's temporary folder of the repository.

They are no outputs of the pipeline. As outputs, times decided what runs: a clone without the cache asked for times that
nobody else had, and two branches conflicted in dvc.lock over seconds. A run's key is the hash of what it made, so that
experiments in any checkout find the times of their own runs.
"""

from dataclasses import dataclass
from pathlib import Path

from wanda_dvc.study.files import Json, load_json, write_json


def machine_of(time: Json) -> str:
    """Return the machine and device of a time, and how many workers did the work."""
    workers = f", workers: {time['workers']}, nodes: {time['nodes']}" if "workers" in time else ""
    return f"{time['machine']}, {time['device']}{workers}"


@dataclass(frozen=True)
class Ledger:
    """JSON objects by the run that made them and a key, shared by all checkouts of one repository."""

    folder: Path

    def _path(self, run: str, key: str) -> Path:
        return self.folder / f"{run}-{key[:32]}.json"

    def write(self, run: str, key: str, content: Json) -> None:
        """Keep an object."""
        write_json(self._path(run, key), content)

    def read(self, run: str, key: str) -> Json:
        """Return an object; an empty one where none was kept."""
        return load_json(self._path(run, key))
