"""What an artifact is: the format of its files, its provenance, and the unfinished work that a later run resumes.

An artifact is a folder, such as `stats/norms`, `masks` or `models/pruned`. Most have one file a block:

    block_000.safetensors, block_001.safetensors, …    tensors, and a JSON header
    provenance.json                                    the command, digests of its inputs, versions; written last

A stage opens its unfinished work by `Study.work`, adds a file a block, writes the provenance by `finish`, and moves the
artifact to its place by `Work.commit`. A killed run leaves the work, and the next run resumes after its last file.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from wanda_dvc import __version__
from wanda_dvc.errors import UserError, notice
from wanda_dvc.reading import check_file, is_there, read_object
from wanda_dvc.study.dvc import copy_file
from wanda_dvc.study.files import Json, write_json

if TYPE_CHECKING:
    from torch import Tensor  # its import takes seconds, and most commands need none

PROVENANCE = "provenance.json"
MODEL_COMMANDS = {"dense": "download model", "pruned": "apply", "recovered": "recover"}  # the command behind each model


# --- format: one file a block ---


def block_file(folder: Path, block: int) -> Path:
    """Return the path of one block's file."""
    return folder / f"block_{block:03d}.safetensors"


def finished_blocks(folder: Path, order: Iterable[int] | None = None) -> int:
    """Return the number of consecutive blocks of an unfinished artifact, in an order, by default from 0."""
    blocks = itertools.count() if order is None else order
    return len(list(itertools.takewhile(lambda block: is_there(block_file(folder, block)), blocks)))


def block_count(folder: Path, made_by: str) -> int:
    """Return an artifact's number of blocks. UserError if a finished one lacks a block, or has one too many."""
    names = {path.name for path in folder.glob("block_*.safetensors")}
    if is_there(folder / PROVENANCE):
        count = read_provenance(folder, made_by)["blocks"]
        if names != {block_file(folder, block).name for block in range(count)}:
            raise UserError(f"{folder}: found {len(names)} blocks, expected {count}; run `wanda-dvc {made_by}` again")
    return len(names)


def save_tensors(path: Path, tensors: "dict[str, Tensor]", header: Json) -> None:
    """Write tensors and a header to a temporary safetensors file, then rename it."""
    from safetensors.torch import save_file

    temporary = path.with_name(path.name + ".part")
    # A single key: safetensors writes several keys in an order that changes from run to run.
    save_file(tensors, temporary, {"wanda_dvc": json.dumps(header)})
    with temporary.open("rb") as file:
        os.fsync(file.fileno())  # a resumed run trusts a file by its name, also after a power cut
    temporary.replace(path)


def load_tensors(
    path: Path, made_by: str, is_read: Callable[[str], bool] | None = None, *, finite: bool = True
) -> "tuple[dict[str, Tensor], Json]":
    """Read the tensors of a safetensors file, by default all, and its header.

    UserError if the file is missing or damaged, or if numbers that have to be finite are not.
    """
    from safetensors import SafetensorError, safe_open

    check_file(path, f"run `dvc repro` or `wanda-dvc {made_by}` again")
    tensors = {}
    try:
        with safe_open(path, framework="pt") as file:
            header: Json = json.loads(file.metadata()["wanda_dvc"])
            for name in filter(is_read, file.keys()):
                tensor = file.get_tensor(name)
                if finite and tensor.is_floating_point() and not tensor.isfinite().all():
                    raise ValueError(f"values of {name} that are not finite")
                tensors[name] = tensor
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: damaged: found {error}, expected what `wanda-dvc {made_by}` writes; run it") from None
    return tensors, header


# --- provenance ---


def digest(content: object) -> str:
    """Return the SHA-256 of a JSON value in canonical form."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_digest(folder: Path, patterns: Iterable[str] = ("**/*",)) -> str:
    """Return one SHA-256 of the files below a folder that match patterns, by default of all but its provenance."""
    digests = {}
    for pattern in patterns:
        for path in folder.glob(pattern):
            if path.is_file() and path.name != PROVENANCE:
                digests[path.relative_to(folder).as_posix()] = file_digest(path)
    return digest(digests)


def describe(made_by: str, *, libraries: tuple[str, ...] = (), **content: object) -> Json:
    """Return a provenance: the command, its inputs, and the versions of the libraries that computed the artifact."""
    versions = {name: version(name) for name in libraries}
    return {"made_by": made_by, "wanda_dvc": __version__, "libraries": versions, **content}


def write_provenance(artifact: Path, content: Json) -> None:
    """Write an artifact's provenance."""
    write_json(artifact / PROVENANCE, content)


