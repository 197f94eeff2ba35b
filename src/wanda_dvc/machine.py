"""The machine that this process runs on."""

import contextlib
import math
import os
import platform
from collections.abc import Iterator
from pathlib import Path

GROUPS, OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# Limit, use, and the part of it that the system may take back, of cgroup v2 and v1.
MEMORY = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
QUOTAS = (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us"))  # of cgroup v2 and v1: quota and period


def cores() -> int:
    """Return the number of compute threads: OMP_NUM_THREADS, or one per usable core."""
    return omp_threads() or usable_cores()


def omp_threads() -> int | None:
    """Return OMP_NUM_THREADS (of a list for nested levels, the first); None if it is not a positive number."""
    given = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(given) or None if given.isdecimal() else None


def usable_cores() -> int:
    """Return the number of usable cores, by this process's CPU affinity and control groups.

    Schedulers (Slurm) and containers restrict a process by either. `os.cpu_count` counts all cores of the machine.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min([affinity, *(quota for folder in _groups("cpu") for quota in _quota(folder))])


def free_memory() -> int:
    """Return the free bytes of memory, at most what this process's control groups leave."""
    import psutil

    limits = [int(psutil.virtual_memory().available)]
    for folder in _groups("memory"):
        for limit, use, cache in MEMORY:
            with contextlib.suppress(OSError, ValueError):  # v2 writes `max` for no limit
                limits.append(int((folder / limit).read_text(encoding="utf-8")))
                limits[-1] -= int((folder / use).read_text(encoding="utf-8"))
                lines = (folder / "memory.stat").read_text(encoding="utf-8").splitlines()
                limits[-1] += next((int(line.split()[1]) for line in lines if line.split()[:1] == [cache]), 0)
    return max(0, min(limits))


def _groups(controller: str) -> Iterator[Path]:
    """Yield the folders of this process's control groups, and of their parents."""
    with contextlib.suppress(OSError, ValueError):
        for line in OWN_GROUPS.read_text(encoding="utf-8").splitlines():
            number, controllers, path = line.split(":", 2)
            if number != "0" and controller not in controllers.split(","):
                continue
            root = GROUPS if number == "0" else GROUPS / controller  # number 0 is cgroup v2
            group = root / path.lstrip("/")
            yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(root))


def _quota(folder: Path) -> Iterator[int]:
    """Yield a control group's CPU quota in cores, rounded up, if it has one."""
    for names in QUOTAS:
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
            quota, period = " ".join((folder / name).read_text(encoding="utf-8") for name in names).split()
            if quota not in ("max", "-1"):
                yield max(1, math.ceil(int(quota) / int(period)))


def processor() -> str:
    """Return the CPU's name."""
    with contextlib.suppress(OSError), Path("/proc/cpuinfo").open(encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
