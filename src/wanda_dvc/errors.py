"""Messages for users: fixable errors, and notices."""

import errno
import os
import re
import shutil
import sys
from collections.abc import Sequence

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NO_PLACE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR}
NO_MEMORY = {errno.ENOMEM, errno.EAGAIN}
FIX = "set dtype=float32 or bfloat16, or fix the model's weights"  # where activations are not finite
# Optional libraries, by the extra of this package that installs them.
EXTRAS = {"matplotlib": "report", "ray": "ray"}


class UserError(Exception):
    """Problems that the user can fix, each as *where: found, expected, what to do*; the command line exits 2."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


def notice(text: str) -> None:
    """Print a line about a stage's needs, progress or problems to stderr. Results go to stdout."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201 - the one place that prints


def reason(error: BaseException) -> str:
    """Return a library's error as one short line, with its name if the text alone is too short."""
    text = " ".join(str(error).split())[:300]
    return text if len(text.split()) > 2 else f"{type(error).__name__} {text}".strip()


def shortened(names: Sequence[str], most: int = 3) -> str:
    """Return names in a sentence: the first ones, and the number of the others."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def is_out_of_memory(error: Exception) -> bool:
    """Whether Python, torch's CPU allocator or a GPU had no memory left, or the system refused a thread."""
    phrases = ("can't allocate memory", "out of memory", "ALLOC_FAILED", "can't start new thread")
    of_torch = isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in phrases)
    return isinstance(error, MemoryError) or of_torch


def explain(error: Exception) -> tuple[str, ...]:  # noqa: PLR0911 - a return for each kind of error
    """Return the lines of an error that the user can fix: a setting, file, disk, memory, library; of others none."""
    if isinstance(error, UserError):
        return error.problems
    if isinstance(error, shutil.Error):  # of a folder's copy: the first of its errors
        found = re.search(r"\[Errno (\d+)\] [^']*'(?:[^']*' -> ')?([^']*)'", str(error.args[0]))
        return explain(OSError(int(found[1]), os.strerror(int(found[1])), found[2])) if found else ()
    if found := re.search(r"\(os error (\d+)\)", str(error)):  # of safetensors and hf_xet
        return explain(OSError(int(found[1]), os.strerror(int(found[1]))))
    number = error.errno if isinstance(error, OSError) else None
    where = f"{error.filename2 or error.filename or 'disk'}" if isinstance(error, OSError) else "disk"
    said = " ".join(str(error.strerror if isinstance(error, OSError) else error).split())
    again = "run the command again: the earlier output and finished work are kept"
    if number in NO_ROOM or "inline_container.cc" in said:  # of `torch.save`, without the reason
        return (f"{where}: disk full ({said}); free some space and {again}",)
    if isinstance(error, OSError) and number == errno.EXDEV:  # a container's image has the earlier artifact
        return (f"{error.filename}: cannot be moved ({said}); remove it and run the command again",)
    if number in NO_PLACE:
        expected = "a shorter name" if number == errno.ENAMETOOLONG else "permission to read and write"
        return (f"{where}: {said}, expected {expected}; change it or name another, and {again}",)
    if is_out_of_memory(error) or number in NO_MEMORY:
        return (
            f"memory: {said or 'out of memory'}; `wanda-dvc doctor` estimates the need; free some, use shorter "
            f"windows, or {'runtime.device=cpu' if 'CUDA' in said else 'fewer threads (OMP_NUM_THREADS)'}",
        )
    if "no kernel image" in said:
        return (f"runtime.device: {said:.80}; expected a GPU that this torch supports; set runtime.device=cpu",)
    name = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if name in EXTRAS:
        return (f"{name}: not installed, but this command needs it; run `pip install 'wanda-dvc[{EXTRAS[name]}]'`",)
    return ()
