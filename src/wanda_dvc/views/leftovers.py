"""What failed runs left behind: work folders, files of locks, and checkouts of queued experiments."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from wanda_dvc.study.files import json_text
from wanda_dvc.study.project import Project

CHECKOUTS = ("tmp*", "standalone/tmp*")  # of DVC's queue, and of `dvc exp run --temp`
YOUNG = 300  # seconds in which DVC may still be filling a checkout, before any process works in it


def clean(*, project: Project, dry_run: bool = False, as_json: bool = False) -> str:
    """Remove what failed runs left behind, and say what, as a list or as JSON; with `dry_run` only say it.

    Whatever a running stage holds stays. Unfinished work that is removed is computed again.
    """
    found: list[tuple[str, int]] = []
    for work in project.idle_work():
        found += [(_shown(project, place), _size(place)) for place in work.leftovers()]
        if not dry_run:
            work.discard()
    for checkout in _checkouts(project):
        found.append((_shown(project, checkout), _size(checkout)))
        if not dry_run:
            shutil.rmtree(checkout)
    if as_json:
        places = [{"path": name, "bytes": size} for name, size in found]
        return json_text({"removed": not dry_run, "places": places})
    if not found:
        return "Nothing: no failed run has left anything behind."
    total = sum(size for _, size in found)
    verb = "Would remove" if dry_run else "Removed"
    return "\n".join([*(f"{name}  {_mb(size)}" for name, size in found), f"{verb} {_mb(total)}."])


def _checkouts(project: Project) -> Iterator[Path]:
    """Yield the checkouts of experiments that no process works in."""
    root = project.work_root.parent / "exps"
    busy = {folder for process in psutil.process_iter() if (folder := _folder(process))}
    for checkout in sorted(path for pattern in CHECKOUTS for path in root.glob(pattern)):
        young = time.time() - checkout.stat().st_mtime < YOUNG
        if checkout.is_dir() and not young and not any(folder.is_relative_to(checkout) for folder in busy):
            yield checkout


def _folder(process: psutil.Process) -> Path | None:
    """The folder that a process works in; None for one that is gone or another user's."""
    try:
        return Path(process.cwd())
    except psutil.Error:
        return None


def _shown(project: Project, path: Path) -> str:
    return path.relative_to(project.root).as_posix() if path.is_relative_to(project.root) else str(path)


def _size(path: Path) -> int:
    """Bytes on disk; a file that has other names, such as one in the cache, counts nothing."""
    files = [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file() and not one.is_symlink()]
    return sum(one.stat().st_blocks * 512 for one in files if one.stat().st_nlink == 1)


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
