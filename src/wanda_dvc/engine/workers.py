"""Ray's workers. Ray starts and places processes, carries calls and results between machines, and says who died."""

import contextlib
import os
import platform
import socket
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import ray
import torch
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from ray.util.serialization import register_serializer
from torch import Tensor

import wanda_dvc
from wanda_dvc.engine.pool import Crew, Hired, Lost
from wanda_dvc.engine.worker import Order, Packed, Worker, pack, unpack
from wanda_dvc.errors import SettingError, UserError
from wanda_dvc.machine import omp_threads, usable_cores

LOCAL = "local"
THREADS = 4  # of a worker without a GPU, where OMP_NUM_THREADS is not set
SECONDS = 300  # for the first worker to come
GRACE = 5  # seconds for others after it
LIBRARIES = ("torch", "transformers", "numpy")  # whose versions decide bytes


def versions() -> dict[str, str]:
    """Return what has to be the same on all nodes."""
    python = ".".join(platform.python_version_tuple()[:2])
    return {"wanda-dvc": wanda_dvc.__version__, "python": python} | {name: version(name) for name in LIBRARIES}


def carry_tensors() -> None:
    """Have Ray carry tensors as their bytes. What arrives is a copy that may be written to."""
    register_serializer(Tensor, serializer=pack, deserializer=_copied)


def _copied(packed: Packed) -> Tensor:
    return unpack(packed).clone()


class Actor:
    """A worker in a process of Ray's."""

    def __init__(self, device: str, threads: int, driver: str) -> None:
        """`driver` is the node of the driver."""
        carry_tensors()
        torch.set_num_threads(threads)
        node = ray.get_runtime_context().get_node_id()
        name = f"{socket.gethostname()} (node {node[:8]})"
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.worker = Worker(name, device=device, at_driver=node == driver, fetch=ray.get)

    def take(self, order: Order, expected: dict[str, str]) -> tuple[str, bool]:
        """Take an order. Return this worker's name, and whether the files are here."""
        for name, found in versions().items():
            if found != expected[name]:
                raise UserError(
                    f"worker on {self.worker.name}: {name} {found}, expected {expected[name]}, as the driver has it; "
                    "other versions give other bytes: install the same ones on all nodes"
                )
        return self.worker.name, self.worker.do("take", {}, order)

    def do(self, *words: Any) -> Any:
        """Do one thing."""
        return self.worker.do(*words)