def finish(folder: Path, made_from: Json, *, unit: str = "blocks") -> None:
    """Write the provenance of a finished artifact, with its number of files: of blocks, or another `unit`."""
    write_provenance(folder, made_from | {unit: len(list(folder.glob("*.safetensors")))})


def read_provenance(artifact: Path, made_by: str) -> Json:
    """Read the provenance of an artifact. UserError if it is missing, or of an artifact of another command."""
    path, todo = artifact / PROVENANCE, f"run `wanda-dvc {made_by}` again"
    if not is_there(path):
        raise UserError(f"{path}: missing; run `dvc repro` or `wanda-dvc {made_by}` first")
    content = read_object(path, todo)
    if content.get("made_by") != made_by:
        raise UserError(f"{path}: made by {content.get('made_by')}, expected {made_by}; {todo}")
    return content


def check_source(where: str, source: Json, expected: Json, made_by: str) -> None:
    """Raise UserError if an artifact was made from another model or text than the expected one, by their digests."""
    if source["sha256"] != expected["sha256"]:
        raise UserError(
            f"{where}/: made from {source['source']} (sha256 {source['sha256'][:12]}…), expected {expected['source']} "
            f"(sha256 {expected['sha256'][:12]}…), which is here now; run `dvc repro` or `wanda-dvc {made_by}`"
        )


# --- unfinished work ---


@dataclass(frozen=True)
class Work:
    """The unfinished work of one set of inputs. It survives a kill at any point; the next run with them resumes it.

    Two rules ensure this. A folder is renamed before its files are removed. A finished artifact stays in the work
    folder until a rename publishes it: after a kill before the rename, the next run only publishes again.
    """

    path: Path

    @property
    def out(self) -> Path:
        """The artifact so far."""
        return self.output("")

    def output(self, name: str) -> Path:
        """Return the folder of one of several artifacts."""
        folder = self.path / "out" / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def new(self) -> Path:
        """Return an empty folder for the artifact, for stages too short to resume."""
        remove(self.path / "out")
        return self.out

    def commit(self, *targets: Path) -> None:
        """Move the finished artifact to its place and remove the rest; of several, `output(NAME)` goes to …/NAME."""
        for target in targets:
            folder = self.output(target.name if len(targets) > 1 else "")
            temporary = target.with_name(f".{target.name}.part")
            remove(temporary)  # left by a killed run
            try:
                _move(folder, target)
            except OSError as error:
                if error.errno != errno.EXDEV:  # else the place is on another file system
                    raise
                shutil.copytree(folder, temporary / "out", copy_function=copy_file)
                _move(temporary / "out", target)
            finally:
                remove(temporary)
        self.discard()

    def discard(self) -> None:
        """Remove the work."""
        remove(self.path)


@contextlib.contextmanager
def locked(path: Path, waiting: str) -> Iterator[None]:
    """Let one process at a time use a path; another one reports that it is `waiting`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f"{path.name}.lock"))  # it stays
    try:
        acquired = lock.acquire(timeout=0)
    except Timeout:
        notice(waiting)
        acquired = lock.acquire()
    with acquired:
        yield


def remove(path: Path) -> None:
    """Remove a folder or a file, if it exists. A kill leaves a folder complete, or under another name."""
    renamed = path.with_name(path.name + ".gone")
    if renamed.is_dir():  # left by a killed removal
        shutil.rmtree(renamed)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path.rename(renamed))
    else:
        path.unlink(missing_ok=True)


def _move(folder: Path, target: Path) -> None:
    """Move a finished artifact to its place; an earlier artifact moves to `old` first, to be removed with the work."""
    old = folder.with_name("old")
    remove(old)
    target.parent.mkdir(parents=True, exist_ok=True)
    if is_there(target):
        target.rename(old)
    folder.rename(target)
