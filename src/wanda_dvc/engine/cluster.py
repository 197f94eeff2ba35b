"""Runs units of work on a Ray cluster whose nodes see the study's files at the same paths.

Ray places tasks, and repeats tasks lost with a process or node. Their results are byte-identical to those of one
process, and come in the same order.
"""

import os
import socket
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import ray
import torch
from ray.exceptions import RayError, RayTaskError
from ray.util.serialization import register_serializer
from torch import Tensor

import wanda_dvc
from wanda_dvc.engine import accelerator
from wanda_dvc.engine.decoder import Decoder
from wanda_dvc.engine.executor import Executor, R, T
from wanda_dvc.errors import UserError, explain
from wanda_dvc.machine import omp_threads, usable_cores

LOCAL = "local"
THREADS = 4  # of a task without a GPU, if OMP_NUM_THREADS is not set
SECONDS_TO_ANSWER = 10  # for a cluster's port: Ray itself waits for minutes
AHEAD = 2  # tasks per worker that run, or have unread results
RETRIES = 3  # of a task after its process or node died
LIBRARIES = ("torch", "transformers", "numpy")  # results depend on their versions
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # only `download` may use the internet
    "RAY_worker_niceness": "0",  # the priority of a stage without Ray; next to such a stage, Ray's 15 would starve
    "RAY_task_oom_retries": str(RETRIES),  # a limit, instead of forever
    # A process keeps its first GPU, but its next task may get another GPU: tasks name their device.
    "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",
}


# --- on the nodes ---


# What a task expects of its node: versions of libraries, folders, its threads and its device.
Expected = tuple[dict[str, str], list[Path], int, str]


def run_task(expected: Expected, function: Callable[[torch.device, T], R], given: T) -> R | list[Any]:
    """Run a function in this process; an iterator becomes a list. Errors name the node."""
    carry_tensors()
    wanted, folders, threads, device = expected
    torch.set_num_threads(threads)
    try:
        for name, own in versions().items():
            if own != wanted[name]:
                raise UserError(f"{name} {own}, expected the driver's {wanted[name]}: results depend on it; install it")
        if missing := [str(folder) for folder in folders if not folder.exists()]:
            raise UserError(
                f"{', '.join(missing)}: not found on this node, expected the driver's files; keep the study in a "
                "folder that all nodes share, at the same path"
            )
        found = function(task_device(device), given)
        return list(found) if isinstance(found, Iterator) else found
    except Exception as error:
        where = f"worker on {socket.gethostname()} (node {ray.get_runtime_context().get_node_id()[:8]})"
        if lines := explain(error):
            raise UserError(*(f"{where}: {line}" for line in lines)) from None
        raise RuntimeError(f"{where}: {type(error).__name__}: {error}") from error


def task_device(device: str) -> torch.device:
    """Return a task's device: the GPU assigned by Ray, by its index among the GPUs visible to the process."""
    accelerator.multiply_exactly()
    given, seen = [str(number) for number in ray.get_gpu_ids()], os.environ.get("CUDA_VISIBLE_DEVICES")
    if device == "cpu" or not given:
        return torch.device("cpu")
    return torch.device("cuda", seen.split(",").index(given[0]) if seen else int(given[0]))


def carry_tensors() -> None:
    """Make Ray send a tensor as the bytes of its values: torch sends all memory behind a view."""
    register_serializer(Tensor, serializer=pack, deserializer=unpack)