class RayCrew(Crew):
    """Workers of a cluster. They start at once, so that their imports take no time of the driver's."""

    def __init__(self, address: str, *, device: str, most: int | None = None) -> None:
        """`address` is `local`, or Ray's of a running cluster. `most` is the most workers that have something to do."""
        # Ray of this machine ends with this process, by itself: to wait for that takes a second.
        self._ours = not ray.is_initialized() and address != LOCAL
        if not ray.is_initialized():
            connect(address)
        carry_tensors()
        self._actors: list[Any] = []
        self._hired: dict[Any, Hired] = {}
        self._device = device
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self._cards = device != "cpu" and any(node.get("GPU") for node in nodes)
        if device == "cuda" and not self._cards:
            raise UserError(
                f"runtime.device: got cuda with workers of {address}, expected a node with a GPU; "
                "set runtime.device=auto"
            )
        smallest = min((int(node["CPU"]) for node in nodes if node.get("CPU")), default=1)
        self.threads = min(omp_threads() or THREADS, smallest)
        free = ray.available_resources()
        self.free = int(free.get("GPU", 0)) if self._cards else int(free.get("CPU", 0)) // self.threads
        self._start(max(1, min(self.free, most or self.free)))

    def hire(self, most: int, asked: Order) -> list[Hired]:
        """Take those workers that are there soon after the first, and no more than so many."""
        if not self._actors:
            self._start(1)
        waiting = {actor.take.remote(asked, versions()): actor for actor in self._actors[:most]}
        surplus, self._actors = self._actors[most:], []
        found, left = ray.wait(list(waiting), num_returns=1, timeout=SECONDS)
        if found:
            more, left = ray.wait(left, num_returns=len(left), timeout=GRACE) if left else ([], [])
            found += more
        for actor in [*surplus, *(waiting[ref] for ref in left)]:
            ray.kill(actor)
        hired = [Hired(waiting[ref], *self.get(ref)) for ref in waiting if ref in found]
        if not hired:
            raise UserError(
                f"runtime.ray: no worker came in {SECONDS} s, expected one with "
                f"{'a card' if self._cards else f'{self.threads} CPUs'}; `ray status` says what the cluster is doing"
            )
        self._hired |= {one.handle: one for one in hired}
        return hired

    def call(self, worker: Hired, *words: Any) -> Any:
        """Begin `Worker.do`."""
        return worker.handle.do.remote(*words)

    def get(self, ticket: Any) -> Any:
        """What a call returned or raised."""
        try:
            return ray.get(ticket)
        except (RayActorError, ObjectLostError) as error:
            raise Lost(str(error).partition("\n")[0]) from None
        except RayTaskError as error:
            raise error.cause from None

    def ended(self, ticket: Any) -> bool:
        """Whether a call has ended."""
        return bool(ray.wait([ticket], timeout=0, fetch_local=False)[0])

    def put(self, content: Any) -> Any:
        """Leave something in the cluster's object store."""
        return ray.put(content)

    def dismiss(self, worker: Hired) -> None:
        """End a worker."""
        with contextlib.suppress(RayError):
            ray.kill(self._hired.pop(worker.handle).handle)

    def told(self) -> dict[str, int]:
        """Return how many workers and nodes there are."""
        return {"workers": len(self._hired), "nodes": len({one.name for one in self._hired.values()})}

    def close(self) -> None:
        """End all workers, and forget what waits on their disks."""
        with contextlib.suppress(RayError, GetTimeoutError):
            ray.get([one.handle.do.remote("end", {}) for one in self._hired.values()], timeout=GRACE)
        self._kill()
        if self._ours:
            ray.shutdown()

    def stop(self) -> None:
        """End all workers at once, and Ray."""
        self._kill()
        ray.shutdown()

    def _kill(self) -> None:
        for actor in [*self._actors, *self._hired]:
            with contextlib.suppress(RayError):
                ray.kill(actor)

    def _start(self, number: int) -> None:
        """Start workers. Ray places each where there is room, and spreads them over nodes."""
        asked = {"num_gpus": 1, "num_cpus": 0} if self._cards else {"num_cpus": self.threads}
        actor = ray.remote(Actor).options(**asked, scheduling_strategy="SPREAD", max_restarts=0)
        driver = ray.get_runtime_context().get_node_id()
        self._actors = [actor.remote(self._device, self.threads, driver) for _ in range(number)]


class Found(NamedTuple):
    """A cluster, as `doctor` looks at it."""

    nodes: list[str]
    cpus: int
    cards: int
    other: list[str]  # what differs from this process's versions, by node


def look(address: str) -> Found:
    """Connect to a cluster and ask every node for its versions. UserError where none answers."""
    connect(address)
    try:
        expected, other = versions(), []
        nodes = {f"{x['NodeManagerHostname']} (node {x['NodeID'][:8]})": x["NodeID"] for x in ray.nodes() if x["Alive"]}
        ask = ray.remote(versions)
        asked = {name: ask.options(num_cpus=0, scheduling_strategy=_on(node)).remote() for name, node in nodes.items()}
        for node, ticket in asked.items():
            try:
                found = ray.get(ticket, timeout=SECONDS)
            except RayError as error:
                other.append(f"{node}: {str(error).strip().splitlines()[-1]}")
                continue
            other += [f"{node}: {x} {found[x]}, expected {it}" for x, it in expected.items() if found[x] != it]
        total = ray.cluster_resources()
        return Found(list(nodes), int(total.get("CPU", 0)), int(total.get("GPU", 0)), other)
    finally:
        ray.shutdown()


def _on(node: str) -> Any:
    return NodeAffinitySchedulingStrategy(node_id=node, soft=False)


def connect(address: str) -> None:
    """Start Ray on this machine, or connect to a cluster. UserError where none answers."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no stage but download touches a network
    os.environ.setdefault("RAY_worker_niceness", "0")  # as a stage without Ray, beside which Ray's 15 would starve
    words: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
    if address == LOCAL:
        words |= {"include_dashboard": False, "num_cpus": usable_cores()}
    else:
        package = Path(wanda_dvc.__file__).parent
        words |= {"runtime_env": {"py_modules": [str(package)]}}
    try:
        ray.init(address=address, **words)
    except Exception as error:  # Ray raises what it likes, plain Exception too
        todo = "start it with `ray start --head`, or set local or null"
        todo = "try it again, or set null" if address == LOCAL else todo
        raise SettingError(
            f"runtime.ray: {address}: no Ray ({' '.join(str(error).split())}), expected one that answers; {todo}"
        ) from None
