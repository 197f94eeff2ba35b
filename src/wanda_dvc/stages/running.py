"""How a stage runs: its time, its device, its inputs, checked in one place, and what runs a model."""

import contextlib
import importlib
import os
import select
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from wanda_dvc import machine
from wanda_dvc.errors import UserError, notice
from wanda_dvc.params import Runtime
from wanda_dvc.reading import check_file, is_there
from wanda_dvc.study.files import Documents, Json, write_json
from wanda_dvc.study.project import DOCUMENTS, Project, Work
from wanda_dvc.study.provenance import MADE_BY, check_source, digest, file_digest, read_provenance

KEPT = "finished work is kept, and the next run resumes after it"
AGAIN = "run it again"  # where no work is kept
SECONDS_BETWEEN_LOOKS = 0.5  # at the parent process

HEAD = "output head"  # a place of activations that are not finite

if TYPE_CHECKING:
    import torch
    from jaxtyping import Int
    from torch import Tensor

    from wanda_dvc.engine.rows import Executor
    from wanda_dvc.engine.walk import Runner

T = TypeVar("T")


@contextlib.contextmanager
def timed(project: Project, run: str) -> Iterator[None]:
    """Keep the time of a run, and its machine."""
    began = time.perf_counter()
    yield
    spent = round(time.perf_counter() - began, 2)
    where = f"{machine.processor()}, {machine.cores()} cores"
    write_json(project.time(run), {"seconds": spent, "machine": where, "device": device_name(project.params.runtime)})


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
    reader, writer = socket.socketpair()
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


def device_name(runtime: Runtime) -> str:
    """Return the name of the torch device to run on; `auto` uses torch only if a stage has imported it."""
    name, own = runtime.device, os.environ.get("LOCAL_RANK")  # of `accelerate launch`: a GPU each
    if name == "auto":
        if "torch" not in sys.modules:
            return "cpu"
        from wanda_dvc.engine import accelerator

        name = "cuda" if accelerator.gpus() else "mps" if accelerator.has_mps() else "cpu"
    return f"cuda:{own}" if name.startswith("cuda") and own else name


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

    torch.set_num_threads(machine.cores())
    accelerator.keep_freed_memory()
    accelerator.multiply_exactly()
    name, gpus = device_name(runtime), len(accelerator.gpus())
    if runtime.ray is not None:
        return torch.device(name if gpus else "cpu")
    kind, _, number = name.partition(":")
    if not {"cpu": True, "cuda": int(number or 0) < gpus, "mps": accelerator.has_mps()}[kind]:
        found = f"a machine with {gpus} CUDA devices" if kind == "cuda" else "a machine without MPS"
        raise UserError(f"params.yaml: runtime.device: got {name} on {found}, expected one it has; set auto or cpu")
    return torch.device(name)


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


def say_unreached(stage: str, unreached: dict[int, set[str]]) -> None:
    """Report the number of experts without calibration tokens, if any, by block."""
    if count := sum(map(len, unreached.values())):
        blocks = ", ".join(str(block) for block, experts in sorted(unreached.items()) if experts)
        notice(
            f"{stage}: no calibration token reached {count} expert{'s' * (count > 1)} (blocks: {blocks}); Wanda judges "
            "their weights by magnitude, and REAP removes them first. More calibration windows reach more experts."
        )


# --- inputs ---


def check_ready(project: Project, model: str, length: int | None = None, setting: str = "") -> tuple[Json, str]:
    """Check device, files, configuration and window length; return the model's provenance and the dtype of its run."""
    from wanda_dvc.engine.checkpoint import positions_of, read_config

    own_device(project.params.runtime)
    if project.params.runtime.ray is not None:
        importlib.import_module("ray")
    provenance = read_provenance(project.model(model), MADE_BY[model])
    for file in project.model(model).iterdir():
        check_file(file)  # transformers passes over a generation_config.json that it cannot read
    positions = positions_of(read_config(project.model(model)))
    if length and positions is not None and length > positions:
        raise UserError(
            f"{setting}: got {length}, expected at most {positions}, the positions of the model in "
            f"{project.model(model)}; set {setting}={positions} or less"
        )
    return provenance, model_dtype(project, model)


def model_dtype(project: Project, model: str = "dense") -> str:
    """Return the dtype in which a study's dense or pruned model runs, by name; `auto` is the dense checkpoint's."""
    from wanda_dvc.engine.checkpoint import dtype_of

    return dtype_of(project.model(model), project.planned("calibrate/norms")["dtype"])


def say_not_finite(run: str, where: str | None) -> None:
    """Report the place of a model's first non-finite activations, if any."""
    if where:
        notice(f"{run}: {where}: activations that are not finite; results are `diverged`, or without a comparison")


