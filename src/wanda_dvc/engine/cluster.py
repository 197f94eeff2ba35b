"""Runs functions as tasks of a Ray cluster, whose nodes see the study's files at the same paths.

A function gets a device, or a model on a device. Ray places tasks, and repeats tasks lost with a process or node.
Their results are byte-identical to those of one process, and arrive in the same order.
"""

import os
import socket
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar
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
from wanda_dvc.errors import UserError, explain
from wanda_dvc.machine import omp_threads, usable_cores

LOCAL = "local"
THREADS = 4  # of a task without a GPU, if OMP_NUM_THREADS is not set
SECONDS_TO_ANSWER = 10  # for a cluster's port: Ray itself waits for minutes
AHEAD = 2  # tasks per worker that run, or have unread results; Ray writes those beyond its object store to disk
RETRIES = 3  # of a task after its process or node died
# Results depend on these.
VERSIONS = {"wanda-dvc": wanda_dvc.__version__} | {name: version(name) for name in ("torch", "transformers", "numpy")}
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # only `download` may use the internet
    "RAY_worker_niceness": "0",  # the priority of a stage without Ray; next to one, tasks with Ray's own 15 would wait
    "RAY_task_oom_retries": str(RETRIES),  # a limit, instead of forever
    # A process keeps its first GPU, but its next task may get another GPU: tasks name their device.
    "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",
}

TaskInput = TypeVar("TaskInput")
TaskResult = TypeVar("TaskResult")
TaskFunction = Callable[[torch.device, TaskInput], TaskResult]


def run_on_node(
    versions: dict[str, str], threads: int, device: str, function: TaskFunction[TaskInput, TaskResult], value: TaskInput
) -> TaskResult | list[Any]:
    """Run a function in this process; an iterator becomes a list. Errors name the node, such as other versions."""
    register_tensor_serializer()
    torch.set_num_threads(threads)
    accelerator.disable_tf32()
    try:
        for name, installed in VERSIONS.items():
            driver = versions[name]
            if installed != driver:
                raise UserError(f"{name} {installed}, expected the driver's {driver}: results depend on it; install it")
        result = function(task_device(device), value)
        return list(result) if isinstance(result, Iterator) else result
    except Exception as error:
        where = f"worker on {socket.gethostname()} (node {ray.get_runtime_context().get_node_id()[:8]})"
        if lines := explain(error):
            raise UserError(*(f"{where}: {line}" for line in lines)) from None
        raise RuntimeError(f"{where}: {type(error).__name__}: {error}") from error


@lru_cache(maxsize=1)
def open_model(folder: Path, dtype: torch.dtype, _cluster_id: str, device: torch.device) -> Decoder:
    """Open a model, which the process keeps for the next tasks of the same cluster object: files may change later."""
    return Decoder(folder, dtype=dtype, device=device)


def call_with_model(
    folder_dtype_id: tuple[Path, torch.dtype, str],  # the first arguments of `open_model`
    function: Callable[[Decoder, Any, TaskInput], TaskResult],
    job: Any,
    device: torch.device,
    value: TaskInput,
) -> TaskResult:
    """Return function(model, job, value), with a model opened on a device."""
    return function(open_model(*folder_dtype_id, device), job, value)


def merge_on_node(total: Any, sums: Any) -> tuple[Any, None]:
    """Add sums of more sequences to a total, None at first; return it, and None, which the driver waits for."""
    register_tensor_serializer()
    if total is None:
        return sums, None
    total.merge(sums)
    return total, None


def task_device(device: str) -> torch.device:
    """Return a task's device: the GPU assigned by Ray, by its index among the GPUs visible to the process."""
    assigned = [str(number) for number in ray.get_gpu_ids()]
    if device == "cpu" or not assigned:
        return torch.device("cpu")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return torch.device("cuda", visible.split(",").index(assigned[0]) if visible else int(assigned[0]))


def register_tensor_serializer() -> None:
    """Make Ray send a tensor as the bytes of its values: torch sends all memory behind a view."""
    register_serializer(Tensor, serializer=pack_tensor, deserializer=unpack_tensor)


