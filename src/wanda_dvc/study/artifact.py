"""An artifact: a folder with one safetensors file a block and a `provenance.json` that names its inputs.

This module has all of it: names and format of the files, provenance, and unfinished work, which a later run resumes.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open

from wanda_dvc import __version__
from wanda_dvc.errors import UserError, notice
from wanda_dvc.reading import check_file, is_there, read_object
from wanda_dvc.study.dvc import copy_file
from wanda_dvc.study.files import Json, write_json

if TYPE_CHECKING:
    from torch import Tensor

PROVENANCE = "provenance.json"
INSTEAD = {"apply": "evaluate"}  # `evaluate` measures another model in the place of a pruned one
MADE_BY = {"dense": "download model", "pruned": "apply", "recovered": "recover"}  # the command behind each model


def digest(content: object) -> str:
    """Return the SHA-256 of a JSON value in canonical form."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe(made_by: str, *, libraries: tuple[str, ...] = (), **content: object) -> Json:
    """Return a provenance: the command, its inputs, and the versions of the libraries that computed the artifact."""
    versions = {name: version(name) for name in libraries}
    return {"made_by": made_by, "wanda_dvc": __version__, "libraries": versions, **content}


def read_provenance(artifact: Path, made_by: str) -> Json:
    """Read the provenance of an artifact. UserError if it is missing, or of an artifact of another command."""
    path, todo = artifact / PROVENANCE, f"run `wanda-dvc {made_by}` again"
    if not is_there(path):
        raise UserError(f"{path}: missing; run `dvc repro` or `wanda-dvc {made_by}` first")
    content = read_object(path, todo)
    if content.get("made_by") not in (made_by, INSTEAD.get(made_by)):
        raise UserError(f"{path}: made by {content.get('made_by')}, expected {made_by}; {todo}")
    return content


def check_source(where: str, found: Json, expected: Json, made_by: str) -> None:
    """Raise UserError if an artifact was made from another model or text than the expected one, by their digests."""
    if found["sha256"] != expected["sha256"]:
        raise UserError(
            f"{where}/: made from {found['source']} (sha256 {found['sha256'][:12]}…), expected {expected['source']} "
            f"(sha256 {expected['sha256'][:12]}…), which is here now; run `dvc repro` or `wanda-dvc {made_by}`"
        )


def write_provenance(artifact: Path, content: Json) -> None:
    """Write an artifact's provenance."""
    write_json(artifact / PROVENANCE, content)


def files_digest(folder: Path, patterns: Iterable[str] = ("**/*",)) -> str:
    """Return one SHA-256 of the files below a folder that match patterns, by default of all but its provenance."""
    paths = {path for one in patterns for path in folder.glob(one) if path.is_file() and path.name != PROVENANCE}
    return digest({path.relative_to(folder).as_posix(): file_digest(path) for path in paths})


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

    def new(self) -> Path:
        """Return an empty folder for the artifact, for stages too short to resume."""
        remove(self.path / "out")
        return self.out

    def commit(self, *targets: Path) -> None:
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


def block_file(folder: Path, block: int) -> Path:
    """Return the path of one block's file."""
    return folder / f"block_{block:03d}.safetensors"


def finish(folder: Path, made_from: Json, *, parts: str = "blocks") -> None:
    """Write the provenance of a finished artifact, with its number of blocks, or other parts."""
    write_provenance(folder, made_from | {parts: len(list(folder.glob("*.safetensors")))})


def block_count(folder: Path, made_by: str) -> int:
    """Return an artifact's number of blocks; unfinished, of its files. UserError if a block is missing or surplus."""
    found = {path.name for path in folder.glob("block_*.safetensors")}
    if is_there(folder / PROVENANCE):
        count = read_provenance(folder, made_by)["blocks"]
        if found != {block_file(folder, block).name for block in range(count)}:
            raise UserError(f"{folder}: found {len(found)} blocks, expected {count}; run `wanda-dvc {made_by}` again")
    return len(found)


def finished_blocks(folder: Path, order: Iterable[int] | None = None) -> int:
    """Return the number of consecutive blocks of an unfinished artifact, in an order, by default from 0."""
    blocks = itertools.count() if order is None else order
    return sum(1 for _ in itertools.takewhile(lambda block: is_there(block_file(folder, block)), blocks))


def save_tensors(path: Path, tensors: "dict[str, Tensor]", header: Json) -> None:
    """Write tensors and a header to a temporary safetensors file, then rename it."""
    from safetensors.torch import save_file  # imports torch: stages that need none use this module too

    temporary = path.with_name(path.name + ".part")
    # A single key: safetensors writes several keys in an order that changes from run to run.
    save_file(tensors, temporary, {"wanda_dvc": json.dumps(header)})
    with temporary.open("rb") as file:
        os.fsync(file.fileno())  # a resumed run trusts the file by its name, also after a power cut
    temporary.replace(path)


def load_tensors(
    path: Path, made_by: str, kinds: Sequence[str] = (), of: Iterable[str] | None = None, *, finite: bool = True
) -> "tuple[dict[str, Tensor], Json]":
    """Read the tensors and the header of a safetensors file.

    Of all tensors, named OWNER.KIND, those of some `kinds` and of some owners are read, by default all. UserError if
    the file is missing or damaged, or if numbers that have to be finite are not.
    """
    check_file(path, f"run `dvc repro` or `wanda-dvc {made_by}` again")
    found = {}
    try:
        with safe_open(path, framework="pt") as file:
            header: Json = json.loads(file.metadata()["wanda_dvc"])
            for name in file.keys():
                owner, _, kind = name.rpartition(".")
                if (not kinds or kind in kinds) and (of is None or owner in of):
                    found[name] = file.get_tensor(name)
                    if finite and found[name].is_floating_point() and not found[name].isfinite().all():
                        raise ValueError(f"values of {name} that are not finite")
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: damaged: found {error}, expected what `wanda-dvc {made_by}` writes; run it") from None
    return found, header
