"""A study on disk: the only module with the paths of its files."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from filelock import FileLock, Timeout

from wanda_dvc.catalog import STATISTICS
from wanda_dvc.errors import UserError, notice
from wanda_dvc.params import Params, read_params
from wanda_dvc.plan import Plan
from wanda_dvc.reading import is_there, read_object, read_text
from wanda_dvc.study.dvc import copy_file
from wanda_dvc.study.files import Json
from wanda_dvc.study.provenance import digest

TEXT, DOCUMENTS, ITEMS = "text.txt", "documents.json.gz", "items.jsonl"  # the files of data/


class Project:
    """A pruning study: a directory with `params.yaml`, `dvc.yaml` and the stages' outputs."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.stats, self.gram, self.gradients = (root / "stats" / tier for tier in STATISTICS)
        self.masks = root / "masks"
        self.weights = root / "weights"  # new weights that cannot be recomputed from masks/ and stats/

    @classmethod
    def find(cls, start: Path | None = None) -> "Project":
        """Return the project around `start` (by default this folder): the nearest folder with a `params.yaml`."""
        start = (start or Path.cwd()).resolve()  # not DVC_ROOT: in a queued experiment that is another checkout
        for folder in (start, *start.parents):
            if (folder / "params.yaml").is_file():
                return cls(folder)
        raise UserError(f"{start}: no params.yaml here or above; cd into a study, or make one: `wanda-dvc init DIR`")

    @cached_property
    def params(self) -> Params:
        """The settings, checked."""
        return read_params(self.root / "params.yaml")

    def planned(self, name: str) -> Json:
        """Return what a stage has to know of the settings, such as `calibrate/norms`: a file in `plan/`."""
        return read_object(self.root / "plan" / f"{name}.json", "run `dvc repro` or `wanda-dvc plan`")

    @cached_property
    def plan(self) -> Plan:
        """How the model is pruned, as the stage `plan` stored it."""
        return Plan.read(self.planned("mask"))

    def with_params(self, params: Params) -> "Project":
        """Return the project with other settings than its `params.yaml`."""
        other = Project(self.root)
        other.__dict__["params"] = params
        return other

    def link_to(self, other: "Project", *names: str) -> None:
        """Link to folders and files of another project, where they exist."""
        for name in names:
            source, target = other.root / name, self.root / name
            if source.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                target.symlink_to(source)

    def model(self, which: str) -> Path:
        """Return the folder of the `dense`, the `pruned` or the `recovered` model."""
        return self.root / "models" / which

    def source(self, part: str) -> Path:
        """Return the link to the local source of a part, or of a text as `perplexity/NAME`; or the note without one."""
        return self.root / "sources" / part

    def data(self, part: str) -> Path:
        """Return the folder of `calibration`, `tasks` or a text, `perplexity/NAME`."""
        return self.root / "data" / part

    def text(self, part: str) -> str:
        """Return the text of `calibration` or `perplexity/NAME`."""
        again = part.replace("/", " ")
        return read_text(self.data(part) / TEXT, f"run `dvc repro` or `wanda-dvc download {again}` again")

    @property
    def repository(self) -> Path:
        """The root of the project's DVC repository, which may be a parent folder; without a repository, the project."""
        here = self.root.absolute()
        return next((folder for folder in (here, *here.parents) if (folder / ".dvc").is_dir()), here)

    @property
    def work_root(self) -> Path:
        """The folder of unfinished work: in the repository in which DVC was started, as queued checkouts are temporary.

        Without DVC, the repository that DVC would find; a new `.dvc` here would separate the study from it.
        """
        return Path(os.environ.get("DVC_ROOT") or self.repository) / ".dvc" / "tmp" / "wanda-dvc"

    def reference(self, text: str) -> Path:
        """Return the folder of the dense model's predictions on the windows of a text."""
        return self.root / "reference" / text

    def metrics(self, which: str, name: str) -> Path:
        """Return the file of metrics, such as `metrics/dense/perplexity/embedded.json`."""
        return self.root / "metrics" / which / f"{name}.json"

    def details(self, which: str, name: str) -> Path:
        """Return the file of the protocol and each window's or item's result."""
        return self.root / "metrics" / "details" / which / f"{name}.json"

    def time(self, run: str) -> Path:
        """Return the file of a stage's last time and machine in this checkout: no output, because it differs by run."""
        return self.repository / ".dvc" / "tmp" / "wanda-dvc-times" / f"{run}.json"

    @property
    def answers(self) -> Path:
        """The folder of zero-shot answers by task: a run with one more task evaluates only the new task."""
        return self.work_root.with_name("wanda-dvc-answers")

    def plots(self, name: str) -> Path:
        """Return the data file of a plot."""
        return self.root / "metrics" / "plots" / f"{name}.csv"

    @contextlib.contextmanager
    def work(self, made_from: Json) -> Iterator["Work"]:
        """Open the unfinished work of a set of inputs, parameters and versions: one process at a time, others wait."""
        work = Work(self.work_root / digest(made_from)[:32])
        with alone(work.path, "waiting for another run with the same inputs and parameters …"):
            yield work


@dataclass(frozen=True)
class Work:
    """A stage's unfinished work. It survives a kill at any point; the next run with the same inputs continues it.

    Two rules ensure this. A folder is renamed before its files are removed. A finished artifact stays in the work
    folder until a rename publishes it: after a kill before the rename, the next run only publishes again.
    """

    path: Path

    @property
    def out(self) -> Path:
        """The artifact so far."""
        return self.part("")

    def part(self, name: str) -> Path:
        """Return the folder of one of several artifacts."""
        folder = self.path / "out" / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def fresh(self) -> Path:
        """Return an empty folder for the artifact, for stages too short to resume."""
        remove(self.path / "out")
        return self.out

    def publish(self, *targets: Path) -> None:
        """Publish the finished artifact and remove the rest; several artifacts are parts named as their places.

        PermissionError, before any move, if an earlier artifact may not be removed.
        """
        for folder in (folder for target in targets for folder, _, _ in os.walk(target)):
            if not os.access(folder, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), folder)
        for target in targets:
            made = self.part(target.name if len(targets) > 1 else "")
            remove(temporary := temporary_place(target))  # left by a killed run
            try:
                _rename(made, target)
            except OSError as error:
                if error.errno != errno.EXDEV:  # else the place is on another file system
                    raise
                shutil.copytree(made, temporary / "out", copy_function=copy_file)
                _rename(temporary / "out", target)
                remove(temporary)
        self.forget()

    def forget(self) -> None:
        """Remove the work."""
        remove(self.path)


@contextlib.contextmanager
def alone(path: Path, waiting: str) -> Iterator[None]:
    """Let one process at a time use a path; another one reports that it is `waiting`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f"{path.name}.lock"))  # it stays
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        notice(waiting)
        held = lock.acquire()
    with held:
        yield


def remove(path: Path) -> None:
    """Remove a folder or a file, if it exists. A kill leaves a folder complete, or under another name."""
    removed = path.with_name(path.name + ".gone")
    for place in (removed, path):  # first the remains of a killed removal
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place.rename(removed))
        else:
            place.unlink(missing_ok=True)


def temporary_place(target: Path) -> Path:
    """Return the temporary folder for copies of an artifact, next to its place."""
    return target.with_name(target.name + ".part")


def _rename(made: Path, target: Path) -> None:
    """Move a finished artifact to its place; an earlier artifact moves to `old` first, to be removed with the work."""
    remove(old := made.with_name("old"))
    target.parent.mkdir(parents=True, exist_ok=True)
    if is_there(target):
        target.rename(old)
    made.rename(target)
