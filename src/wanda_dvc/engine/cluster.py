"""Runs tasks (`engine.tasks`) on a Ray cluster. The driver holds references to hidden states, and merges sums.

Ray places tasks, moves and spills their results, and repeats tasks and results lost with a process or node. The driver
merges sums in the shards' order, so results are byte-identical to a walk in one process.
"""

import os
import platform
import socket
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import ray
import torch
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from ray.util.serialization import register_serializer
from torch import Tensor

import wanda_dvc
from wanda_dvc.engine import accelerator, shards, tasks
from wanda_dvc.engine.decoder import Decoder
from wanda_dvc.engine.jobs import Job, JobInput, Jobs, R, T
from wanda_dvc.engine.recorder import Gradients, Recorded, Sums
from wanda_dvc.engine.rows import Row, as_rows
from wanda_dvc.engine.runner import Changes, Head, Rows, Runner, Step, report_resumed
from wanda_dvc.errors import SettingError, UserError, explain, fixable, notice
from wanda_dvc.machine import omp_threads, usable_cores

CPU = torch.device("cpu")
LOCAL = "local"
THREADS = 4  # of a task without a GPU, if OMP_NUM_THREADS is not set
SECONDS = 300  # for a node of a cluster without one
SECONDS_TO_START = 30  # for a free worker, until a stage says that it waits
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


