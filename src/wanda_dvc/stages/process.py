"""How a process runs a stage: signals, progress."""

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import NoReturn, TypeVar

import psutil
from tqdm import tqdm

KEPT = "finished work is kept, and the next run resumes after it"
NOTHING_KEPT = "run it again"
PR_SET_PDEATHSIG = 1  # of Linux's prctl: the signal that this process gets when its parent ends
SECONDS_BETWEEN_LINES = 60  # of progress, off a terminal

T = TypeVar("T")


@contextlib.contextmanager
def stoppable(run: str, kept: str = KEPT, *, with_children: bool = False) -> Iterator[None]:
    """End the process on Ctrl-C or SIGTERM with a line about what is `kept`, and exit code 128 + the signal's number.

    With `with_children` it first ends the processes that it started, also if the terminal closes. A later run resumes
    from files on disk. On Linux the stage of a killed DVC gets SIGTERM; else the next run would wait for its lock.
    """

    def stop(number: int, _: FrameType | None) -> None:
        if with_children:
            end_children()
        with contextlib.suppress(OSError):  # `print` may be interrupted here, and fails inside itself
            os.write(2, f"{run}: stopped; {kept}\n".encode())
        os._exit(128 + number)

    if "DVC_STAGE" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    hang_up = with_children and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN  # as it is with `nohup`
    numbers = (signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hang_up else []))
    handlers = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def end_children() -> None:
    """Ask the process groups that children lead to end, also processes that start meanwhile, and wait up to 10 s."""
    children = psutil.Process().children(recursive=True)
    for child in children:
        with contextlib.suppress(ProcessLookupError):  # it leads no group
            os.killpg(child.pid, signal.SIGTERM)
    psutil.wait_procs(children, timeout=10)


def progress_bar(total: int, what: str, *, disable: bool = False) -> "tqdm[NoReturn]":
    """Return a progress bar; off a terminal, it writes a line a minute, and none in shorter runs."""
    seconds = 0 if sys.stderr.isatty() else SECONDS_BETWEEN_LINES
    return tqdm(total=total, desc=what, mininterval=seconds or 0.1, delay=seconds, miniters=1, disable=disable)


def start_at(bar: "tqdm[NoReturn]", finished: int) -> None:
    """Set the number of items that an interrupted run has finished: they do not count for the time that is left."""
    bar.initial = bar.last_print_n = bar.n = finished


def progress(items: Iterable[T], *, total: int, what: str, at: Callable[[T], int] = lambda _: 0) -> Iterator[T]:
    """Yield the items and show their number. `at` returns how many items an interrupted run finished before one."""
    bar = progress_bar(total, what)
    for item in items:
        if bar.n == 0:
            start_at(bar, at(item))
        yield item
        bar.update()
    bar.close()
