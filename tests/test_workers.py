"""Stages on a real cluster of Ray: several nodes on this machine, one of which dies in every stage."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_tiny_model
from safetensors.torch import load_file, save_file

from wanda_dvc.engine.workers import RayCrew
from wanda_dvc.errors import UserError
from wanda_dvc.stages.apply import apply
from wanda_dvc.stages.calibrate import calibrate
from wanda_dvc.stages.download import download
from wanda_dvc.stages.mask import mask
from wanda_dvc.stages.perplexity import perplexity
from wanda_dvc.stages.zero_shot import zero_shot
from wanda_dvc.study.project import Project

ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'wanda-dvc[ray]'")

from wanda_dvc.engine import pool, questions  # noqa: E402 - they need no ray, but this file does

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # Ray's own warnings

Make = Callable[..., Project]
MADE = ("stats", "masks", "weights", "metrics")
PROPAGATED = {"propagation": "corrected", "reconstruction": "fisher"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head without CPUs, and the nodes that tests add."""
    from ray.cluster_utils import Cluster

    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "num_gpus": 0, "include_dashboard": False})
    ray.init(address=started.address, log_to_driver=False, configure_logging=False)
    yield started
    ray.shutdown()
    started.shutdown()


@pytest.fixture
def nodes(cluster: Any) -> Iterator[list[Any]]:
    """Three nodes of one CPU."""
    added = [cluster.add_node(num_cpus=1, num_gpus=0) for _ in range(3)]
    yield added
    for node in cluster.worker_nodes.copy():
        cluster.remove_node(node)


def run(study: Project) -> dict[str, bytes]:
    """Run the stages that go through blocks, and the one between them; what they made."""
    calibrate(project=study)
    mask(project=study)
    apply(project=study)
    perplexity(project=study, model="pruned")
    zero_shot(project=study, model="pruned")
    found = (path for name in MADE for path in study.root.glob(f"{name}/**/*") if path.is_file())
    return {str(path.relative_to(study.root)): path.read_bytes() for path in found}


@pytest.mark.full  # the pool's own tests hold each stage to the bytes of one process
def test_every_artifact_is_the_same_though_a_node_dies_in_every_stage(
    project: Make, cluster: Any, nodes: list[Any], monkeypatch: pytest.MonkeyPatch
):
    tiers = {"calibration__statistics": "fisher"}
    settings = {"calibration__samples": 20} | tiers | PROPAGATED
    monkeypatch.setattr(questions, "ROW", 60)  # rows enough for every node
    alone = project(**settings)
    for part in ("model", "calibration", "perplexity", "tasks"):
        download(project=alone, part=part)
    expected = run(alone)
    for name in (*MADE, alone.answers.folder):
        shutil.rmtree(alone.root / name)
    real, killed = pool.Pool.run, []

    def killing(self: pool.Pool, method: str, block: int, *words: Any) -> Iterator[Any]:
        """Kill a node while its shards go through the third block, once in each stage; on the way back, through it."""
        for number, found in enumerate(real(self, method, block, *words)):
            if (number, block) == (0, 5 if method == "back" else 2) and len(cluster.worker_nodes) == 3:
                killed.append(method)
                (node,) = (one for one in cluster.worker_nodes if f"node {one.node_id[:8]}" in self._homes[1].name)
                cluster.remove_node(node, allow_graceful=False)
            yield found
        if block in (3, 7) and len(cluster.worker_nodes) < 3:
            cluster.add_node(num_cpus=1)

    monkeypatch.setattr(pool.Pool, "run", killing)
    assert run(project(runtime__ray="auto", **settings)) == expected
    assert killed == ["record", "back", "record", "advance", "advance"]


def test_a_solvers_masks_are_the_same_though_a_node_dies(
    project: Make, cluster: Any, nodes: list[Any], monkeypatch: pytest.MonkeyPatch
):
    settings = {"calibration__samples": 4, "calibration__statistics": "gram", "method": "admm"}
    alone = project(**settings)
    for part in ("model", "calibration"):
        download(project=alone, part=part)
    calibrate(project=alone)
    mask(project=alone)
    expected = {path.name: path.read_bytes() for path in alone.masks.iterdir()}
    shutil.rmtree(alone.masks)
    real = pool.Staff._first

    def killing(self: pool.Staff, given: Any) -> Any:
        """Kill the node whose job is waited for, once."""
        if len(cluster.worker_nodes) == 3 and len(given) == 6:
            (node,) = (one for one in cluster.worker_nodes if f"node {one.node_id[:8]}" in given[0].worker.name)
            cluster.remove_node(node, allow_graceful=False)
        return real(self, given)

    monkeypatch.setattr(pool.Staff, "_first", killing)
    study = project(runtime__ray="auto", **settings)
    mask(project=study)
    assert {path.name: path.read_bytes() for path in study.masks.iterdir()} == expected
    assert len(cluster.worker_nodes) == 2


def test_a_card_that_no_node_has_is_told_before_a_worker_starts(nodes: list[Any]):
    with pytest.raises(UserError, match="runtime.device: got cuda with workers of auto, expected a node with a GPU"):
        RayCrew("auto", device="cuda")


def test_an_error_on_a_worker_is_ours_with_the_nodes_name(project: Make, tmp_path: Path, nodes: list[Any]):
    folder = save_tiny_model(tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    study = project(folder, calibration__samples=20, runtime__ray="auto")
    for part in ("model", "calibration"):
        download(project=study, part=part)
    said = r"^worker on \S+ \(node [0-9a-f]{8}\): .*block 2, output of .*: activations that are not finite"
    with pytest.raises(UserError, match=said):
        calibrate(project=study)
