"""The line before a stage: needed and free memory and disk.

The estimates are from stages/needs.py. They stop a stage only if the disk is clearly too small.
"""

import contextlib
import os
import shutil
from pathlib import Path

from wanda_dvc.engine.sizes import Memory
from wanda_dvc.errors import UserError, notice
from wanda_dvc.stages.needs import need
from wanda_dvc.stages.running import device_name, free_memory
from wanda_dvc.study.project import Project


def announce(*, project: Project, stage: str, part: str | None = None, text: str | None = None) -> None:
    """Print a stage's needs and the free resources to stderr. UserError if the disk is clearly too small."""
    try:
        wanted = need(project, stage, part, text)
    except (UserError, ValueError, KeyError, OSError):
        return  # an invalid model: the stage reports it better, or does not need the model
    device = device_name(project.params.runtime)
    memory, free_disk = free_memory(device), disk(project)
    if wanted.least > free_disk:
        raise UserError(
            f"{project.root}: {_gb(free_disk)} of disk free, expected about {_gb(wanted.disk)} for {stage}; "
            "free some space (`dvc gc --workspace` also deletes cached results of experiments), or use a larger disk"
        )
    on = f" on {device}" if device.startswith("cuda") else ""
    parts = [
        (f"{_gb(wanted.memory.total)} of memory{on}", f"{_gb(memory)} of memory{on}")
        if wanted.memory != Memory()
        else None,
        (f"{_gb(wanted.disk)} of disk", f"{_gb(free_disk)} of disk") if wanted.disk else None,
    ]
    known = [part for part in parts if part]
    if known:
        needs, free = (" and ".join(words) for words in zip(*known, strict=True))
        notice(f"{stage} needs about {needs}; free: {free}")


def disk(project: Project) -> int:
    """Return free bytes of disk. Unfinished work counts as free, because a resumed run reuses it."""
    unfinished = 0
    for folder, _, files in os.walk(project.work_root):
        for name in files:
            with contextlib.suppress(OSError):  # another run has removed it since
                unfinished += Path(folder, name).lstat().st_blocks * 512
    return shutil.disk_usage(project.root).free + unfinished


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 5e7 else f"{max(size / 1e6, 0.1):.1f} MB"
