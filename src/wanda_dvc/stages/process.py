"""How a process runs a stage: time, signals, progress."""

import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

from wanda_dvc import machine
from wanda_dvc.errors import notice
from wanda_dvc.stages.device import device_name
from wanda_dvc.study.files import write_json
from wanda_dvc.study.folder import Study

if TYPE_CHECKING:
    pass


KEPT = "finished work is kept, and the next run resumes after it"
AGAIN = "run it again"  # where no work is kept
SECONDS_BETWEEN_LOOKS = 0.5  # at the parent process

T = TypeVar("T")


@contextlib.contextmanager
def timed(study: Study, run: str) -> Iterator[None]:
    """Keep the time of a run, and its machine."""
    began = time.perf_counter()
    yield
    spent = round(time.perf_counter() - began, 2)
    where = f"{machine.processor()}, {machine.cores()} cores"
    write_json(study.time(run), {"seconds": spent, "machine": where, "device": device_name(study.params.runtime)})


@contextlib.contextmanager
def stoppable(run: str, kept: str = KEPT, *, with_children: bool = False) -> Iterator[None]:
    """End the process at once on Ctrl-C or SIGTERM, or after the DVC process that started it has ended.

    With `with_children` it ends the processes that it started first.

    No cleanup is needed: a later run can resume from the files on disk at any moment. A thread waits for the signal,
    because the main thread may be inside a multiplication for seconds. A killed DVC leaves its stage running, and the
    next run of the experiment would wait for it. Only the command line calls this.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    consumer, writer = socket.socketpair()
    writer.setblocking(False)
    parent = os.getppid() if "DVC_STAGE" in os.environ else None

    def end(why: str, code: int) -> None:
        if with_children:
            import psutil

            started = psutil.Process().children(recursive=True)
            for process in started:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.terminate()
            psutil.wait_procs(started, timeout=10)
        notice(f"{run}: {why}; {kept}")
        os._exit(code)

    def wait() -> None:
        while not select.select([consumer], [], [], SECONDS_BETWEEN_LOOKS)[0]:
            if parent not in {None, os.getppid()}:
                end("the DVC process that ran it has ended", 1)
        if number := consumer.recv(1):
            end("stopped", 128 + number[0])

    thread = threading.Thread(target=wait, daemon=True)
    wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    handlers = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        writer.close()
        thread.join()
        consumer.close()


def progress(items: Iterable[T], *, total: int, what: str, at: Callable[[T], int] = lambda _: 0) -> Iterator[T]:
    """Yield the items with a progress bar on a terminal, else with a line a minute.

    `at` returns the number of items before the first one, which an interrupted run has finished.
    """
    from tqdm import tqdm

    began = said = time.monotonic()
    done = before = 0
    with tqdm(total=total, desc=what, file=sys.stderr, disable=None) as bar:  # without a terminal: disabled
        for item in items:
            if done == 0:
                bar.initial = bar.n = done = before = at(item)
            yield item
            bar.update()
            done, now = done + 1, time.monotonic()
            if bar.disable and (now - said >= 60 or (done == total and now - began >= 10)):
                # At the speed since the last line: the first steps of a resumed training take no time.
                rest = f", about {(now - said) / (done - before) * (total - done):.0f} s left"
                notice(f"{what}: {done} of {total}, {now - began:.0f} s{rest if 1 < done < total else ''}")
                said, before = now, done
