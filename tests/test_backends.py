"""The code for a GPU, and tasks of a cluster, compute what one process computes on the CPU.

The GPU is simulated. It has the CPU's kernels, so its results show the code's own branches for a GPU, and an operation
that mixes its tensors with the host's fails; `make gpu` compares a real GPU's results. Tasks run in this process, on
pickled copies of their inputs.
"""

import contextlib
import importlib
import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from cases.grids import OF_WEIGHTS, named, pairs
from conftest import MADE, Make, Patch, calibrate, fetch, interrupted, run_blocks, save_tiny_model, tree, write_params
from families import RECORDED, save
from inline import Inline
from safetensors.torch import load_file
from simulated_gpu import simulated_gpu

from wanda_dvc.catalog import RECIPES, RECONSTRUCTIONS
from wanda_dvc.engine.sequences import SMALLEST_CHUNK
from wanda_dvc.params import flatten
from wanda_dvc.stages import inputs
from wanda_dvc.study import tensors
from wanda_dvc.study.folder import Study

stage: Any = importlib.import_module("wanda_dvc.stages.mask")
Settings = dict[str, Any]
SOLVED = [name for name, row in RECONSTRUCTIONS.items() if row.function]
REFIT: Settings = {"recipe": "wanda-refit"}
EXPERTS: Settings = {"pattern": "experts", "sparsity": 0.25}
CHOICES: list[Settings] = [
    *({"recipe": name} for name in RECIPES),
    {"recipe": "admm", "pattern": "2:4"},
    *(REFIT | {"pattern": pattern} for pattern in ("neurons", "heads", "blocks")),
    {"method": "sparsegpt", "propagation": "pruned", "pattern": "2:4"},
    REFIT | {"propagation": "pruned", "pattern": "neurons"},
    *(
        {"method": method, "reconstruction": SOLVED[index % len(SOLVED)], "propagation": "pruned"}
        for index, method in enumerate(OF_WEIGHTS)
    ),
    EXPERTS,
]


def ran(folder: Path, family: str, settings: Settings, backend: str, *, asks: bool = False) -> tuple[Study, Inline]:
    """A study in which every stage has run on a backend, and the tasks that ran."""
    folder.mkdir()
    model = folder / "model"
    _ = save_tiny_model(model, num_hidden_layers=2) if family == "llama" else save(family, model)
    device = "cuda" if backend == "gpu" else "cpu"
    write_params(folder, model, calibration__statistics="fisher", runtime__device=device, **settings)
    study, cluster = fetch(Study(folder)), Inline()
    if asks:
        fetch(study, "tasks")
    with contextlib.ExitStack() as stack:
        if backend == "gpu":
            stack.enter_context(simulated_gpu())
            # A CPU's chunks. Sums in another order may round a stored 16-bit number the other way, and so a mask.
            stack.enter_context(mock.patch.dict(SMALLEST_CHUNK, cuda=1))
        if backend == "tasks":
            stack.enter_context(mock.patch.object(inputs, "cluster", return_value=cluster))
        run_blocks(study, asks=asks)
    return study, cluster


ALIKE = 1e-4  # float32's 1.2e-7, for sums in another order, times what solvers make of it


def about(x: Any) -> Any:
    """What equals this content of a file up to the order of sums."""
    if isinstance(x, list):
        return [about(value) for value in x]
    if isinstance(x, dict):
        return {name: about(value) for name, value in x.items()}
    return pytest.approx(x, rel=ALIKE, abs=ALIKE) if isinstance(x, float) else x


def check_alike(host: Path, card: Path) -> None:
    """Hold a GPU's results to the CPU's: masks are equal, and numbers up to the order of sums."""
    for path in (path.relative_to(host) for path in host.rglob("*.safetensors")):
        expected, actual = load_file(host / path), load_file(card / path)
        assert expected.keys() == actual.keys()
        for name, x in expected.items():
            if path.parts[0] == "masks":
                assert torch.equal(actual[name], x), name
            elif x.is_floating_point() and path.parts[0] in ("stats", "models"):
                torch.testing.assert_close(actual[name], x, rtol=ALIKE, atol=ALIKE * float(x.abs().max()))
    for path in (path.relative_to(host) for path in (host / "metrics").rglob("*.json")):
        expected, actual = (dict(flatten(json.loads((root / path).read_text()))) for root in (host, card))
        assert expected.keys() == actual.keys()
        for name, x in expected.items():
            assert actual[name] == about(x), (path, name)


