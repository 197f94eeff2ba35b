"""Messages for users: fixable errors, and notices."""

import contextlib
import errno
import os
import re
import shutil
import sys
from collections.abc import Iterator

from wanda_dvc import __version__

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NO_PERMISSION = {errno.EACCES, errno.EPERM, errno.EROFS}
NO_MEMORY = {errno.ENOMEM, errno.EAGAIN}
NO_PLACE = {errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR}
FIX = "set dtype=float32 or bfloat16, or fix the model's weights"  # where activations are not finite


# Optional libraries, by the extra of this package that installs them.
EXTRAS = {"matplotlib": "report", "ray": "ray"}


class UserError(Exception):
    """One or more problems that the user can fix, each as *where: found, expected, what to do*.

    The command line prints them and exits 2.
    """

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class SettingError(UserError):
    """A setting's value that does not fit the current work, as *setting: found, expected, what to do*.

    The raising code knows no file; `in_params` adds the setting's place.
    """


@contextlib.contextmanager
def in_params() -> Iterator[None]:
    """Add `params.yaml` to SettingErrors raised inside."""
    try:
        yield
    except SettingError as error:
        raise UserError(*(f"params.yaml: {problem}" for problem in error.problems)) from None


def notice(text: str) -> None:
    """Print a line about a stage's needs, progress or problems to stderr. Results go to stdout."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201 - the one place that prints


def fixable(error: Exception) -> bool:
    """Whether the user can fix this error: a setting, a file, the disk or the memory."""
    system = _of_the_system(error)
    of_machine = system is not None and system.errno in NO_ROOM | NO_PERMISSION | NO_MEMORY | NO_PLACE
    return isinstance(error, UserError) or of_machine or _lacks_memory(error) or _extra(error) is not None


def explain(error: Exception) -> Iterator[str]:
    """Yield the lines of an error for the user."""
    system = _of_the_system(error)
    if isinstance(error, UserError):
        yield from error.problems
    elif system and system.errno in NO_ROOM:
        yield (
            f"{_file(system)}: disk full ({system.strerror}); free some space and run the command again: the earlier "
            "output and finished work are kept"
        )
    elif system and system.errno in NO_PERMISSION:
        yield (
            f"{_file(system)}: {system.strerror}, expected permission to read and write; change it and run the "
            "command again: the earlier output and finished work are kept"
        )
    elif system and system.errno in NO_PLACE:
        yield f"{_file(system)}: {system.strerror}, expected a path for a file; name another"
    elif _lacks_memory(error) or (system and system.errno in NO_MEMORY):
        yield (
            f"memory: {' '.join(str(error).split()) or 'out of memory'}; `wanda-dvc doctor` estimates the need; free "
            "some, use shorter windows, or fewer threads (OMP_NUM_THREADS)"
        )
    elif (extra := _extra(error)) is not None:
        yield f"{extra[0]}: not installed, but this command needs it; run `pip install 'wanda-dvc[{extra[1]}]'`"
    else:
        yield f"wanda-dvc {__version__}: {type(error).__name__}: {error}"
        yield "This is a bug in wanda-dvc; `wanda-dvc --debug …` prints the traceback."


def _extra(error: Exception) -> tuple[str, str] | None:
    """Return the missing library of an import and the extra that installs it; None for any other error."""
    name = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    return (name, EXTRAS[name]) if name in EXTRAS else None


def _of_the_system(error: Exception) -> OSError | None:
    """Return the operating system's error, or None; of the errors of a folder's copy, the first."""
    if isinstance(error, shutil.Error):
        found = re.search(r"\[Errno (\d+)\] [^']*'([^']*)'", str(error.args[0]))
        return OSError(int(found[1]), os.strerror(int(found[1])), found[2]) if found else None
    return error if isinstance(error, OSError) else None


def _file(error: OSError) -> str:
    return str(error.filename2 or error.filename or "disk")


def _lacks_memory(error: Exception) -> bool:
    """Whether Python, torch's CPU allocator or a GPU ran out of memory, or the system out of threads."""
    phrases = ("can't allocate memory", "out of memory", "can't start new thread")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in phrases)
    )
