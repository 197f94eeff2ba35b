"""The checkouts of DVC's queued experiments, and the abandoned ones among them."""

import contextlib
import os
import platform
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from wanda_dvc.errors import UserError
from wanda_dvc.study.files import Json, load_json, write_json
from wanda_dvc.study.project import Project

if TYPE_CHECKING:
    import psutil

PLACES = ("tmp*", "standalone/tmp*")  # of DVC's queue, and of `dvc exp run --temp`
RUNNER = ".dvc/tmp/wanda-dvc-runner.json"  # below a checkout: the host, and the process of DVC


def note_runner(project: Project) -> None:
    """Record the runner of an experiment's checkout: the outermost ancestor of this stage that works there."""
    checkout = project.repository
    if Path(os.environ.get("DVC_ROOT") or checkout) == checkout:
        return
    import psutil

    inside = [one.pid for one in psutil.Process().parents() if _works_below(one, checkout)]
    if inside:
        write_json(checkout / RUNNER, {"host": _host(), "process": inside[-1]})


def abandoned(project: Project) -> Iterator[Path]:
    """Yield the checkouts of ended experiments: their process ran on this host, and has ended.

    Other checkouts stay: another host may use one on a shared file system, and DVC may still be filling one.
    """
    import psutil

    root = project.work_root.parent / "exps"
    for checkout in sorted(path for pattern in PLACES for path in root.glob(pattern)):
        note = Json()
        with contextlib.suppress(UserError):
            note = load_json(checkout / RUNNER)
        process = note.get("process")
        if note.get("host") == _host() and isinstance(process, int) and not psutil.pid_exists(process):
            yield checkout


def _works_below(process: "psutil.Process", folder: Path) -> bool:
    """Whether a process works in a folder. False if the process has ended, or the system hides it."""
    import psutil

    try:
        return Path(process.cwd()).is_relative_to(folder)
    except psutil.Error:
        return False


def _host() -> str:
    """Return a name of this machine. Host names repeat among virtual machines, so it includes a network address."""
    return f"{platform.node()} {uuid.getnode():012x}"
