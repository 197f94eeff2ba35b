"""How a stage runs: its progress, its device, its time and memory."""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from wanda_dvc.errors import UserError, notice
from wanda_dvc.machine import cores, processor
from wanda_dvc.params import Runtime
from wanda_dvc.stages import Stage
from wanda_dvc.study.checkouts import note_runner
from wanda_dvc.study.files import Json
from wanda_dvc.study.project import Project

SAMPLES_A_SECOND = 20  # of the memory that a stage holds
ENDING = 5  # seconds that workers have to end
_told: Json = {}  # of the run at hand
_ends: list[Callable[[], None]] = []
_parent: int | None = None  # the process whose end stops this stage

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


@contextlib.contextmanager
def timed(project: Project, stage: Stage, part: str | None = None) -> Iterator[None]:
    """Keep how long a run took, on what, and the memory that it held."""
    with measured(project.params.runtime) as content:
        yield
    if key := stage.key(project, part):
        project.times.write(stage.run_name(part), key, content)


@contextlib.contextmanager
def measured(runtime: Runtime) -> Iterator[Json]:
    """Yield an object that has seconds, memory, machine and device at the end.

    Its seconds count those of earlier runs too, whose results this run has taken over: what was `told` as `earlier`.
    """
    _told.clear()
    began, content = time.perf_counter(), Json()
    with AnonymousMemory() as memory:
        yield content
    content["seconds"] = round(time.perf_counter() - began + _told.pop("earlier", 0), 2)
    if memory.peak:  # some systems do not say
        content["peak_anonymous_gb"] = round(memory.peak / 1e9, 3)
    content |= {"machine": f"{processor()}, {cores()} cores", "device": device_name(runtime)}
    content |= _told


def told(content: Json) -> None:
    """Keep more of the run at hand beside its time: how many workers it had."""
    _told.update(content)


@contextlib.contextmanager
def ending(stop: Callable[[], None]) -> Iterator[None]:
    """Have a function called, for a few seconds at most, where the run is stopped inside."""
    _ends.append(stop)
    try:
        yield
    finally:
        _ends.remove(stop)


@contextlib.contextmanager
def stoppable(run: str) -> Iterator[None]:
    """End the process at once on Ctrl-C or SIGTERM, with a line that says what is kept.

    Nothing has to be put in order: at every moment what is on disk is what a later run goes on from. A thread waits for
    the signal, because the main thread may be inside a multiplication for seconds.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def wait() -> None:
        if number := reader.recv(1):
            for stop in _ends:
                end = threading.Thread(target=stop, daemon=True)
                end.start()
                end.join(ENDING)
            notice(f"{run}: stopped; finished blocks and windows are kept, and the next run goes on from there")
            os._exit(128 + number[0])

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
        reader.close()


class AnonymousMemory:
    """The most memory of this process that no file stands behind, sampled by a thread; 0 where the system hides it.

    The resident peak counts mapped checkpoint pages too, which the system may reclaim at any time: a model of 13.5 GB
    runs under a hard limit of 3 GB.
    """

    def __init__(self, samples_a_second: int = SAMPLES_A_SECOND) -> None:
        self.base = self.peak = 0
        self._every = 1 / samples_a_second
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "AnonymousMemory":
        self.base = self.peak = anonymous_memory()
        if self.peak:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self.peak:
            self._thread.join()
            self.peak = max(self.peak, anonymous_memory())

    def _sample(self) -> None:
        while not self._done.wait(self._every):
            self.peak = max(self.peak, anonymous_memory())


def anonymous_memory() -> int:
    """Return the bytes of this process that no file stands behind; 0 where the system does not say."""
    with contextlib.suppress(OSError), Path("/proc/self/status").open(encoding="utf-8") as status:
        for line in status:
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0


def device_name(runtime: Runtime) -> str:
    """Return the torch device to run on, by name; `auto` asks torch only if a stage has imported it anyway."""
    if runtime.device != "auto":
        return runtime.device
    if "torch" not in sys.modules:
        return "cpu"
    from wanda_dvc.engine.accelerator import gpus

    return "cuda" if gpus() else "cpu"


def own_device(runtime: Runtime) -> "torch.device":
    """Return the device that this process computes on. UserError where this machine does not have it.

    With workers the setting names theirs, and this process does its own part on the CPU if it has no card.
    """
    import torch

    from wanda_dvc.engine.accelerator import gpus

    name = device_name(runtime)
    if runtime.ray is None:
        check_device(name)
    elif not gpus():
        name = "cpu"
    return torch.device(name)


def solving_device(runtime: Runtime) -> "torch.device":
    """Return the device that masks are chosen on, and solvers run. UserError where this machine does not have it."""
    from wanda_dvc.engine import jobs

    return jobs.solving_device(own_device(runtime))


def check_device(device: str) -> None:
    """Raise UserError where this machine does not have the device."""
    from wanda_dvc.engine import accelerator

    kind, _, number = device.partition(":")
    cards = len(accelerator.gpus())
    there = {"cpu": True, "cuda": int(number or 0) < cards, "mps": accelerator.has_mps()}
    if not there[kind]:
        found = f"a machine with {cards} CUDA devices" if kind == "cuda" else "a machine without MPS"
        raise UserError(f"params.yaml: runtime.device: got {device} on {found}, expected one it has; set auto or cpu")


def watch_dvc(project: Project) -> None:
    """Have `progress` stop this process after the DVC that runs it has ended.

    Only the command line calls this: the parent of a process that uses the Python interface is no concern of ours.
    """
    global _parent
    _parent = os.getppid() if "DVC_STAGE" in os.environ else None
    note_runner(project)


def progress(items: Iterable[T], *, total: int, what: str) -> Iterator[T]:
    """Yield the items with a bar on a terminal, elsewhere with a line a minute.

    UserError between two items after the DVC that `watch_dvc` watches has ended.
    """
    from tqdm import tqdm

    items = _while_wanted(items)
    if sys.stderr.isatty():
        yield from tqdm(items, total=total, desc=what, file=sys.stderr)
        return
    began = said = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - said >= 60 or (done == total and now - began >= 10):
            left = f", about {(now - began) / done * (total - done):.0f} s left" if done < total else ""
            notice(f"{what}: {done} of {total}, {now - began:.0f} s{left}")
            said = now


def _while_wanted(items: Iterable[T]) -> Iterator[T]:
    """Stop a stage whose DVC was killed.

    DVC kills a queued experiment, but not its stage. The stage would continue for a checkout that nobody reads, and
    the next run of the experiment would wait for it.
    """
    for item in items:
        if _parent not in {None, os.getppid()}:
            raise UserError("the DVC that ran this stage is gone: stopped; run it again and it goes on from here")
        yield item


def say_unreached(stage: str, unreached: dict[int, set[str]]) -> None:
    """Say how many experts no calibration token reached, if any, by block."""
    if count := sum(map(len, unreached.values())):
        blocks = ", ".join(str(block) for block, experts in sorted(unreached.items()) if experts)
        notice(
            f"{stage}: no calibration token reached {count} expert{'s' * (count > 1)} (blocks: {blocks}); Wanda judges "
            "their weights by magnitude. More calibration windows reach more experts."
        )