# Every choice on one family, and every family with one choice.
ROWS = pairs(["gpu", "tasks"], CHOICES, RECORDED, allowed=lambda _, settings, family:
             settings is REFIT or family == ("mixtral" if settings is EXPERTS else "llama"))  # fmt: skip
SHORT = [("gpu", REFIT, "gpt2"), ("tasks", REFIT, "llama")]


@pytest.mark.parametrize(
    ("backend", "settings", "family"),
    [*SHORT, *(pytest.param(*row, marks=pytest.mark.full) for row in ROWS if row not in SHORT)],
    ids=named,
)
def test_every_backend_gives_what_one_process_gives(
    backend: str, settings: Settings, family: str, texts: Settings, tmp_path: Path
):
    asks = settings == {"recipe": "fisher"}
    host, _ = ran(tmp_path / "plain", family, texts | settings, "plain", asks=asks)
    ran_elsewhere, cluster = ran(tmp_path / backend, family, texts | settings, backend, asks=asks)
    if backend == "gpu":
        check_alike(host.root, ran_elsewhere.root)
    else:
        assert tree(ran_elsewhere.root, *MADE) == tree(host.root, *MADE)
        assert cluster.ran


def test_an_interrupted_mask_of_tasks_solves_the_unfinished_blocks_alone(calibrated_study: Make, monkeypatch: Patch):
    restarted, cluster = calibrated_study(method="admm"), Inline()
    stage.mask(study=restarted)
    expected = tree(restarted.masks)
    shutil.rmtree(restarted.masks)
    monkeypatch.setattr(inputs, "cluster", lambda *_: cluster)
    with interrupted(tensors, "write_masks", at=1):  # the second block's
        stage.mask(study=restarted)
    cluster.ran.clear()
    stage.mask(study=restarted)
    assert tree(restarted.masks) == expected
    assert [name for name, _ in cluster.ran] == [f"solver {number}" for number in range(4)]  # of the second block alone


@pytest.mark.parametrize("here", [False, True])
def test_a_stopped_calibration_of_tasks_resumes_at_its_block(calibrated_study: Make, monkeypatch: Patch, here: bool):
    """In this process too: the files are the same."""
    restarted, cluster = calibrated_study(), Inline()
    expected, stats = tree(restarted.root / "stats"), importlib.import_module("wanda_dvc.stages.calibrate")
    shutil.rmtree(restarted.root / "stats")
    in_tasks = mock.patch.object(inputs, "cluster", return_value=Inline())
    with in_tasks, interrupted(tensors, "write_stats", at=1):
        stats.calibrate(study=restarted, statistics="norms")
    if not here:
        monkeypatch.setattr(inputs, "cluster", lambda *_: cluster)
    stats.calibrate(study=restarted, statistics="norms")
    assert bool(cluster.ran) != here
    assert not [name for name, _ in cluster.ran if name.startswith("block 0, chunk")]
    calibrate(study=restarted)
    assert tree(restarted.root / "stats") == expected


def test_the_simulated_gpu_refuses_mixed_operations():
    with simulated_gpu():
        card, host = torch.ones(2, 3, device="cuda"), torch.ones(2, 3)
        assert (str(card.device), card.is_cuda, str((card * 2).device)) == ("cuda:0", True, "cuda:0")
        for mixed in (
            lambda: card + host,
            lambda: host.add_(card),
            lambda: torch.cat([card, host]),
            lambda: card @ host.T,
            lambda: host[torch.tensor([0], device="cuda")],
        ):
            with pytest.raises(RuntimeError, match="same device"):
                mixed()
        assert torch.equal((card + host.sum()).cpu(), host + 6)  # one number of the host is taken
