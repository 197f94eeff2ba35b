"""A study on disk: the only module that knows where things are."""

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from wanda_dvc.errors import UserError
from wanda_dvc.params import Params, limit, read_params
from wanda_dvc.study.documents import Documents
from wanda_dvc.study.files import Json
from wanda_dvc.study.provenance import digest, read_provenance
from wanda_dvc.study.times import Times

TEXT = "text.txt"
DOCUMENTS = "documents.json.gz"
ITEMS = "items.jsonl"


@dataclass(frozen=True)
class Project:
    """A pruning study: a directory with `params.yaml`, `dvc.yaml` and everything that the stages write."""

    root: Path

    @classmethod
    def find(cls, start: Path | None = None) -> "Project":
        """The project that holds `start` (by default this folder): the nearest one with a `params.yaml`."""
        start = (start or Path.cwd()).resolve()  # not DVC_ROOT: in a queued experiment that is another checkout
        for folder in (start, *start.parents):
            if (folder / "params.yaml").is_file():
                return cls(folder)
        raise UserError(f"{start}: no params.yaml here or above, expected a wanda-dvc project; cd into one")

    @cached_property
    def params(self) -> Params:
        return read_params(self.root / "params.yaml")

    def limited_to(self, settings: Collection[str]) -> "Project":
        """Return the same project with `params` that show some settings, and `runtime`, and no others."""
        limited = Project(self.root)
        limited.__dict__["params"] = limit(self.params, settings)
        return limited

    def model(self, which: str) -> Path:
        """`dense` or `pruned`."""
        return self.root / "models" / which

    def data(self, part: str) -> Path:
        """`calibration`, `perplexity` or `tasks`."""
        return self.root / "data" / part

    def text(self, part: str) -> str:
        """The text of `data/calibration` or `data/perplexity`."""
        return (self.data(part) / TEXT).read_bytes().decode("utf-8")  # read_text would change its line ends

    @contextlib.contextmanager
    def documents(self, part: str) -> Iterator[Documents | None]:
        """The documents of `data/calibration`, where it holds those and not one text.

        They are unpacked into a temporary file of the project, since a system's own place for such may be memory.
        """
        shard = self.data(part) / DOCUMENTS
        if not shard.is_file():
            yield None
            return
        column = read_provenance(self.data(part), f"download {part}")["column"]
        self.work_root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self.work_root) as scratch:
            yield Documents.unpack(shard, column, scratch)

    @property
    def work_root(self) -> Path:
        """Under DVC, in the repository that it was started in: a queued experiment's checkout is temporary."""
        return Path(os.environ.get("DVC_ROOT") or self.root) / ".dvc" / "tmp" / "wanda-dvc"

    @property
    def stats(self) -> Path:
        return self.root / "stats"

    @property
    def masks(self) -> Path:
        return self.root / "masks"

    def metrics(self, which: str, name: str) -> Path:
        """The numbers that are compared: `metrics/dense/perplexity.json`."""
        return self.root / "metrics" / which / f"{name}.json"

    def details(self, which: str, name: str) -> Path:
        """What stands behind the numbers: protocol, and each window's or item's result."""
        return self.root / "metrics" / "details" / which / f"{name}.json"

    @property
    def times(self) -> Times:
        """How long runs took: of all checkouts of this repository."""
        return Times(self.work_root.with_name("wanda-dvc-times"))

    def plots(self, name: str) -> Path:
        """What DVC's plots are drawn from, and the report's."""
        return self.root / "metrics" / "plots" / f"{name}.csv"

    @contextlib.contextmanager
    def work(self, made_from: Json) -> Iterator["Work"]:
        """Where a stage keeps unfinished work: one place for each set of inputs, parameters and versions.

        One process at a time works there.
        """
        from filelock import FileLock, Timeout

        path = self.work_root / digest(made_from)[:32]
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{path}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print("waiting for another run with the same inputs and parameters …", file=sys.stderr, flush=True)
            lock.acquire()
        try:
            yield Work(path)
        finally:
            lock.release()


@dataclass(frozen=True)
class Work:
    """A stage's unfinished work. It survives a kill; the next run with the same inputs finds it."""

    path: Path

    @property
    def out(self) -> Path:
        """The artifact so far."""
        folder = self.path / "out"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def fresh(self) -> Path:
        """An empty folder for the artifact, for stages that are not worth resuming."""
        shutil.rmtree(self.path / "out", ignore_errors=True)
        return self.out

    def publish(self, target: Path) -> None:
        """Put the finished artifact in its place and forget the rest."""
        publish(self.out, target)
        self.forget()

    def forget(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def publish(source: Path, target: Path) -> None:
    """Move a finished directory to its place; what was there goes only once the new one is ready."""
    beside = target.with_name(target.name + ".part")
    shutil.rmtree(beside, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(source, beside)  # a rename, but for work that lies on another file system
    if target.is_symlink() or target.is_file():
        target.unlink()
    elif target.exists():
        shutil.rmtree(target)
    beside.replace(target)
