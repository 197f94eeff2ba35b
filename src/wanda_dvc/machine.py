"""The machine that this process runs on."""

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

import psutil

CONTROL_GROUPS = Path("/sys/fs/cgroup")  # of version 2
GROUP_OF_PROCESS = Path("/proc/self/cgroup")  # the file that names its group


def cores() -> int:
    """Return the number of compute threads: OMP_NUM_THREADS, or one per usable core."""
    return omp_threads() or usable_cores()


def omp_threads() -> int | None:
    """Return OMP_NUM_THREADS (of a list for nested levels, the first); None if it is not a positive number."""
    text = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    threads = int(text) if text.isdecimal() else 0
    return threads or None


def usable_cores() -> int:
    """Return the number of usable cores: schedulers and containers limit the CPU affinity, or a group's quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in _groups():
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):  # `max` is no limit
            quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
            count = min(count, max(1, math.ceil(int(quota) / int(period))))
    return count


def free_memory() -> int:
    """Return the free bytes of memory, at most what this process's control groups leave."""
    available = int(psutil.virtual_memory().available)
    for folder in _groups():
        with contextlib.suppress(OSError, ValueError):  # `max` is no limit
            limit, used = (int((folder / f"memory.{name}").read_text(encoding="utf-8")) for name in ("max", "current"))
            statistics = dict(map(str.split, (folder / "memory.stat").read_text(encoding="utf-8").splitlines()))
            available = min(available, limit - used + int(statistics["inactive_file"]))
    return max(0, available)


def _groups() -> Iterator[Path]:
    """Yield the folders of this process's control group, and of its parents."""
    with contextlib.suppress(OSError):
        for line in GROUP_OF_PROCESS.read_text(encoding="utf-8").splitlines():
            if line.startswith("0::"):
                group = CONTROL_GROUPS / line.removeprefix("0::").lstrip("/")
                yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(CONTROL_GROUPS))
