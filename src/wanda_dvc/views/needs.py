"""The line before a stage: what it needs of memory and disk, and what is free.

Estimates of stages/needs.py. They do not stop a stage, except where the disk is clearly too small.
"""

import contextlib
import shutil

from wanda_dvc.engine.sizes import Memory
from wanda_dvc.errors import UserError, notice
from wanda_dvc.stages.needs import need
from wanda_dvc.stages.running import device_name
from wanda_dvc.study.project import Project


def announce(*, project: Project, stage: str, part: str | None = None) -> None:
    """Say on stderr what a stage needs and what is free. UserError if the disk is clearly too small for it."""
    try:
        wanted = need(project, stage, part)
    except (UserError, ValueError, KeyError, OSError):
        return  # a model that makes no sense: the stage says so better, or does not mind
    device = device_name(project.params.runtime)
    free_memory, free_disk = memory(device), disk(project)
    if wanted.least > free_disk:
        raise UserError(
            f"{project.root}: {_gb(free_disk)} of disk free, expected about {_gb(wanted.disk)} for {stage}; "
            "free some (`dvc gc --workspace` drops what no experiment at hand uses), or take a larger disk"
        )
    on = f" on {device}" if device.startswith("cuda") else ""
    parts = [
        (f"{_gb(wanted.memory.total)} of memory{on}", f"{_gb(free_memory)} of memory{on}")
        if wanted.memory != Memory()
        else None,
        (f"{_gb(wanted.disk)} of disk", f"{_gb(free_disk)} of disk") if wanted.disk else None,
    ]
    known = [part for part in parts if part]
    if known:
        needs, free = (" and ".join(words) for words in zip(*known, strict=True))
        notice(f"{stage} needs about {needs}; free: {free}")


def memory(device: str) -> int:
    """Return free bytes, of a GPU's memory where a stage runs on one."""
    if device.startswith("cuda"):
        from wanda_dvc.engine.accelerator import free_memory

        with contextlib.suppress(RuntimeError, AssertionError):  # no such GPU: the stage says so
            return free_memory(device)
    import psutil

    return int(psutil.virtual_memory().available)


def disk(project: Project) -> int:
    """Return free bytes. Unfinished work counts as free: a run that goes on from it takes no more."""
    unfinished = sum(path.lstat().st_blocks * 512 for path in project.work_root.rglob("*") if not path.is_dir())
    return shutil.disk_usage(project.root).free + unfinished


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 5e7 else f"{max(size / 1e6, 0.1):.1f} MB"
