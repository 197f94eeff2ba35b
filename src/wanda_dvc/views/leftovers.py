"""Leftovers of failed runs: work folders, lock files, and checkouts of queued experiments."""

import itertools
from pathlib import Path

from wanda_dvc.study.checkouts import abandoned
from wanda_dvc.study.files import json_text
from wanda_dvc.study.project import Project, remove


def clean(*, project: Project, dry_run: bool = False, as_json: bool = False) -> str:
    """Remove leftovers of failed runs, and return a list or JSON of them; with `dry_run` only list.

    Files of running stages stay. Removed unfinished work is computed again.
    """
    found: list[tuple[str, int]] = []
    held = (place for work in project.idle_work() for place in work.leftovers())  # each while its work is locked
    for place in itertools.chain(held, abandoned(project)):
        found.append((_shown(project, place), _size(place)))
        if not dry_run:
            remove(place)
    if as_json:
        places = [{"path": name, "bytes": size} for name, size in found]
        return json_text({"removed": not dry_run, "places": places})
    if not found:
        return "Nothing to remove: failed runs left no files."
    total = sum(size for _, size in found)
    verb = "Would remove" if dry_run else "Removed"
    return "\n".join([*(f"{name}  {_mb(size)}" for name, size in found), f"{verb} {_mb(total)}."])


def _shown(project: Project, path: Path) -> str:
    return path.relative_to(project.root).as_posix() if path.is_relative_to(project.root) else str(path)


def _size(path: Path) -> int:
    """Return bytes on disk; files with other hard links, such as in the cache, count 0."""
    files = [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file() and not one.is_symlink()]
    return sum(one.stat().st_blocks * 512 for one in files if one.stat().st_nlink == 1)


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
