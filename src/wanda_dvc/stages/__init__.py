"""The stages, in the order of the pipeline; one module, one command and one DVC name each.

The number is the version of what a stage computes. A change that alters results raises it, here and
in `dvc.yaml`, and DVC reruns that stage and what follows; other changes rerun nothing.
"""

import contextlib
import os
import platform
import resource
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from wanda_dvc.errors import UserError
from wanda_dvc.params import Runtime
from wanda_dvc.study.files import write_json
from wanda_dvc.study.project import Project

STAGES = {"download": 1, "calibrate": 1, "mask": 1, "apply": 1, "perplexity": 1, "zero-shot": 3}
PARTS = ("model", "calibration", "perplexity", "tasks")
MODELS = ("dense", "pruned")

STARTED_BY = os.getppid()

T = TypeVar("T")


def check_version(stage: str, asked: int | None) -> None:
    """UserError if `dvc.yaml` was written for another version of a stage."""
    if asked is not None and asked != STAGES[stage]:
        raise UserError(
            f"dvc.yaml: {stage}: version {asked}, this wanda-dvc computes version {STAGES[stage]}; "
            f"write `--version {STAGES[stage]}` there, or install the wanda-dvc that it was written for"
        )


@contextlib.contextmanager
def timed(project: Project, run: str) -> Iterator[None]:
    """Note how long a run took and on what. In a file of its own, since nothing else may depend on it."""
    began = time.perf_counter()
    yield
    write_json(
        project.times(run),
        {
            "seconds": round(time.perf_counter() - began, 2),
            "peak_memory_gb": round(_peak_memory() / 1e9, 3),
            "machine": f"{processor()}, {os.cpu_count()} cores",
            "device": device_name(project.params.runtime),
        },
    )


def device_name(runtime: Runtime) -> str:
    """The torch device to run on, by name; `auto` asks torch only if a stage has needed it anyway."""
    if runtime.device != "auto":
        return runtime.device
    torch = sys.modules.get("torch")
    return "cuda" if torch and torch.cuda.is_available() else "cpu"


def progress(items: Iterable[T], *, total: int, what: str) -> Iterator[T]:
    """A bar on a terminal; elsewhere a line a minute. UserError between two items once nobody waits for the rest."""
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
            print(f"{what}: {done} of {total}, {now - began:.0f} s", file=sys.stderr, flush=True)
            said = now


def _while_wanted(items: Iterable[T]) -> Iterator[T]:
    """DVC kills a queued experiment but not the stage that it runs, which would go on to its end, for a checkout that
    is gone; and whoever runs the experiment again would wait for it."""
    for item in items:
        if "DVC_STAGE" in os.environ and os.getppid() != STARTED_BY:
            raise UserError("the DVC that ran this stage is gone: stopped; run it again and it goes on from here")
        yield item


def say_unreached(stage: str, unreached: dict[int, set[str]]) -> None:
    """On stderr, the experts that no calibration token was sent to, if there are any, by block."""
    if count := sum(map(len, unreached.values())):
        blocks = ", ".join(str(block) for block, experts in sorted(unreached.items()) if experts)
        print(
            f"{stage}: no calibration token reached {count} expert{'s' * (count > 1)} (blocks: {blocks}); Wanda judges "
            "their weights by magnitude. More calibration windows reach more experts.",
            file=sys.stderr,
            flush=True,
        )


def _peak_memory() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def processor() -> str:
    with contextlib.suppress(OSError), Path("/proc/cpuinfo").open(encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
