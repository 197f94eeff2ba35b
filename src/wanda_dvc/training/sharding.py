"""A model whose parameters are split over processes, by torch's FSDP2.

accelerate splits models on GPUs alone, and transformers those few whose authors say how. torch splits any module, on
CPUs too, so a test runs the code that several GPUs run.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from wanda_dvc.engine.structure import find_blocks
from wanda_dvc.errors import UserError


def launched_processes() -> int:
    """Return the number of processes of `accelerate launch`, 1 without it. Several split the models, by FSDP2.

    UserError if they would hold copies, or split them in another way.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    is_fsdp2 = os.environ.get("ACCELERATE_USE_FSDP") == "true" and os.environ.get("FSDP_VERSION") == "2"
    if (processes > 1 and not is_fsdp2) or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        problem = "found copies of the model, DeepSpeed or FSDP1, expected processes that split the model"
        raise UserError(f"accelerate launch: {problem}; launch with --use_fsdp --fsdp_version 2")
    return processes


def of_first_process(value: Any, device: torch.device) -> Any:
    """Return the first process's value in each process."""
    from accelerate import PartialState

    PartialState(cpu=device.type == "cpu")  # connects the processes
    values = [value]
    torch.distributed.broadcast_object_list(values)
    return values[0]


def shard(model: Any, device: torch.device) -> None:
    """Move a model to a device, and keep this process's part of each parameter: rows of its first dimension.

    `fully_shard` moves it. Other parts are gathered for a block's forward pass, and for its backward pass. Gradients
    are means over processes.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)  # of sums of gradients
    for block in find_blocks(model)[1]:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    # By default the rest stays gathered after a forward pass, and a later change of its parts would have no effect.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    # FSDP2 gathers parameters around registered methods alone, so any function is called through one.
    model.run = _run
    register_fsdp_forward_method(model, "run")


def _run(function: Callable[[], Tensor]) -> Tensor:
    return function()


def run_gathered(model: Any, function: Callable[[], Tensor]) -> Tensor:
    """Return a function's result; it may use what a split model has outside its blocks, as in its forward pass."""
    result: Tensor = vars(model).get("run", _run)(function)
    return result


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor, as a view without gradients; of a tensor that is not split, all."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gathered(tensor: Tensor) -> Tensor:
    """Return all of a tensor; of a split one, in the memory of the first process's CPU. Others get a tensor on `meta`.

    Each process must call this.
    """
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor
    complete: Tensor = tensor.full_tensor()
    return complete.to("cpu" if torch.distributed.get_rank() == 0 else "meta")
