"""Artifacts that do not belong together are refused, by the digests in their provenance, and nothing is replaced."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TEXTS, Factory, planned, save_tiny_model, text_of, tree, write_params
from safetensors import safe_open
from safetensors.torch import save_file

from wanda_dvc.errors import UserError
from wanda_dvc.stages import run
from wanda_dvc.study.project import Project

SETTINGS = {"calibration__statistics": "gram", "perplexity__windows": 2, "recipe": "wanda-refit"}


def made(root: Path, model: Path, texts: dict[str, str]) -> Project:
    """A study whose stages have run, with a reconstruction whose weights are stored, and with one from stats/."""
    root.mkdir()
    write_params(root, model, **SETTINGS, **texts)
    project = Project(root)
    for part in ("model", "calibration", "perplexity"):
        run("download", project=project, part=part, text=text_of(part))
    for name in ("calibrate", "mask", "apply"):
        run(name, project=project)
    run("perplexity", project=project, part="dense")
    return project


@pytest.fixture(scope="module")
def studies(tmp_path_factory: Factory, texts: dict[str, str]) -> dict[str, Path]:
    """A study, one of another model, and one with another calibration text."""
    folder = tmp_path_factory.mktemp("studies")
    models = [save_tiny_model(folder / f"tiny{seed}", seed=seed, num_hidden_layers=2) for seed in (0, 1)]
    calibration, other = (texts[f"{name}__source"] for name in TEXTS)
    given = {
        "own": (models[0], texts),
        "model": (models[1], texts),
        "text": (models[0], texts | {f"{TEXTS[0]}__source": other, f"{TEXTS[1]}__source": calibration}),
    }
    return {name: made(folder / name, *words).root for name, words in given.items()}


@pytest.mark.parametrize(
    ("stage", "part", "taken", "of", "says"),
    [
        ("calibrate", "", "data/perplexity/embedded>data/calibration", "own", "made by download perplexity"),
        ("mask", "", "stats", "model", "stats/: made from tiny1"),
        ("mask-pruned", "", "data/calibration", "text", "stats/: made from calibration.txt"),
        ("apply", "", "masks", "model", "masks/: made from tiny1"),
        ("apply", "", "stats", "text", "stats/gram: found 2 blocks of tiny0, expected"),
        ("perplexity", "pruned", "reference", "model", "reference/embedded: measured with dense"),
        ("perplexity", "pruned", "reference", "text", "reference/embedded: measured with tokens"),
        ("perplexity", "pruned", "models/dense>models/pruned", "own", "made by download model, expected apply"),
    ],
)
def test_an_artifact_of_other_inputs_is_refused(
    studies: dict[str, Path], tmp_path: Path, stage: str, part: str, taken: str, of: str, says: str
):
    root = shutil.copytree(studies["own"], tmp_path / "study")
    source, _, target = taken.partition(">")
    shutil.rmtree(root / (target or source))
    shutil.copytree(studies[of] / source, root / (target or source))
    project = Project(root)
    if stage == "mask-pruned":
        stage, project = "mask", project.with_params(project.params.model_copy(update={"propagation": "pruned"}))
        planned(project)
    before = tree(root)
    with pytest.raises(UserError, match=says):
        run(stage, project=project, part=part)
    assert tree(root) == before


def spoiled(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a block's file; its header stays."""
    with safe_open(path, framework="pt") as file:
        header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    change(tensors)
    save_file(tensors, path, header)


@pytest.mark.parametrize(
    ("stage", "recipe", "folder", "says"),
    [
        ("mask", "wanda", "stats/norms", "stats/norms/block_001.safetensors: damaged: found values of .* not finite"),
        ("mask", "admm", "stats/gram", "stats/gram/block_001.safetensors: damaged: found values of .* not finite"),
        ("apply", "wanda-refit", "stats/gram", "stats/gram/block_001.safetensors: damaged: found values of .* not fin"),
        ("apply", "paper-refit", "weights", "weights/block_001.safetensors: damaged: found values of .* not finite"),
    ],
)
def test_values_that_are_not_finite_are_refused_before_the_earlier_output_is_replaced(
    studies: dict[str, Path], tmp_path: Path, stage: str, recipe: str, folder: str, says: str
):
    root = shutil.copytree(studies["own"], tmp_path / "study")
    project = Project(root)
    changes = {"recipe": recipe} if recipe != "paper-refit" else {"propagation": "pruned"}
    project = planned(project.with_params(project.params.model_copy(update=changes)))
    if recipe == "paper-refit":
        run("mask", project=project)
        run("apply", project=project)
    spoiled(root / folder / "block_001.safetensors", lambda x: [t.view(-1)[:1].fill_(float("nan")) for t in floats(x)])
    before = tree(root)
    with pytest.raises(UserError, match=says):
        run(stage, project=project)
    assert tree(root) == before


def floats(tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [x for x in tensors.values() if x.is_floating_point() and x.dim()]


@pytest.mark.parametrize(
    ("stage", "spoil", "says"),
    [
        ("mask", lambda root: (root / "stats/norms/block_001.safetensors").unlink(), "found 1 blocks, expected 2"),
        ("apply", lambda root: (root / "masks/block_000.safetensors").unlink(), "found 1 blocks, expected 2"),
        ("apply", lambda root: (root / "masks/block_000.safetensors").write_bytes(b"x"), "masks/block_000.*: damaged"),
        ("apply", lambda root: (root / "masks/provenance.json").write_text("{"), "provenance.json: found no JSON"),
        ("apply", lambda root: (root / "masks/provenance.json").unlink(), "masks/provenance.json: missing; run `dvc"),
    ],
)
def test_a_block_that_is_missing_or_damaged_is_refused(
    studies: dict[str, Path], tmp_path: Path, stage: str, spoil: Callable[[Path], object], says: str
):
    root = shutil.copytree(studies["own"], tmp_path / "study")
    spoil(root)
    before = tree(root)
    with pytest.raises(UserError, match=says):
        run(stage, project=Project(root))
    assert tree(root) == before


def test_no_provenance_names_a_time_a_host_or_a_path(studies: dict[str, Path]):
    for path in studies["own"].rglob("provenance.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        assert str(studies["own"].parent) not in path.read_text(encoding="utf-8")
        assert content["made_by"]
