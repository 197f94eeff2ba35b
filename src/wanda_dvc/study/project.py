"""A study on disk: the only module that knows where things are."""

import contextlib
import errno
import os
import re
import shutil
import tempfile
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from wanda_dvc.errors import UserError, notice
from wanda_dvc.params import Params, limit, read_params
from wanda_dvc.reading import is_there, read_text
from wanda_dvc.study.documents import Documents
from wanda_dvc.study.files import Json, load_json, write_json
from wanda_dvc.study.provenance import PROVENANCE, digest, files_digest, read_provenance
from wanda_dvc.study.times import Ledger

TEXT = "text.txt"
DOCUMENTS = "documents.json.gz"
ITEMS = "items.jsonl"
STARTED = time.time()


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
        raise UserError(
            f"{start}: no params.yaml here or above, expected a wanda-dvc project; cd into one, or begin one: "
            "`wanda-dvc init DIR`"
        )

    @cached_property
    def params(self) -> Params:
        """The settings, checked."""
        return read_params(self.root / "params.yaml")

    def limited_to(self, settings: Collection[str]) -> "Project":
        """Return the same project with `params` that show some settings, and `runtime`, and no others."""
        return self.with_params(limit(self.params, settings))

    def with_params(self, params: Params) -> "Project":
        """Return the same project with other settings than those of its `params.yaml`."""
        other = Project(self.root)
        other.__dict__["params"] = params
        return other

    def model(self, which: str) -> Path:
        """Return the folder of the `dense` or the `pruned` model."""
        return self.root / "models" / which

    def source(self, part: str) -> Path:
        """Return the link to a part's local source, or the note that it has none."""
        return self.root / "sources" / part

    def data(self, part: str) -> Path:
        """Return the folder of `calibration`, `perplexity` or `tasks`."""
        return self.root / "data" / part

    def text(self, part: str) -> str:
        """Return the text of `data/calibration` or `data/perplexity`."""
        return read_text(self.data(part) / TEXT, f"run `dvc repro` or `wanda-dvc download {part}` again")

    @contextlib.contextmanager
    def documents(self, part: str) -> Iterator[Documents | None]:
        """Open the documents of `data/calibration`, where it holds documents and not one text.

        They are unpacked into a temporary file in the project, because the system's own place for such may be memory.
        """
        shard = self.data(part) / DOCUMENTS
        if not is_there(shard):
            yield None
            return
        column = read_provenance(self.data(part), f"download {part}").get("column")
        if not isinstance(column, str):
            raise UserError(
                f"{self.data(part)}: its provenance names no column, expected that of its documents; "
                f"run `wanda-dvc download {part}` again"
            )
        self.work_root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self.work_root) as scratch:
            yield Documents.unpack(shard, column, scratch)

    @property
    def repository(self) -> Path:
        """The root of the DVC repository that holds the project, which may be further up; without one, the project."""
        here = self.root.absolute()
        return next((folder for folder in (here, *here.parents) if (folder / ".dvc").is_dir()), here)

    @property
    def work_root(self) -> Path:
        """Where unfinished work lies: in the repository that DVC was started in. A queued checkout is temporary.

        Without DVC it is the one that DVC would find: a `.dvc` here would part the study from it.
        """
        return Path(os.environ.get("DVC_ROOT") or self.repository) / ".dvc" / "tmp" / "wanda-dvc"

    @property
    def stats(self) -> Path:
        """The folder of statistics."""
        return self.root / "stats"

    @property
    def gram(self) -> Path:
        """The folder of Gram matrices."""
        return self.root / "gram"

    @property
    def fisher(self) -> Path:
        """The folder of the Fisher tier."""
        return self.root / "fisher"

    @property
    def fisher_gram(self) -> Path:
        """The folder of the Fisher tier's Gram matrices."""
        return self.root / "fisher_gram"

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
    def times(self) -> Ledger:
        """How long runs took."""
        return Ledger(self.work_root.with_name("wanda-dvc-times"))

    @property
    def answers(self) -> Ledger:
        """The zero-shot answers to each task, so that a run with one more task asks only that one."""
        return Ledger(self.work_root.with_name("wanda-dvc-answers"))

    @property
    def locks(self) -> Path:
        """The file of what `dvc.lock` says at each commit that was listed."""
        return self.work_root.with_name("wanda-dvc-locks.json")

    def plots(self, name: str) -> Path:
        """Return the file that a plot is drawn from."""
        return self.root / "metrics" / "plots" / f"{name}.csv"

    def idle_work(self) -> Iterator["Work"]:
        """Yield the unfinished work that no process is at, one folder at a time, locked against all others."""
        from filelock import FileLock, Timeout

        names = {path.name.partition(".")[0] for path in self.work_root.glob("*")}
        for name in sorted(name for name in names if re.fullmatch("[0-9a-f]{32}", name)):
            work = Work(self.work_root / name)
            with contextlib.suppress(Timeout), FileLock(work.lock, timeout=0):
                yield work

    @contextlib.contextmanager
    def work(self, made_from: Json, *, wait: bool = True) -> Iterator["Work"]:
        """Open a stage's unfinished work: one place for each set of inputs, parameters and versions.

        One process at a time works there; without `wait`, filelock.Timeout while another does. Whoever has waited
        begins with what the other has published.
        """
        from filelock import FileLock, Timeout

        work = Work(self.work_root / digest(made_from)[:32])
        self.work_root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(work.lock)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if not wait:
                raise
            notice("waiting for another run with the same inputs and parameters …")
            write_json(work.awaited, {})
            lock.acquire()
        try:
            work.recover()
            work.take_over(made_from)
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
        """Put the finished artifact in its place and forget the rest.

        PermissionError, with nothing moved yet, where the earlier artifact may not be removed.
        """
        if target.is_dir() and not os.access(target, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(target))
        self.out  # noqa: B018 - there is one, however empty
        told = {"target": str(target.absolute()), "provenance": load_json(self.out / PROVENANCE)}
        write_json(self.path / "target.json", told)
        self.path.rename(self._published)
        _move(self._published / "out", _beside(target))
        _replace(target)
        remove(self._published)
        if any(self.path.parent.glob("*.awaited")):  # perhaps for this one's sibling
            write_json(self.awaited, {"target": str(target.absolute())})

    def take_over(self, made_from: Json) -> None:
        """Begin with what another run has published of the same inputs since this process started.

        Older ones do not count: whoever runs a stage again may want to mend its files.
        """
        if not self.awaited.exists() or self.awaited.stat().st_mtime < STARTED:
            return
        remove(copy := _copy(self.path))
        with contextlib.suppress(OSError, UserError):  # its experiment may be over, or DVC at work there
            target = load_json(self.awaited).get("target")
            if target is None:  # that run was killed: there is only its unfinished work, which is at hand
                return
            shutil.copytree(target, copy / "out")
            made = load_json(copy / "out" / PROVENANCE)  # of the copy: another run may have replaced the target since
            if made_from.items() <= made.items() and made.get("files") == files_digest(copy / "out"):
                remove(self.path)
                copy.rename(self.path)
        remove(copy)

    def recover(self) -> None:
        """Finish what a killed `publish` or `forget` has begun."""
        remove(_gone(self.path))
        remove(_gone(self._published))
        told = load_json(self._published / "target.json")
        if "target" not in told:
            return
        moved, out = _beside(Path(told["target"])), self._published / "out"
        # Another run with other inputs, killed after this one, may have left its own there.
        if not out.is_dir() and moved.is_dir() and load_json(moved / PROVENANCE) == told.get("provenance"):
            _move(moved, out)
        if out.is_dir():  # not in its place yet: the run that asks will publish it
            self._published.rename(self.path)
        else:
            remove(self._published)

    def forget(self) -> None:
        """Remove the work."""
        remove(self.path)

    @property
    def awaited(self) -> Path:
        """The file that says that another run waits, and then where its artifact was published."""
        return self.path.with_suffix(".awaited")

    @property
    def lock(self) -> Path:
        """The file that the process at work holds locked. It stays when the work is done."""
        return self.path.with_suffix(".lock")

    def leftovers(self) -> list[Path]:
        """Return all that a run left behind, also beside the artifact's place: folders, and the lock's file."""
        places = [folder for path in (self.path, self._published) for folder in (path, _gone(path))]
        if target := self._target():
            places += places_beside(target)
        return [place for place in (*places, self.awaited, self.lock) if place.exists()]

    def discard(self) -> None:
        """Remove all leftovers. An artifact that was moved away for one that never came goes back to its place."""
        target = self._target()
        if target and not target.exists() and _earlier(target).is_dir():
            _earlier(target).rename(target)
        for path in self.leftovers():
            path.unlink() if path.is_file() else shutil.rmtree(path)

    def _target(self) -> Path | None:
        """Where a publication that has begun goes."""
        found = (load_json(path / "target.json").get("target") for path in (self.path, self._published))
        return next((Path(target) for target in found if target), None)


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


def places_beside(target: Path) -> list[Path]:
    """Return all that a publication of an artifact may write or remove beside it."""
    places = [_beside(target), _earlier(target), _copy(_beside(target))]
    return [path for place in places for path in (place, _gone(place))]


def _copy(target: Path) -> Path:
    """Where an artifact is copied to from another file system."""
    return target.with_name(target.name + ".copy")


def _earlier(target: Path) -> Path:
    """Where an artifact waits until the new one is in its place."""
    return target.with_name(target.name + ".earlier")


def _move(source: Path, target: Path) -> None:
    """Move a folder, also to another file system. A kill leaves it whole in one of the two places."""
    remove(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        source.rename(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        copy = _copy(target)
        remove(copy)
        shutil.copytree(source, copy)
        copy.rename(target)
        remove(source)


def _replace(target: Path) -> None:
    """Put a finished artifact in the place of an earlier one, which is removed only then."""
    earlier = _earlier(target)
    remove(earlier)
    if target.is_symlink() or target.is_file():
        target.unlink()
    elif target.exists():
        target.rename(earlier)
    _beside(target).rename(target)
    remove(earlier)
