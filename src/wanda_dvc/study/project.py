"""A study on disk: the only module that knows where things are."""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from wanda_dvc.errors import UserError, notice
from wanda_dvc.params import Params, limit, read_params
from wanda_dvc.study.documents import Documents
from wanda_dvc.study.files import Json, load_json, write_json
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
        """Return the project that holds `start` (by default this folder): the nearest one with a `params.yaml`."""
        start = (start or Path.cwd()).resolve()  # not DVC_ROOT: in a queued experiment that is another checkout
        for folder in (start, *start.parents):
            if (folder / "params.yaml").is_file():
                return cls(folder)
        raise UserError(f"{start}: no params.yaml here or above, expected a wanda-dvc project; cd into one")

    @cached_property
    def params(self) -> Params:
        """The settings, checked."""
        return read_params(self.root / "params.yaml")

    def limited_to(self, settings: Collection[str]) -> "Project":
        """Return the same project with `params` that show some settings, and `runtime`, and no others."""
        limited = Project(self.root)
        limited.__dict__["params"] = limit(self.params, settings)
        return limited

    def model(self, which: str) -> Path:
        """Return the folder of the `dense` or the `pruned` model."""
        return self.root / "models" / which

    def data(self, part: str) -> Path:
        """Return the folder of `calibration`, `perplexity` or `tasks`."""
        return self.root / "data" / part

    def text(self, part: str) -> str:
        """Return the text of `data/calibration` or `data/perplexity`."""
        return (self.data(part) / TEXT).read_bytes().decode("utf-8")  # read_text would change its line ends

    @contextlib.contextmanager
    def documents(self, part: str) -> Iterator[Documents | None]:
        """Open the documents of `data/calibration`, where it holds documents and not one text.

        They are unpacked into a temporary file in the project, because the system's own place for such may be memory.
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
        """Where unfinished work lies: in the repository that DVC was started in. A queued checkout is temporary."""
        return Path(os.environ.get("DVC_ROOT") or self.root) / ".dvc" / "tmp" / "wanda-dvc"

    @property
    def stats(self) -> Path:
        """The folder of statistics."""
        return self.root / "stats"

    @property
    def gram(self) -> Path:
        """The folder of Gram matrices."""
        return self.root / "gram"

    @property
    def masks(self) -> Path:
        """The folder of masks."""
        return self.root / "masks"

    @property
    def weights(self) -> Path:
        """The folder of weights that a reconstruction changed and that do not follow from masks/ and gram/."""
        return self.root / "weights"

    def metrics(self, which: str, name: str) -> Path:
        """Return the file of numbers that are compared, such as `metrics/dense/perplexity.json`."""
        return self.root / "metrics" / which / f"{name}.json"

    def details(self, which: str, name: str) -> Path:
        """Return the file of the protocol and each window's or item's result."""
        return self.root / "metrics" / "details" / which / f"{name}.json"

    @property
    def times(self) -> Times:
        """How long runs took, in all checkouts of this repository."""
        return Times(self.work_root.with_name("wanda-dvc-times"))

    def plots(self, name: str) -> Path:
        """Return the file that a plot is drawn from."""
        return self.root / "metrics" / "plots" / f"{name}.csv"

    @contextlib.contextmanager
    def work(self, made_from: Json) -> Iterator["Work"]:
        """Open a stage's unfinished work: one place for each set of inputs, parameters and versions.

        One process at a time works there.
        """
        from filelock import FileLock, Timeout

        path = self.work_root / digest(made_from)[:32]
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{path}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            notice("waiting for another run with the same inputs and parameters …")
            lock.acquire()
        try:
            work = Work(path)
            work.recover()
            yield work
        finally:
            lock.release()


@dataclass(frozen=True)
class Work:
    """A stage's unfinished work. It survives a kill at any point; the next run with the same inputs goes on from it.

    Work is never both published and unfinished, and never half removed: its folder is renamed first.
    """

    path: Path

    @property
    def out(self) -> Path:
        """The artifact so far."""
        folder = self.path / "out"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def fresh(self) -> Path:
        """Return an empty folder for the artifact, for stages that are not worth resuming."""
        remove(self.path / "out")
        return self.out

    @property
    def _published(self) -> Path:
        return self.path.with_suffix(".published")

    def publish(self, target: Path) -> None:
        """Put the finished artifact in its place and forget the rest."""
        self.out  # noqa: B018 - there is one, however empty
        write_json(self.path / "target.json", {"target": str(target.absolute())})
        self.path.rename(self._published)
        _move(self._published / "out", _beside(target))
        _replace(target)
        remove(self._published)

    def recover(self) -> None:
        """Finish what a killed `publish` or `forget` has begun."""
        remove(_gone(self.path))
        remove(_gone(self._published))
        target = load_json(self._published / "target.json").get("target")
        if target is None:
            return
        moved, out = _beside(Path(target)), self._published / "out"
        if not out.is_dir() and moved.is_dir():
            _move(moved, out)
        if out.is_dir():  # not in its place yet: the run that asks will publish it
            self._published.rename(self.path)
        else:
            remove(self._published)

    def forget(self) -> None:
        """Remove the work."""
        remove(self.path)


def remove(folder: Path) -> None:
    """Remove a folder, if it is there. A kill leaves it whole, or under another name."""
    gone = _gone(folder)
    if gone.exists():
        shutil.rmtree(gone)
    if folder.exists():
        folder.rename(gone)
        shutil.rmtree(gone)


def _gone(folder: Path) -> Path:
    return folder.with_name(folder.name + ".gone")


def _beside(target: Path) -> Path:
    """Where a finished artifact waits beside its place."""
    return target.with_name(target.name + ".part")


def _move(source: Path, target: Path) -> None:
    """Move a folder, also to another file system. A kill leaves it whole in one of the two places."""
    remove(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        source.rename(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        copy = target.with_name(target.name + ".copy")
        remove(copy)
        shutil.copytree(source, copy)
        copy.rename(target)
        remove(source)


def _replace(target: Path) -> None:
    """Put a finished artifact in the place of an earlier one, which is removed only then."""
    earlier = target.with_name(target.name + ".earlier")
    remove(earlier)
    if target.is_symlink() or target.is_file():
        target.unlink()
    elif target.exists():
        target.rename(earlier)
    _beside(target).rename(target)
    remove(earlier)
