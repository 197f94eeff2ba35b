"""The times and machines of runs: a file per run, in DVC's temporary folder of the repository.

Times are not outputs of the pipeline. As outputs, times caused reruns: a clone without the cache needed times that did
not exist elsewhere, and two branches conflicted in dvc.lock over seconds. A run's key is the hash of its results, so
experiments in any checkout find the times of their own runs.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from wanda_dvc.study.files import Json, load_json, write_json


def machine_of(time: Json) -> str:
    """Return the machine, device and number of workers of a time."""
    workers = f", workers: {time['workers']}, nodes: {time['nodes']}" if "workers" in time else ""
    return f"{time['machine']}, {time['device']}{workers}"


@dataclass(frozen=True)
class Ledger:
    """JSON objects by run and key, shared by all checkouts of one repository."""

    folder: Path

    def _path(self, run: str, key: str) -> Path:
        return self.folder / f"{run}-{key[:32]}.json"

    def write(self, run: str, key: str, content: Json) -> None:
        """Store an object; other processes may store the same one at this moment."""
        path = self._path(run, key)
        own = path.with_name(f"{path.name}.{os.getpid()}")
        write_json(own, content)
        own.replace(path)

    def read(self, run: str, key: str) -> Json:
        """Return an object, or an empty one."""
        return load_json(self._path(run, key))
