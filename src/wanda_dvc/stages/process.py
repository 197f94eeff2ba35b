"""How a process runs a stage: time, signals, progress."""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import TypeVar

from wanda_dvc import machine
from wanda_dvc.errors import notice
from wanda_dvc.stages.device import device_name
from wanda_dvc.study.files import write_json
from wanda_dvc.study.folder import Study

KEPT = "finished work is kept, and the next run resumes after it"
NOTHING_KEPT = "run it again"
PR_SET_PDEATHSIG = 1  # of Linux's prctl: the signal that this process gets when its parent ends
SECONDS_BETWEEN_LINES = 60  # of progress, off a terminal

T = TypeVar("T")


@contextlib.contextmanager
def timed(study: Study, run: str) -> Iterator[None]:
    """Write the seconds, the machine and the device of a run, to the file of the run's last time."""
    start = time.perf_counter()
    yield
    seconds = round(time.perf_counter() - start, 2)
    processor = f"{machine.processor()}, {machine.cores()} cores"
    write_json(study.time(run), {"seconds": seconds, "machine": processor, "device": device_name(study.params.runtime)})


@contextlib.contextmanager
def stoppable(run: str, kept: str = KEPT, *, with_children: bool = False) -> Iterator[None]:
    """End the process on Ctrl-C or SIGTERM with a line about what is `kept`, and exit code 128 + the signal's number.

    With `with_children` it ends the processes that it started first. No cleanup is needed: a later run resumes from the
    files on disk at any moment. On Linux the stage of a killed DVC gets SIGTERM too; without it, the stage would keep
    running, and the next run of the experiment would wait for it. Only the command line calls this.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return

    def stop(number: int, _: FrameType | None) -> None:
        if with_children:
            import psutil

            children = psutil.Process().children(recursive=True)
            for child in children:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.terminate()
            psutil.wait_procs(children, timeout=10)
        os.write(2, f"{run}: stopped; {kept}\n".encode())  # `print` may be interrupted here, and fails inside itself
        os._exit(128 + number)

    if "DVC_STAGE" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def progress(items: Iterable[T], *, total: int, what: str, at: Callable[[T], int] = lambda _: 0) -> Iterator[T]:
    """Yield the items with a progress bar on a terminal, else with a line a minute.

    `at` returns the number of items before the first one, which an interrupted run has finished.
    """
    if not sys.stderr.isatty():
        yield from _with_lines(items, total, what, at)
        return
    from tqdm import tqdm

    with tqdm(total=total, desc=what, file=sys.stderr) as bar:
        for number, item in enumerate(items):
            if number == 0:
                bar.initial = bar.n = at(item)
            yield item
            bar.update()


def _with_lines(items: Iterable[T], total: int, what: str, at: Callable[[T], int]) -> Iterator[T]:
    start = last_line = time.monotonic()
    done = done_at_last_line = 0
    for number, item in enumerate(items):
        if number == 0:
            done = done_at_last_line = at(item)
        yield item
        done += 1
        now = time.monotonic()
        if done == total:
            if now - start >= 10:
                notice(f"{what}: {done} of {total}, {now - start:.0f} s")
        elif now - last_line >= SECONDS_BETWEEN_LINES:
            # At the speed since the last line: the first steps of a resumed training take no time.
            left = (now - last_line) / (done - done_at_last_line) * (total - done)
            notice(f"{what}: {done} of {total}, {now - start:.0f} s, about {left:.0f} s left")
            last_line, done_at_last_line = now, done
