"""Tasks on a real cluster of Ray give the bytes of one process, for any number of workers and whichever node dies."""

import contextlib
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import offline
import pytest
import torch
from cases.models import tensors
from conftest import MADE, Make, Patch, calibrate, fetch, run_blocks, save_tiny_model, tree

from wanda_dvc.engine import questions
from wanda_dvc.engine.decoder import Decoder
from wanda_dvc.engine.sums import InputSums
from wanda_dvc.errors import UserError
from wanda_dvc.pruning.statistics import TokenSum

ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'wanda-dvc[ray]'")


from wanda_dvc.engine.cluster import AHEAD, VERSIONS, Cluster, connect, run_on_node, task_device  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own warnings


def slow(test: Callable[..., None]) -> Any:
    """A test on real nodes, whose processes take minutes to start on a busy machine."""
    return pytest.mark.full(pytest.mark.slow(test))


CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """A cluster: a head without CPUs, and the nodes that tests add."""
    from ray.cluster_utils import Cluster as Nodes

    # As long as it takes on a machine that does other work.
    patience = {"RAY_agent_register_timeout_ms": "300000", "RAY_worker_register_timeout_seconds": "300"}
    # Ray looks for dead nodes twice a second instead of every three, and keeps the head's worker.
    soon = {"RAY_health_check_period_ms": "500", "RAY_num_workers_soft_limit": "1"}
    os.environ |= patience | soon | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    with offline.loopback():
        started = Nodes(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False} | agents())
        ray.init(address=started.address, log_to_driver=False, configure_logging=False)
        yield started
        ray.shutdown()
        started.shutdown()


def agents() -> dict[str, int]:
    """What a node starts with: ports of its agents, for which it waits 15 s at most where it is given none."""
    names = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port")
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in names]
        for listener in sockets:
            listener.bind(("127.0.0.1", 0))
        return {"num_gpus": 0} | {name: one.getsockname()[1] for name, one in zip(names, sockets, strict=True)}


def set_nodes(nodes: Any, number: int) -> None:
    """Have so many nodes of one CPU."""
    for _ in range(number - len(nodes.worker_nodes)):
        nodes.add_node(num_cpus=1, **agents())
    for node in list(nodes.worker_nodes)[number:]:
        nodes.remove_node(node)


class Remote:
    """A task of Ray that runs in this process when it is started."""

    def __init__(self, function: Callable[..., Any]):
        self.remote = function

    def options(self, **_: Any) -> "Remote":
        return self


def ray_here(monkeypatch: Patch, workers: int) -> list[Any]:
    """Put a cluster in this process in the place of Ray's; the values that the driver receives from it."""
    received = list[Any]()

    def get(value: Any) -> Any:
        received.append(value)
        return value

    values = {"is_initialized": True, "nodes": [{"Alive": True, "Resources": {"CPU": 1}}]}
    values |= {"cluster_resources": {"CPU": workers}, "get_gpu_ids": []}
    for name, value in values.items():
        monkeypatch.setattr(ray, name, lambda value=value: value)
    for name, function in {"put": lambda x: x, "get": get, "remote": Remote}.items():
        monkeypatch.setattr(ray, name, function)
    monkeypatch.setattr("wanda_dvc.engine.cluster.register_serializer", lambda *_, **__: None)
    return received


@pytest.mark.parametrize("workers", [1, 3])
def test_few_inputs_are_taken_ahead(monkeypatch: Patch, workers: int):
    """So the driver and Ray's object store hold a bounded number of results."""
    ray_here(monkeypatch, workers)
    taken = 0

    def inputs() -> Iterator[int]:
        nonlocal taken
        while taken < 50:
            taken += 1
            yield taken

    results = Cluster("auto", device="cpu").map(lambda _, value: 2 * value, inputs())
    for number, result in enumerate(results, start=1):
        assert result == 2 * number
        assert taken <= number - 1 + AHEAD * workers
    assert number == 50


def test_sums_are_merged_in_order_and_only_their_total_comes_to_the_driver(monkeypatch: Patch, tiny: Path):
    received = ray_here(monkeypatch, 2)
    decoder = Decoder(tiny, dtype=torch.float32, device=CPU)

    def sums(_model: Any, _job: Any, number: int) -> InputSums:
        first = torch.full((2,), 1.0 if number % 2 else 2.0**-53, dtype=torch.float64)
        output = {"expert": TokenSum(first, 1)}
        return InputSums(outputs=output, input_of={f"linear {number}": "input"})

    expected = InputSums()
    for number in range(7):  # in another order 2⁻⁵³ would count
        expected.merge(sums(None, None, number))
    cluster = Cluster("auto", device="cpu")
    total = cluster.merge(cluster.with_model(decoder, sums, None), range(7), "chunk")
    assert torch.equal(total.outputs["expert"].sum, expected.outputs["expert"].sum)
    assert list(total.input_of) == list(expected.input_of)
    assert [x for x in received if x is not None] == [total]


