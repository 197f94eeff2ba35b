"""The device of a stage."""

import contextlib
import os

import torch

from wanda_dvc import machine
from wanda_dvc.engine import accelerator
from wanda_dvc.errors import UserError
from wanda_dvc.params import Runtime


def device_name(runtime: Runtime) -> str:
    """Return the name of the torch device to run on."""
    name = runtime.device
    if name == "auto":
        name = "cpu"
        if accelerator.gpus():
            name = "cuda"
        elif accelerator.has_mps():
            name = "mps"
    rank = os.environ.get("LOCAL_RANK")  # of `accelerate launch`: each process has a GPU
    return f"cuda:{rank}" if name.startswith("cuda") and rank else name


def free_memory_of(device: str) -> int:
    """Return the free bytes of memory of the machine, or of a GPU, by the name of the device."""
    if device.startswith("cuda"):
        with contextlib.suppress(RuntimeError, AssertionError):  # no such GPU: the stage reports it
            return accelerator.free_device_memory(device)
    return machine.free_memory()


def own_device(runtime: Runtime) -> torch.device:
    """Return the compute device of this process. UserError if this machine does not have it.

    With workers the setting is for the workers, and this process uses the CPU if it has no GPU.
    """
    torch.set_num_threads(machine.cores())
    accelerator.keep_freed_memory()
    accelerator.disable_tf32()
    name, gpus = device_name(runtime), len(accelerator.gpus())
    if runtime.ray is not None:
        return torch.device(name if gpus else "cpu")
    kind, _, number = name.partition(":")
    if (kind == "cuda" and int(number or 0) >= gpus) or (kind == "mps" and not accelerator.has_mps()):
        raise UserError(f"params.yaml: runtime.device: got {name}, which this machine lacks; set auto or cpu")
    return torch.device(name)
