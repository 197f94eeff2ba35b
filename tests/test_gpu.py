"""Every stage computes on a GPU what it computes on the CPU, and mixes tensors of neither: on a simulated GPU."""

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, calibrate, planned, save_tiny_model, text_of, write_params
from safetensors.torch import load_file
from simulated_gpu import simulated_gpu
from test_families import RECORDED, save

from wanda_dvc.catalog import RECIPES
from wanda_dvc.stages.apply import apply
from wanda_dvc.stages.download import download
from wanda_dvc.stages.mask import mask
from wanda_dvc.stages.perplexity import perplexity
from wanda_dvc.stages.zero_shot import zero_shot
from wanda_dvc.study.project import Project

UNITS = [{"pattern": pattern, "sparsity": 0.25} for pattern in ("neurons", "heads", "blocks")]
SHORT = ("gpt2", "mixtral")  # their weights are stored across, or are experts


def ran(folder: Path, model: Path, kind: str, settings: dict[str, Any], *, asks: bool) -> Project:
    """A study in which every stage has run on a kind of device."""
    folder.mkdir()
    write_params(folder, model, calibration__statistics="gradients", runtime__device=kind, **settings)
    project = planned(Project(folder))
    for part in ("model", "calibration", "perplexity", "tasks"):
        download(project=project, part=part, text=text_of(part))
    with simulated_gpu() if kind == "cuda" else contextlib.nullcontext():
        calibrate(project=project)
        perplexity(project=project, model="dense", text="embedded")
        mask(project=project)
        apply(project=project)
        perplexity(project=project, model="pruned", text="embedded")
        if asks:
            zero_shot(project=project, model="pruned")
    return project


def check_alike(tmp_path: Path, model: Path, settings: dict[str, Any], *, asks: bool = False) -> None:
    """Hold a GPU's results to the CPU's: masks are equal; sums in another order are 1e-3 off at most."""
    host, card = (ran(tmp_path / kind, model, kind, settings, asks=asks).root for kind in ("cpu", "cuda"))
    for path in (path.relative_to(host) for path in host.rglob("*.safetensors") if path.parts[-2] != "reference"):
        one, other = load_file(host / path), load_file(card / path)
        assert one.keys() == other.keys()
        for name, x in one.items():
            if path.parts[0] == "masks":
                assert torch.equal(other[name], x), name
            elif x.is_floating_point() and path.parts[0] in ("stats", "models"):
                torch.testing.assert_close(other[name], x, rtol=1e-3, atol=1e-3 * float(x.abs().max()))
    for path in (path.relative_to(host) for path in (host / "metrics").rglob("*.json")):
        one, other = (values(json.loads((root / path).read_text())) for root in (host, card))
        assert one.keys() == other.keys()
        for name, x in one.items():
            assert other[name] == (pytest.approx(x, rel=1e-3, abs=1e-3) if isinstance(x, float) else x), (path, name)


def values(found: Any, where: str = "") -> dict[str, Any]:
    """All values of a JSON file, by their place."""
    if isinstance(found, dict):
        return {key: x for name, one in found.items() for key, x in values(one, f"{where}.{name}").items()}
    return {where: found}


@pytest.mark.parametrize("settings", [*({"recipe": name} for name in RECIPES), *UNITS], ids=str)
def test_every_stage_of_every_recipe_and_pattern(tmp_path: Path, texts: dict[str, str], settings: dict[str, Any]):
    model = save_tiny_model(tmp_path / "model", num_hidden_layers=2)
    check_alike(tmp_path, model, texts | settings, asks=settings == {"recipe": "wanda"})


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in SHORT else pytest.mark.full) for name in RECORDED]
)
def test_every_family(family: str, tmp_path: Path, texts: dict[str, str]):
    check_alike(tmp_path, save(family, tmp_path / "model"), texts | {"recipe": "wanda-refit"})


def test_the_experts_that_go(tmp_path: Path, texts: dict[str, str]):
    check_alike(tmp_path, save("mixtral", tmp_path / "model"), texts | {"pattern": "experts", "sparsity": 0.25})


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


def test_what_only_a_gpu_has_is_called_in_one_module():
    calls = re.compile(
        r"torch\.(cuda|mps|backends\.(cuda|cudnn|mps))\b|pin_memory|record_stream|wait_stream|mem_get_info"
    )
    package = ROOT / "src/wanda_dvc"
    found = [path for path in package.rglob("*.py") if calls.search(path.read_text(encoding="utf-8"))]
    assert found == [package / "engine/accelerator.py"]