def calibrated_with(project: Project) -> Json:
    """Return the settings that determine the calibration windows and the run."""
    return project.planned("calibrate/norms") | {"dtype": model_dtype(project)}


def statistics(project: Project) -> tuple[Json, dict[str, str]]:
    """Return the provenance of stats/norms, and by name the digests of what else masks read: tiers, a function.

    UserError if they are of another model, or of other settings.
    """
    stats = read_provenance(project.stats, "calibrate")
    check_source("stats", stats["model"], read_provenance(project.model("dense"), MADE_BY["dense"]), "calibrate")
    expected = calibrated_with(project)
    if stats["params"] != expected:
        raise UserError(
            f"stats/: measured with {stats['params']}, expected {expected} as params.yaml has it; "
            "run `dvc repro` or `wanda-dvc calibrate`"
        )
    plan = project.plan
    gram = [project.gram] if plan.method.needs == "gram" and not plan.propagates else []
    others = [*gram, project.gradients] if plan.masks_read_sums or plan.masks_read_gradients else gram
    function = {"method": file_digest(project.source("method"))} if plan.method.package else {}
    return stats, function | {folder.name: digest(tier_provenance(folder, stats)) for folder in others}


def tier_provenance(folder: Path, made_with: Json, what: str = "stats/norms") -> Json:
    """Return the provenance of stats/gram or stats/gradients.

    UserError if it was not measured, or is of another run than `made_with`: model, text and parameters of `what`.
    """
    tier = read_provenance(folder, "calibrate")
    if any(tier[name] != made_with[name] for name in ("model", "text", "params")):
        raise UserError(
            f"stats/{folder.name}: found a calibration of {tier['model']['source']}, expected that of the model and "
            f"text that {what} names; run `dvc repro` or `wanda-dvc calibrate` with those settings"
        )
    return tier


def calibration_windows(project: Project) -> "Int[Tensor, 'windows length']":
    """Draw windows from data/calibration, with the dense model's tokenizer."""
    from wanda_dvc.engine.windows import draw, load_tokenizer, tokenize

    planned = project.planned("calibrate/norms")
    words = {"samples": planned["windows"], "length": planned["length"], "seed": planned["seed"]}
    drawn = windows_of_documents(project, "calibration", **words)
    if drawn is not None:
        return drawn
    return draw(tokenize(project.text("calibration"), load_tokenizer(project.model("dense"))), **words)


def windows_of_documents(project: Project, part: str, **words: int) -> "Int[Tensor, 'windows length'] | None":
    """Draw windows from a text of separate documents; None of another text."""
    from wanda_dvc.engine.windows import draw_from_documents, load_tokenizer, tokenize

    folder, model = project.data(part), project.model("dense")
    if not is_there(folder / DOCUMENTS):
        return None
    column = read_provenance(folder, f"download {part}")["column"]
    project.work_root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=project.work_root) as scratch:  # the system's own folder may be in memory
        documents = Documents(folder / DOCUMENTS, column, scratch)
        return draw_from_documents(documents, partial(tokenize, tokenizer=load_tokenizer(model)), **words)


# --- what runs a model ---


def runner(project: Project, model: str, work: Work) -> "Runner":
    """Return a runner of rows through a model, here or on the cluster; this process then keeps the model on the CPU."""
    import torch

    from wanda_dvc.engine.attention import has_units
    from wanda_dvc.engine.decoder import Decoder
    from wanda_dvc.engine.walk import Runner

    runtime, dtype = project.params.runtime, model_dtype(project, model)
    device = own_device(runtime) if runtime.ray is None else torch.device("cpu")
    if device.type == "cpu" and runtime.ray is None and not has_units(getattr(torch, dtype)):
        notice(
            f"dtype: this CPU has no instructions for {dtype}, so it is many times slower than float32; set "
            "dtype=float32 (last digits differ), or use another machine"
        )
    decoder = Decoder(project.model(model), dtype=getattr(torch, dtype), device=device)
    return Runner(decoder, work.path.absolute(), executor(project, [project.model(model), project.work_root]))


def executor(project: Project, folders: Sequence[Path], *, here: bool = False) -> "Executor":
    """Return what maps functions that read some folders: this process, or the cluster of params.yaml unless `here`."""
    runtime = project.params.runtime
    if here or runtime.ray is None:
        from wanda_dvc.engine.rows import Executor

        return Executor(own_device(runtime))
    from wanda_dvc.engine.cluster import Cluster

    cluster = Cluster(runtime.ray, device=runtime.device, folders=[folder.absolute() for folder in folders])
    notice(f"runtime.ray: workers: {cluster.workers}")
    return cluster
