"""Messages for users: fixable errors, and notices."""

import errno
import os
import re
import shutil
import sys
from collections.abc import Sequence

# Numbers of errors of the operating system: a full disk, a place that cannot be read or written, too little memory.
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NO_PLACE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR}
NO_MEMORY = {errno.ENOMEM, errno.EAGAIN}
# In messages of Python, torch's CPU allocator and GPUs; the system refuses threads for want of memory.
OUT_OF_MEMORY = re.compile("can't allocate memory|out of memory|ALLOC_FAILED|can't start new thread")
RUN_AGAIN = "run the command again: the earlier output and finished work are kept"
FIX_NOT_FINITE = "set dtype=float32 or bfloat16, or fix the model's weights"  # where activations are not finite
PROBLEMS = "WANDA_DVC_PROBLEMS"  # of a stage that DVC starts for another command: the file for its error's lines
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
    is_said = isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error)) is not None
    return is_said or isinstance(error, MemoryError)


def explain(error: Exception) -> tuple[str, ...]:
    """Return the lines of an error that the user can fix: a setting, file, disk, memory, library; of others none."""
    if isinstance(error, UserError):
        return error.problems
    number, text, place = _system_error(error)
    library = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    problem = ""
    if number in NO_ROOM or "inline_container.cc" in text:  # `torch.save` gives no reason
        problem = f"{place}: disk full ({text}); free some space and {RUN_AGAIN}"
    elif number in NO_MEMORY or is_out_of_memory(error):
        remedy = "runtime.device=cpu" if "CUDA" in text else "fewer threads (OMP_NUM_THREADS)"
        problem = (
            f"memory: {text or 'out of memory'}; `wanda-dvc doctor` estimates the need; free some, or use {remedy}; in "
            "`calibrate` and `perplexity` also shorter windows"
        )
    elif number in NO_PLACE:
        problem = f"{place}: {text}; change it or name another, and {RUN_AGAIN}"
    elif library in EXTRAS:
        install = f"pip install 'wanda-dvc[{EXTRAS[library]}]'"
        problem = f"{library}: not installed, but this command needs it; run `{install}`"
    elif "no kernel image" in text:
        problem = f"runtime.device: {text:.80}; expected a GPU that this torch supports; set runtime.device=cpu"
    return (problem,) if problem else ()


def _system_error(error: Exception) -> tuple[int | None, str, str]:
    """Return the number, the text and the file of the operating system's error behind an error; of others the text."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno, str(error.strerror), str(error.filename2 or error.filename or "disk")
    # Libraries have it in their text: shutil of a folder's copy, safetensors and hf_xet.
    match = re.search(r"(?:\[Errno |\(os error )(\d+)", str(error))
    if match is None:
        return None, " ".join(str(error).split()), "disk"
    place = error.args[0][0][1] if isinstance(error, shutil.Error) else "disk"  # of its first file
    return int(match[1]), os.strerror(int(match[1])), place