@pytest.mark.parametrize(("seen", "given", "number"), [(None, 3, 3), ("4,7", "7", 1), ("2", 2, 0)])
def test_a_task_takes_the_gpu_that_ray_gave_it(monkeypatch: Patch, seen: str | None, given: int | str, number: int):
    monkeypatch.setattr(ray, "get_gpu_ids", lambda: [given])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if seen:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
    assert task_device("auto") == torch.device("cuda", number)
    assert task_device("cpu") == CPU
    monkeypatch.setattr(ray, "get_gpu_ids", list)
    assert task_device("auto") == CPU  # to look at a node takes none


# In this order, because a node takes seconds to start.


@slow
def test_an_error_of_a_task_is_ours_with_the_nodes_name(nodes: Any, study: Make, tmp_path: Path):
    set_nodes(nodes, 1)
    folder = save_tiny_model(tmp_path / "broken")
    tensors(lambda x: x["model.layers.2.mlp.up_proj.weight"][3, 4].fill_(torch.nan))(folder)
    calibrated_study = fetch(study(folder, runtime__ray="auto"), "model", "calibration")
    with pytest.raises(UserError, match=r"^worker on \S+ \(node [0-9a-f]{8}\): .*block 2: activations"):
        calibrate(study=calibrated_study)


def test_a_node_with_another_version_of_a_library_is_refused(monkeypatch: Patch):
    monkeypatch.setattr(ray, "get_runtime_context", mock.MagicMock())
    with pytest.raises(UserError, match="worker on .*: torch .*, expected the driver's 0: results depend on it"):
        run_on_node(VERSIONS | {"torch": "0"}, 1, "cpu", lambda *_: None, None)


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_address_where_nothing_listens_is_refused_at_once(scheme: str):
    """Ray itself waits for minutes."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    said = rf"^runtime.ray: .*127.0.0.1:{port}: Ray does not answer \(.*refused"
    with offline.loopback(), pytest.raises(UserError, match=said):
        connect(f"{scheme}127.0.0.1:{port}")


@slow
def test_a_gpu_that_no_node_has_is_refused_before_a_task_starts(nodes: Any):
    for device in ("cuda", "cuda:1"):
        with pytest.raises(UserError, match=f"runtime.device: got {device} with workers of auto, expected a node with"):
            Cluster("auto", device=device)


@slow  # each try starts a process
def test_a_task_that_kills_its_workers_ends_the_stage(nodes: Any):
    set_nodes(nodes, 1)
    cluster = Cluster("auto", device="cpu")
    with pytest.raises(UserError, match=r"^runtime.ray: block 0, chunk 0: its worker crashed, also in 3 retries \("):
        list(cluster.map(lambda *_: os._exit(1), [None], "block 0, chunk"))


@slow
def test_every_artifact_is_the_same_though_a_node_dies_in_every_stage(nodes: Any, study: Make, monkeypatch: Patch):
    tiers = {"calibration__statistics": "fisher", "calibration__windows": 20}
    settings = tiers | {"propagation": "pruned", "reconstruction": "output-weighted"}
    monkeypatch.setattr(questions, "SEQUENCE_TOKENS", 60)  # rows enough for every node
    calibrated_study = fetch(study(**settings), "model", "calibration", "perplexity", "tasks")
    run_blocks(calibrated_study)
    expected = tree(calibrated_study.root, *MADE)
    for name in MADE:
        shutil.rmtree(calibrated_study.root / name)
    # In `calibrate` the walk and the backward pass, in `mask` the walk and a solver, `perplexity`, `zero-shot`.
    names = ["block 2, chunk 1", "backward pass, block 2, chunk 1", "block 1, chunk 1", "solver "]
    names += ["output head, chunk 1", "output head, chunk 1", "block 2, chunk 1"]
    real = Cluster._get

    def get(self: Cluster, result: Any, name: str) -> Any:
        """Kill a node when the driver waits for the next of these tasks, and add another one."""
        if names and name.startswith(names[0]):
            names.pop(0)
            set_nodes(nodes, 3)
            nodes.remove_node(next(iter(nodes.worker_nodes)), allow_graceful=False)
        return real(self, result, name)

    monkeypatch.setattr(Cluster, "_get", get)
    set_nodes(nodes, 3)
    run_blocks(study(runtime__ray="auto", **settings))
    assert tree(calibrated_study.root, *MADE) == expected
    assert not names
