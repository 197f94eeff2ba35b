"""The run of a stage: its progress, its device, its time and memory."""

import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from wanda_dvc import machine
from wanda_dvc.errors import UserError, notice
from wanda_dvc.machine import cores, processor
from wanda_dvc.params import Runtime
from wanda_dvc.stages import Stage
from wanda_dvc.study.files import Json, write_json
from wanda_dvc.study.project import Project

SAMPLES_A_SECOND = 20  # of a stage's memory
KEPT = "finished blocks are kept, and the next run resumes after them"
AGAIN = "run it again"  # where no work is kept
SECONDS_BETWEEN_LOOKS = 0.5  # at the parent process

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


@contextlib.contextmanager
def timed(project: Project, stage: Stage, part: str = "", text: str = "") -> Iterator[None]:
    """Keep the time of a run, its machine, and its peak memory."""
    began = time.perf_counter()
    with sampled_memory() as memory:
        yield
    content: Json = {"seconds": round(time.perf_counter() - began, 2)}
    if peak := max(memory):  # some systems do not say
        content["peak_anonymous_gb"] = round(peak / 1e9, 3)
    content |= {"machine": f"{processor()}, {cores()} cores", "device": device_name(project.params.runtime)}
    write_json(project.time(stage.run_name(part, text)), content)


@contextlib.contextmanager
def stoppable(run: str, kept: str = KEPT) -> Iterator[None]:
    """End the process at once on Ctrl-C or SIGTERM, or after the DVC process that started it has ended.

    No cleanup is needed: a later run can resume from the files on disk at any moment. A thread waits for the signal,
    because the main thread may be inside a multiplication for seconds. A killed DVC leaves its stage running, and the
    next run of the experiment would wait for it. Only the command line calls this.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    parent = os.getppid() if "DVC_STAGE" in os.environ else None

    def end(why: str, code: int) -> None:
        notice(f"{run}: {why}; {kept}")
        os._exit(code)

    def wait() -> None:
        while not select.select([reader], [], [], SECONDS_BETWEEN_LOOKS)[0]:
            if parent not in {None, os.getppid()}:
                end("the DVC process that ran it has ended", 1)
        if number := reader.recv(1):
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
        reader.close()


@contextlib.contextmanager
def sampled_memory(samples_a_second: int = SAMPLES_A_SECOND) -> Iterator[list[int]]:
    """Sample the anonymous memory of this process, in bytes, by a thread: at the start, the peak so far, at the end.

    The resident peak counts mapped checkpoint pages too, which the system may reclaim at any time: a model of 13.5 GB
    runs under a hard limit of 3 GB.
    """
    samples, done = [anonymous_memory()] * 2, threading.Event()

    def sample() -> None:
        while not done.wait(1 / samples_a_second):
            samples[1] = max(samples[1], anonymous_memory())

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()
        samples.append(anonymous_memory())


def anonymous_memory() -> int:
    """Return the anonymous memory of this process in bytes; 0 if the system hides it."""
    with contextlib.suppress(OSError), Path("/proc/self/status").open(encoding="utf-8") as status:
        for line in status:
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0


def device_name(runtime: Runtime) -> str:
    """Return the name of the torch device to run on; `auto` uses torch only if a stage has imported it."""
    if runtime.device != "auto":
        return runtime.device
    if "torch" not in sys.modules:
        return "cpu"
    from wanda_dvc.engine import accelerator

    return "cuda" if accelerator.gpus() else "mps" if accelerator.has_mps() else "cpu"


def free_memory(device: str) -> int:
    """Return the free bytes of memory; of a GPU's if a stage runs on a GPU."""
    if device.startswith("cuda"):
        from wanda_dvc.engine import accelerator

        with contextlib.suppress(RuntimeError, AssertionError):  # no such GPU: the stage reports it
            return accelerator.free_memory(device)
    return machine.free_memory()


def own_device(runtime: Runtime) -> "torch.device":
    """Return the compute device of this process. UserError if this machine does not have it.

    With workers the setting is for the workers, and this process uses the CPU if it has no GPU.
    """
    import torch

    from wanda_dvc.engine import accelerator

    torch.set_num_threads(cores())
    accelerator.multiply_exactly()
    name, gpus = device_name(runtime), len(accelerator.gpus())
    if runtime.ray is not None:
        return torch.device(name if gpus else "cpu")
    kind, _, number = name.partition(":")
    if not {"cpu": True, "cuda": int(number or 0) < gpus, "mps": accelerator.has_mps()}[kind]:
        found = f"a machine with {gpus} CUDA devices" if kind == "cuda" else "a machine without MPS"
        raise UserError(f"params.yaml: runtime.device: got {name} on {found}, expected one it has; set auto or cpu")
    return torch.device(name)


def solving_device(runtime: Runtime) -> "torch.device":
    """Return the device for masks and solvers. UserError if this machine does not have it."""
    from wanda_dvc.engine import accelerator

    return accelerator.solving_device(own_device(runtime))


def progress(items: Iterable[T], *, total: int, what: str) -> Iterator[T]:
    """Yield the items with a progress bar on a terminal, else with a line a minute."""
    from tqdm import tqdm

    bar = tqdm(items, total=total, desc=what, file=sys.stderr, disable=None)  # without a terminal: disabled
    began = said = time.monotonic()
    for done, item in enumerate(bar, start=1):
        yield item
        now = time.monotonic()
        if bar.disable and (now - said >= 60 or (done == total and now - began >= 10)):
            left = f", about {(now - began) / done * (total - done):.0f} s left" if done < total else ""
            notice(f"{what}: {done} of {total}, {now - began:.0f} s{left}")
            said = now


def say_unreached(stage: str, unreached: dict[int, set[str]]) -> None:
    """Report the number of experts without calibration tokens, if any, by block."""
    if count := sum(map(len, unreached.values())):
        blocks = ", ".join(str(block) for block, experts in sorted(unreached.items()) if experts)
        notice(
            f"{stage}: no calibration token reached {count} expert{'s' * (count > 1)} (blocks: {blocks}); Wanda judges "
            "their weights by magnitude, and REAP removes them first. More calibration windows reach more experts."
        )