def run_task(threads: int, device: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Run a task in this process. Its errors name the node."""
    carry_tensors()
    torch.set_num_threads(threads)
    try:
        return function(own_device(device), *arguments)
    except Exception as error:
        where = f"worker on {socket.gethostname()} (node {ray.get_runtime_context().get_node_id()[:8]})"
        if fixable(error):
            raise UserError(*(f"{where}: {line}" for line in explain(error))) from None
        raise RuntimeError(f"{where}: {type(error).__name__}: {error}") from error


def own_device(device: str) -> torch.device:
    """Return a task's device: the GPU assigned by Ray, by its index among the GPUs visible to the process."""
    accelerator.multiply_exactly()
    given, seen = [str(number) for number in ray.get_gpu_ids()], os.environ.get("CUDA_VISIBLE_DEVICES")
    if device == "cpu" or not given:
        return CPU
    return torch.device("cuda", seen.split(",").index(given[0]) if seen else int(given[0]))


def carry_tensors() -> None:
    """Make Ray send tensors as bytes. A received tensor is a writable copy."""
    register_serializer(Tensor, serializer=tasks.pack, deserializer=_copy)


def _copy(packed: tasks.Packed) -> Tensor:
    return tasks.unpack(packed).clone()


def versions() -> dict[str, str]:
    """Return the versions that must agree on all nodes."""
    python = ".".join(platform.python_version_tuple()[:2])
    return {"wanda-dvc": wanda_dvc.__version__, "python": python} | {name: version(name) for name in LIBRARIES}


def check_node(_: torch.device, wanted: Mapping[str, str], folders: Sequence[Path]) -> list[str]:
    """Return the fingerprints of folders on this node. UserError if its versions differ from the driver's."""
    for name, found in versions().items():
        if found != wanted[name]:
            raise UserError(
                f"{name} {found}, expected {wanted[name]}, the driver's version; install the same versions on all "
                "nodes, because results depend on them"
            )
    return [tasks.fingerprint(folder) for folder in folders]


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
        todo = (
            "start it with `ray start --head`, set RAY_AUTH_MODE=token in the environment if it asks for a token, or "
            "set local or null"
        )
        todo = "try it again, or set null" if address == LOCAL else todo
        raise SettingError(
            f"runtime.ray: {address}: Ray does not answer ({' '.join(str(error).split())}); {todo}"
        ) from None


def alive_nodes() -> list[dict[str, Any]]:
    """Return Ray's descriptions of the cluster's nodes."""
    return [node for node in ray.nodes() if node["Alive"]]


def _on(node: str) -> dict[str, Any]:
    """Return the options of a task for immediate execution on a node."""
    strategy = NodeAffinitySchedulingStrategy(node_id=node, soft=False)
    return {"num_cpus": 0, "num_gpus": 0, "scheduling_strategy": strategy}


class Task(NamedTuple):
    """A started task."""

    result: Any  # a reference
    name: str  # in messages
    argument: Any = None  # kept until the result arrives: Ray may run the task again


class Cluster(Jobs):
    """Runs tasks on a cluster."""

    reader: str | None = None  # a node with the files, if others lack them
    has_files = True

    def __init__(self, address: str, *, device: str, folders: Sequence[Path] = ()) -> None:
        """`address` is `local`, or the Ray address of a running cluster; `folders` are the folders read by tasks."""
        # A local Ray ends by itself with this process; waiting for its end takes a second.
        self._ours = not ray.is_initialized() and address != LOCAL
        if not ray.is_initialized():
            connect(address)
        carry_tensors()
        nodes = [node["Resources"] for node in alive_nodes()]
        self._kind = "GPU" if device != "cpu" and any(node.get("GPU") for node in nodes) else "CPU"
        if device == "cuda" and self._kind != "GPU":
            raise UserError(
                f"runtime.device: got cuda with workers of {address}, expected a node with a GPU; "
                "set runtime.device=auto"
            )
        smallest = min((int(node["CPU"]) for node in nodes if node.get("CPU")), default=1)
        self._threads = min(omp_threads() or THREADS, smallest)
        self._settings = self._threads, device if self._kind == "GPU" else "cpu"
        self._needs = {"num_gpus": 1, "num_cpus": 0} if self._kind == "GPU" else {"num_cpus": self._threads}
        self._task = ray.remote(run_task)
        # Workers import libraries meanwhile.
        self._first = [self.begin(str, scheduling_strategy="SPREAD")[0] for _ in range(self.workers)]
        self._address, self._folders = address, folders

    @property
    def workers(self) -> int:
        """The number of concurrent tasks: one per GPU, or one per group of CPUs as large as a task's thread count."""
        return max(1, self._places)

    @property
    def has_workers(self) -> bool:
        """Whether the cluster has a node for a task, free or not."""
        return self._places > 0

    @property
    def _places(self) -> int:
        return int(ray.cluster_resources().get(self._kind, 0)) // (1 if self._kind == "GPU" else self._threads)

    @property
    def has_free(self) -> bool:
        """Whether a worker has run a task, or does so within `SECONDS_TO_START`."""
        return bool(ray.wait(self._first, timeout=SECONDS_TO_START)[0])

    def open(self) -> None:
        """Wait for a worker, and check whether all nodes have the files. UserError if the cluster has no worker."""
        if self._address == LOCAL:  # it has this machine's files and cores
            return
        if not self.has_free:
            wanted = "a GPU" if self._kind == "GPU" else f"{self._threads} CPU{'s' * (self._threads > 1)}"
            notice(f"runtime.ray: waiting for a worker with {wanted}")
            busy = self.has_workers  # others may use a worker for hours
            if not ray.wait(self._first, timeout=None if busy else SECONDS)[0]:
                raise UserError(f"runtime.ray: no node with {wanted} joined within {SECONDS} s; look at `ray status`")
        expected = [tasks.fingerprint(folder) for folder in self._folders]
        here = ray.get_runtime_context().get_node_id()
        nodes = [x["NodeID"] for x in alive_nodes() if x["Resources"].get(self._kind) or x["NodeID"] == here]
        asked = [self.begin(check_node, versions(), self._folders, **_on(node)) for node in nodes]
        for node, (ref,) in zip(nodes, asked, strict=True):
            try:
                same = ray.get(ref) == expected
            except RayTaskError as error:
                raise error.cause from None
            except RayError:  # the node has died
                continue
            self.has_files, self.reader = self.has_files and same, node if same else self.reader

    def begin(self, function: Callable[..., Any], *arguments: Any, num_returns: int = 1, **options: Any) -> list[Any]:
        """Start a task, with Ray's options. Return a reference to each of its results."""
        options |= {"num_returns": num_returns}
        task = self._task.options(**self._needs | {"max_retries": RETRIES} | options)
        refs = task.remote(*self._settings, function, *arguments)
        return refs if num_returns > 1 else [refs]

    def results(self, begun: Iterable[Task]) -> Iterator[Any]:
        """Yield the tasks' results in order. A few tasks are started ahead."""
        waiting, most = deque[Task](), AHEAD * self.workers
        for task in begun:
            waiting.append(task)
            if len(waiting) >= most:
                yield self._get(waiting.popleft())
        while waiting:
            yield self._get(waiting.popleft())

    def _get(self, task: Task) -> Any:
        try:
            return ray.get(task.result)
        except RayTaskError as error:
            raise error.cause from None
        except RayError as error:
            raise UserError(
                f"runtime.ray: {task.name}: its worker crashed, also in {RETRIES} retries "
                f"({str(error).partition('.')[0]}); compare a worker's memory with `wanda-dvc doctor`, and run the "
                "stage again"
            ) from None

    def put(self, content: Any) -> Any:
        """Return a reference to an argument of tasks, kept because Ray may run the tasks again."""
        return ray.put(content)

    def read(self, folder: Path, names: list[str]) -> Any:
        """Return a reference to tensors of a checkpoint, for nodes without its files."""
        if self.reader is None:
            return self.put(tasks.read(CPU, folder, names))
        return self.begin(tasks.read, folder, names, **_on(self.reader))[0]

    def each(self, function: Job[T, R], inputs: Iterable[JobInput[T]]) -> Iterator[R]:
        """Yield a function's result for each input."""
        sent = ((one.name, self.put(one.named if self.has_files else one.complete)) for one in inputs)
        return self.results(Task(self.begin(function, ref)[0], name, ref) for name, ref in sent)

    def counts(self) -> dict[str, int]:
        """Return the numbers of workers and nodes."""
        return {"workers": self.workers, "nodes": sum(bool(x["Resources"].get(self._kind)) for x in alive_nodes())}

    def stop(self) -> None:
        """End this process's tasks and its local Ray at once."""
        ray.shutdown()

    def close(self) -> None:
        """Leave the cluster."""
        if self._ours:
            ray.shutdown()


@dataclass(kw_only=True)
class TaskRunner(Runner):
    """Runs rows as tasks, one per block and shard. It holds references to rows and hidden states."""

    decoder: Decoder
    folder: Path  # of its checkpoint
    cluster: Cluster
    not_finite: str | None = field(default=None, init=False)
    _model: Any = field(default=None, init=False)  # `tasks.Model`
    _cut: list[range] = field(default_factory=list, init=False)  # the shards
    _rows: list[Any] = field(default_factory=list, init=False)  # of each shard
    _last: list[Any] = field(default_factory=list, init=False)  # each shard's hidden states after the last block
    _weights: dict[int, Any] = field(default_factory=dict, init=False)  # of the block at work, where they are sent
    _kept: list[Any] = field(default_factory=list, init=False)

    def walk(
        self, rows: Rows, *, kept: int | None = None, with_dense: bool = False, changes: Changes | None = None
    ) -> Iterator[Step]:
        """Run all rows through all blocks; after an interruption, through the kept blocks again."""
        blocks, finished, rows = len(self.decoder.blocks), kept or 0, as_rows(rows)
        if finished == blocks:
            return
        own = self._embed(rows, shards.cut(len(rows)))
        dense = own if with_dense else []
        report_resumed(finished, blocks)
        for index in range(blocks):
            step = TaskStep(self, index, own, dense)
            if index >= finished:
                yield step
            else:
                change = changes(index) if changes else None
                if change is None or dense:
                    step.advance()
                if change:
                    step.change(*change)
            own, dense = step.after, step.dense_after
        self._last = own

    def backward(self, rows: Rows, *, gram: bool = False, kept: int = 0) -> Iterator[tuple[int, Gradients]]:
        """Run all rows forward and backward. Each row is a shard, so sums are formed row by row."""
        rows, blocks = as_rows(rows), len(self.decoder.blocks)
        before = [self._embed(rows, [range(row, row + 1) for row in range(len(rows))])]
        report_resumed(kept, blocks, " of the backward pass")
        for index in range(blocks):
            step = TaskStep(self, index, before[-1], [])
            step.advance()
            before.append(step.after)
        last = zip(self._rows, before.pop(), strict=True)
        gradients = [self.cluster.begin(tasks.loss_gradients, self._model, *shard)[0] for shard in last]
        for done, index in enumerate(reversed(range(blocks))):
            words, streams, total = (*self.at(index), gram and done >= kept), (before.pop(), gradients), Gradients()
            (gradients,), found = self.run(f"backward pass, block {index}", tasks.backward, words, *streams)
            for sums in found:
                total.merge(sums)
                del sums  # before the next shard's are there
            if done >= kept:
                total.check_finite(self.decoder.checkpoint, index)
                yield index, total

    def head(self, function: Head[T, R], inputs: Callable[[range], T | None]) -> Iterator[R]:
        """Apply a function to some shards' last hidden states."""
        wanted = map(inputs, self._cut)
        for found in self.run("output head", tasks.head, (function,), self._last, wanted, returns=1)[1]:
            yield from found

    def each(self, function: Job[T, R], inputs: Iterable[JobInput[T]]) -> Iterator[R]:
        """Apply a function to each input."""
        return self.cluster.each(function, inputs)

    def run(
        self, name: str, function: Callable[..., Any], words: tuple[Any, ...], *columns: Iterable[Any], returns: int = 2
    ) -> tuple[list[list[Any]], Iterator[Any]]:
        """Run a task for each shard, with its entry of each column.

        Return references to the first results, in lists that grow as tasks start, and the last results.
        """
        first: list[list[Any]] = [[] for _ in range(returns - 1)]

        def begun() -> Iterator[Task]:
            for number, shard in enumerate(zip(self._rows, *columns, strict=True)):
                refs = self.cluster.begin(function, self._model, *words, *shard, num_returns=returns)
                for column, ref in zip(first, refs, strict=False):
                    column.append(ref)
                yield Task(refs[-1], f"{name}, shard {number}")

        return first, self.cluster.results(begun())

    def at(self, index: int, change: Any = None) -> tuple[tasks.Block, Any]:
        """Return a block to run, and a reference to its weights; None if every node has the files."""
        block = tasks.Block(index, change.hex() if change else "")
        if self.cluster.has_files:
            return block, None
        if index not in self._weights:
            if self.cluster.reader:
                self._weights.clear()  # Ray can have them read again
            self._weights[index] = self.cluster.read(self.folder, tasks.names(self.decoder, index))
        return block, self._weights[index]

    def keep(self, content: Any) -> Any:
        """Return a reference to an argument of tasks, kept for the runner's lifetime."""
        self._kept.append(self.cluster.put(content))
        return self._kept[-1]

    def _embed(self, rows: list[Row], cut: list[range]) -> list[Any]:
        """Start a walk of some shards. Return references to their hidden states before the first block."""
        self.decoder.check_tokens(rows)
        counts = self.cluster.counts() | {"shards": len(cut)}
        notice(", ".join(f"{count} {what.removesuffix('s') if count == 1 else what}" for what, count in counts.items()))
        if self._model is None:
            self._model = self.keep(tasks.describe(self.decoder, self.folder, has_files=self.cluster.has_files))
        self._cut, self.not_finite = cut, None
        self._rows = [self.keep(rows[shard.start : shard.stop]) for shard in cut]
        return [self.cluster.begin(tasks.embed, self._model, shard)[0] for shard in self._rows]


@dataclass
class TaskStep(Step):
    """One block of a walk of tasks."""

    runner: TaskRunner
    index: int
    before: list[Any]  # references to each shard's hidden states
    dense_before: list[Any]  # likewise of the dense model, if the walk includes it
    after: list[Any] = field(default_factory=list, init=False)
    dense_after: list[Any] = field(default_factory=list, init=False)

    def advance(self) -> None:
        """Run every row through the block."""
        for _ in self._through():
            pass

    def record(self, *, gram: bool = False, crosses: bool = False) -> Recorded:
        """Run every row through the block; return the statistics of its linears' inputs."""
        total = Sums()
        for sums in self._through(recording={"gram": gram, "crosses": crosses}):
            total.merge(sums)
            del sums  # before the next shard's are there
        return total.of(self.runner.decoder.linears(self.index))

    def change(self, keeps: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
        """Run every own row through the block once more."""
        for _ in self._through(change=self.runner.keep((keeps, weights))):
            pass

    def train(self, keeps: Mapping[str, Tensor], weights: Mapping[str, Tensor], **settings: Any) -> dict[str, Tensor]:
        """Raise: a training takes one row a step, so it does not run as tasks."""
        raise NotImplementedError

    def _through(self, *, change: Any = None, recording: Mapping[str, bool] | None = None) -> Iterator[Any]:
        """Run every shard through the block. Yield their sums. A change does not affect the dense model."""
        words = (*self.runner.at(self.index, change), change, recording)
        dense = self.dense_before if change is None else []
        streams = self.before, dense or [None] * len(self.before)
        (self.after, dense_after), found = self.runner.run(
            f"block {self.index}", tasks.forward, words, *streams, returns=3
        )
        if dense:
            self.dense_after = dense_after
        for sums, where in found:
            self.runner.not_finite = self.runner.not_finite or where
            yield sums
            del sums
