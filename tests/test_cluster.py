"""Tasks on a real cluster of Ray give the bytes of one process, for any number of workers and whichever node dies."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_tiny_model
from safetensors.torch import load_file, save_file
from test_stages import fetch

from wanda_dvc.engine import questions
from wanda_dvc.engine.decoder import Decoder
from wanda_dvc.engine.losses import window_losses
from wanda_dvc.engine.recorder import Gradients, Recorded
from wanda_dvc.engine.runner import Change, Runner
from wanda_dvc.engine.walk import LocalRunner
from wanda_dvc.errors import UserError
from wanda_dvc.stages.apply import apply
from wanda_dvc.stages.calibrate import calibrate
from wanda_dvc.stages.mask import mask
from wanda_dvc.stages.perplexity import perplexity
from wanda_dvc.stages.zero_shot import zero_shot
from wanda_dvc.study.project import Project

ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'wanda-dvc[ray]'")

from wanda_dvc.engine.cluster import Cluster, Task, TaskRunner  # noqa: E402 - it needs ray

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # Ray's own warnings

CPU = torch.device("cpu")
Make = Callable[..., Project]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """A cluster: a head without CPUs, and the nodes that tests add."""
    from ray.cluster_utils import Cluster as Nodes

    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    started = Nodes(initialize_head=True, head_node_args={"num_cpus": 0, "num_gpus": 0, "include_dashboard": False})
    ray.init(address=started.address, log_to_driver=False, configure_logging=False)
    yield started
    ray.shutdown()
    started.shutdown()


def set_nodes(nodes: Any, number: int) -> None:
    """Have so many nodes of one CPU."""
    for _ in range(number - len(nodes.worker_nodes)):
        nodes.add_node(num_cpus=1, num_gpus=0)
    for node in list(nodes.worker_nodes)[number:]:
        nodes.remove_node(node)


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    return torch.randint(0, 256, (37, 12), generator=torch.Generator().manual_seed(0))


def decoder(folder: Path) -> Decoder:
    return Decoder(folder, dtype=torch.float32, device=CPU)


def on_cluster(folder: Path) -> TaskRunner:
    cluster = Cluster("auto", device="cpu", folders=[folder])
    cluster.open()
    return TaskRunner(decoder=decoder(folder), cluster=cluster)


def change(run: Runner, block: int) -> Change:
    """A mask of every linear, and another norm."""
    keeps, weights = {}, {}
    with run.decoder.block(block):
        for name, linear in run.decoder.linears(block).items():
            keeps[name] = (linear.weight.abs() > linear.weight.abs().median()).clone()
        name = f"model.layers.{block}.input_layernorm"
        weights[name] = run.decoder.weights.of_block(block)[name].weight * 1.5
    return keeps, weights


def through(run: Runner, rows: torch.Tensor, *, with_dense: bool, kept: int = 0) -> Iterator[bytes]:
    """All bytes that stages write: of blocks that are measured and changed, of losses, and of a backward pass."""
    made = {block: change(run, block) for block in range(len(run.decoder.blocks))}
    for step in run.walk(rows, with_dense=with_dense, changes=made.__getitem__, kept=kept):
        yield dump(step.record(gram=True, crosses=with_dense))
        step.change(*made[step.index])
    if not with_dense:
        yield str(list(run.head(window_losses, {0: 1, 3: 0, 18: 0}))).encode()
        yield from map(dump_back, run.backward(rows[:7], gram=True))


def dump(found: Recorded) -> bytes:
    tensors = [x.upper.triu() for x in found.grams.values()] + list(found.crosses.values())
    tensors += [y for x in found.stats.inputs.values() for y in (x.sum_squares, x.sum)]
    return str(found.stats.readers).encode() + b"".join(x.numpy().tobytes() for x in tensors)


def dump_back(came: tuple[int, Gradients]) -> bytes:
    block, found = came
    tensors = [*found.sums.values(), *(x.upper.triu() for x in found.grams.values())]
    return f"{block} {[*found.sums]} {[*found.grams]}".encode() + b"".join(x.numpy().tobytes() for x in tensors)


@pytest.fixture(scope="module")
def expected(tiny: Path, rows: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, list[bytes]]:
    return {
        with_dense: list(
            through(LocalRunner(decoder(tiny), tmp_path_factory.mktemp("local")), rows, with_dense=with_dense)
        )
        for with_dense in (False, True)
    }


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("with_dense", [False, True])
def test_any_number_of_workers_gives_the_bytes_of_one_process(
    nodes: Any, tiny: Path, rows: torch.Tensor, expected: dict[bool, list[bytes]], workers: int, with_dense: bool
):
    set_nodes(nodes, workers)
    assert list(through(on_cluster(tiny), rows, with_dense=with_dense)) == expected[with_dense]