def pack_tensor(tensor: Tensor) -> tuple[Any, torch.dtype, torch.Size]:
    """Return a tensor's bytes, dtype and shape."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy(), tensor.dtype, tensor.shape


def unpack_tensor(packed: tuple[Any, torch.dtype, torch.Size]) -> Tensor:
    """Return the tensor in main memory, writable. Ray sends this function with each tensor: by name, at this level."""
    content, dtype, shape = packed
    return torch.from_numpy(np.array(content)).view(dtype).view(shape)


def connect(address: str) -> None:
    """Start Ray on this machine, or connect to a cluster. UserError if the cluster does not answer."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    options: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
    if address == LOCAL:
        options |= {"include_dashboard": False, "num_cpus": usable_cores()}
    else:
        options |= {"runtime_env": {"py_modules": [str(Path(wanda_dvc.__file__).parent)], "env_vars": ENVIRONMENT}}
    try:
        if address not in (LOCAL, "auto"):
            host, _, port = address.removeprefix("ray://").rpartition(":")
            socket.create_connection((host, int(port)), timeout=SECONDS_TO_ANSWER).close()
        ray.init(address=address, **options)
    except Exception as error:  # Ray raises any exception, plain Exception too
        raise UserError(
            f"runtime.ray: {address}: Ray does not answer ({' '.join(str(error).split())}); start it with "
            "`ray start --head`, set RAY_AUTH_MODE=token if it asks for a token, or set local or null"
        ) from None


class Cluster:
    """Maps functions over inputs as tasks of a cluster, which this process leaves when it ends."""

    def __init__(self, address: str, *, device: str) -> None:
        """`address` is `local`, or the Ray address of a running cluster."""
        if not ray.is_initialized():
            connect(address)
        register_tensor_serializer()
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self._kind = "GPU" if device != "cpu" and any(node.get("GPU") for node in nodes) else "CPU"
        if device.startswith("cuda") and self._kind != "GPU":
            where = f"got {device} with workers of {address}"
            raise UserError(f"runtime.device: {where}, expected a node with a GPU; set auto")
        smallest = min((int(node["CPU"]) for node in nodes if node.get("CPU")), default=1)
        self.device = torch.device("cuda" if self._kind == "GPU" else "cpu")  # of tasks; which GPU: `task_device`
        self._threads = min(omp_threads() or THREADS, smallest)
        self._expected = VERSIONS, self._threads, self.device.type  # the first arguments of `run_on_node`
        resources = {"num_gpus": 1, "num_cpus": 0} if self._kind == "GPU" else {"num_cpus": self._threads}
        self._task: Any = ray.remote(run_on_node).options(max_retries=RETRIES, **resources)
        # Without a CPU of its own: it runs next to the total, and does not wait for tasks.
        self._merge: Any = ray.remote(merge_on_node).options(num_returns=2, num_cpus=0, max_retries=RETRIES)
        self._id = uuid4().hex

    @property
    def workers(self) -> int:
        """The number of concurrent tasks: one per GPU, or one per group of CPUs as large as a task's thread count."""
        return int(ray.cluster_resources().get(self._kind, 0)) // (1 if self._kind == "GPU" else self._threads)

    def with_model(self, decoder: Decoder, function: Callable[..., Any], job: Any) -> TaskFunction[Any, Any]:
        """Return a task of function(model, job, input). Each worker opens the decoder's model once."""
        return partial(call_with_model, (decoder.checkpoint.folder, decoder.dtype, self._id), function, job)

    def merge(self, function: TaskFunction[Any, Any], inputs: Iterable[Any], what: str) -> Any:
        """Return the sums function(device, input) of all inputs, merged in order on the nodes; None without input.

        A chain of tasks passes the total on, so that this process receives nothing else.
        """
        total = None
        for sums, name in self._start(function, inputs, what):
            total, merged = self._merge.remote(total, sums)
            self._get(merged, name)
        return None if total is None else self._get(total, what)

    def map(
        self, function: TaskFunction[TaskInput, TaskResult], inputs: Iterable[TaskInput], what: str = "task"
    ) -> Iterator[TaskResult]:
        """Yield function(device, input) for each input, in order; messages name an input by `what` and its number."""
        for reference, name in self._start(function, inputs, what):
            yield self._get(reference, name)

    def _start(
        self, function: TaskFunction[TaskInput, Any], inputs: Iterable[TaskInput], what: str
    ) -> Iterator[tuple[Any, str]]:
        """Start a task for each input, a few ahead; yield the reference and the name of each, in order."""
        shared = ray.put(function)
        unread = deque[tuple[Any, str]]()
        for number, value in enumerate(inputs):
            unread.append((self._task.remote(*self._expected, shared, value), f"{what} {number}"))
            if len(unread) >= AHEAD * max(1, self.workers):
                yield unread.popleft()
        while unread:
            yield unread.popleft()

    def _get(self, reference: Any, name: str) -> Any:
        try:
            return ray.get(reference)
        except RayTaskError as error:
            raise error.cause from None
        except RayError as error:
            raise UserError(
                f"runtime.ray: {name}: its worker crashed, also in {RETRIES} retries "
                f"({str(error).partition('.')[0]}); compare a worker's memory with `wanda-dvc doctor`, and run the "
                "stage again"
            ) from None