def pack(tensor: Tensor) -> tuple[Any, torch.dtype, torch.Size]:
    """Return a tensor's bytes, dtype and shape."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy(), tensor.dtype, tensor.shape


def unpack(packed: tuple[Any, torch.dtype, torch.Size]) -> Tensor:
    """Return the tensor in main memory, writable."""
    content, dtype, shape = packed
    return torch.from_numpy(np.array(content)).view(dtype).view(shape)


@lru_cache(maxsize=1)
def open_model(folder: Path, dtype: torch.dtype, opening: str, device: torch.device) -> Decoder:
    """Return the model of one `opening`. The process keeps it, and its current block, for its next task."""
    return Decoder(folder, dtype=dtype, device=device)


@lru_cache(maxsize=1)
def versions() -> dict[str, str]:
    """Return the versions that must agree on all nodes."""
    return {"wanda-dvc": wanda_dvc.__version__} | {name: version(name) for name in LIBRARIES}


# --- the driver ---


def connect(address: str) -> None:
    """Start Ray on this machine, or connect to a cluster. UserError if the cluster does not answer."""
    os.environ |= ENVIRONMENT | os.environ
    words: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
    if address == LOCAL:
        words |= {"include_dashboard": False, "num_cpus": usable_cores()}
    else:
        words |= {"runtime_env": {"py_modules": [str(Path(wanda_dvc.__file__).parent)], "env_vars": ENVIRONMENT}}
    try:
        if address not in (LOCAL, "auto"):
            host, _, port = address.removeprefix("ray://").rpartition(":")
            socket.create_connection((host, int(port)), timeout=SECONDS_TO_ANSWER).close()
        ray.init(address=address, **words)
    except Exception as error:  # Ray raises any exception, plain Exception too
        raise UserError(
            f"runtime.ray: {address}: Ray does not answer ({' '.join(str(error).split())}); start it with "
            "`ray start --head`, set RAY_AUTH_MODE=token if it asks for a token, or set local or null"
        ) from None


class Cluster(Executor):
    """Maps units of work over inputs as tasks of a cluster, which this process leaves when it ends."""

    def __init__(self, address: str, *, device: str, folders: Sequence[Path] = ()) -> None:
        """`address` is `local`, or the Ray address of a running cluster, whose nodes see the folders."""
        if not ray.is_initialized():
            connect(address)
        carry_tensors()
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self._kind = "GPU" if device != "cpu" and any(node.get("GPU") for node in nodes) else "CPU"
        if device.startswith("cuda") and self._kind != "GPU":
            found = f"got {device} with workers of {address}"
            raise UserError(f"runtime.device: {found}, expected a node with a GPU; set auto")
        smallest = min((int(node["CPU"]) for node in nodes if node.get("CPU")), default=1)
        self._threads = min(omp_threads() or THREADS, smallest)
        device = device if self._kind == "GPU" else "cpu"
        self._expected: Expected = versions(), [*folders], self._threads, device
        needs: dict[str, Any] = {"num_gpus": 1, "num_cpus": 0} if self._kind == "GPU" else {"num_cpus": self._threads}
        self._task: Any = ray.remote(run_task).options(max_retries=RETRIES, **needs)

    @property
    def workers(self) -> int:
        """The number of concurrent tasks: one per GPU, or one per group of CPUs as large as a task's thread count."""
        return int(ray.cluster_resources().get(self._kind, 0)) // (1 if self._kind == "GPU" else self._threads)

    def opener(self, decoder: Decoder) -> Callable[[torch.device], Decoder]:
        """Return a function that opens a decoder's model in a worker, once."""
        return partial(open_model, decoder.checkpoint.folder, decoder.dtype, uuid4().hex)

    def map(self, function: Callable[[torch.device, T], R], inputs: Iterable[T], what: str = "task") -> Iterator[R]:
        """Yield the function's result for each input, in order. A few tasks are started ahead."""
        shared, most = ray.put(function), AHEAD * max(1, self.workers)
        waiting = deque[tuple[Any, str]]()
        for number, one in enumerate(inputs):
            waiting.append((self._task.remote(self._expected, shared, one), f"{what} {number}"))
            if len(waiting) >= most:
                yield self._get(*waiting.popleft())
        while waiting:
            yield self._get(*waiting.popleft())

    def _get(self, result: Any, name: str) -> Any:
        try:
            return ray.get(result)
        except RayTaskError as error:
            raise error.cause from None
        except RayError as error:
            raise UserError(
                f"runtime.ray: {name}: its worker crashed, also in {RETRIES} retries "
                f"({str(error).partition('.')[0]}); compare a worker's memory with `wanda-dvc doctor`, and run the "
                "stage again"
            ) from None
