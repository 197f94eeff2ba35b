"""Run a process under a hard limit of memory, page cache included: a control group of its own. Linux, as root."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
LIMITS = {ROOT: "memory.max", ROOT / "memory": "memory.limit_in_bytes"}  # of version 2 and 1
# The process joins the group, then becomes the command.
JOIN = ("sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"')


@contextlib.contextmanager
def limited(size: int) -> Iterator[list[str]]:
    """Yield the words that put a command under a limit of `size` bytes. RuntimeError where this user may set none."""
    group = None
    for place, limit in LIMITS.items():
        path = place / f"wanda-dvc-{os.getpid()}"
        with contextlib.suppress(OSError):
            path.mkdir()
            if (path / limit).is_file():
                (path / limit).write_text(str(size))
                group = path
                break
            path.rmdir()
    if group is None:
        raise RuntimeError("no control group of memory that this user may make, expected one; run it as root on Linux")
    try:
        yield [*JOIN, str(group)]
    finally:
        group.rmdir()


def forget(folder: Path) -> None:
    """Drop a folder's files from the page cache, so that whoever reads them next is charged for them."""
    os.sync()
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
