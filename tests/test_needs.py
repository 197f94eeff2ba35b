"""The formulas of memory and disk: counts from a config alone, the terms of each stage, and the line before a stage."""

import copy
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from cases.grids import named
from conftest import ROOT, Capture, Make, Patch, calibrate, fetch, mask_and_apply
from estimates import requirements
from families import save

from wanda_dvc.commands.doctor import doctor
from wanda_dvc.engine.activations import ActivationStore
from wanda_dvc.engine.checkpoint import Checkpoint
from wanda_dvc.engine.decoder import Decoder
from wanda_dvc.engine.memory import FIXED, ForwardMemory, ModelSizes
from wanda_dvc.engine.structure import build_empty
from wanda_dvc.errors import UserError
from wanda_dvc.stages import STAGES, needs, run
from wanda_dvc.stages.mask import mask
from wanda_dvc.stages.needs import MEMORY_AND_DISK, Requirements
from wanda_dvc.study.folder import ITEMS, TEXT, Study
from wanda_dvc.study.tensors import read_masks

CONFIGS = ROOT / "tests/configs"


def needed(study: Study, stage: str) -> Requirements:
    return requirements(study, stage, ModelSizes.read(study.model("dense")))


@pytest.fixture
def config_only(study: Make, tiny: Path) -> Make:
    """A study whose models are config.json and nothing else."""

    def make(**changes: object) -> Study:
        made = study(**changes)
        for which in ("dense", "pruned"):
            made.model(which).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(tiny / "config.json", made.model(which) / "config.json")
        return made

    return make


def test_sizes_need_no_weights(tmp_path: Path, tiny: Path):
    shutil.copyfile(tiny / "config.json", tmp_path / "config.json")
    found, stored = ModelSizes.read(tmp_path), Checkpoint(tiny).entries
    assert found.parameters * found.itemsize == sum(entry.length for entry in stored.values())
    linears = [entry.length for name, entry in stored.items() if name.endswith("proj.weight")]
    assert found.linear_weights * found.itemsize == sum(linears)


@pytest.mark.parametrize(
    ("name", "parameters", "linears"),
    [
        ("llama-2-7b", 6_738_415_616, 6_476_005_376),
        ("llama-3.1-8b", 8_030_261_248, 6_979_321_856),
        ("smollm2-135m", 134_515_008, 106_168_320),
    ],
)
def test_parameters_are_those_of_the_models_cards(name: str, parameters: int, linears: int):
    found = ModelSizes.read(CONFIGS / f"{name}.json")
    assert found.parameters == parameters
    assert found.itemsize == (4 if name == "smollm2-135m" else 2)
    assert found.linear_weights == linears


@pytest.mark.parametrize("family", ["gpt2", "gpt_oss"])
def test_inputs_and_outputs_of_transposed_weights_are_told_apart(family: str, tmp_path: Path):
    folder = save(family, tmp_path)
    decoder = Decoder(folder, dtype=torch.float32, device=torch.device("cpu"))
    linears = [linear for index in range(len(decoder.blocks)) for linear in decoder.linears(index).values()]
    outputs = [linear.weight.shape[1 if linear.transposed else 0] for linear in linears]
    found = ModelSizes(decoder.model, folder)
    assert found.all_input_squares == sum(linear.features**2 for linear in linears)
    assert found.all_output_squares == sum(size**2 for size in outputs)


def test_the_memory_of_a_walk_does_not_grow_with_depth():
    model = ModelSizes.read(CONFIGS / "llama-2-7b.json")
    deeper = copy.copy(model)
    deeper.parameters, deeper.blocks = 2 * model.parameters, 2 * model.blocks
    memory = ForwardMemory(model, dtype="float16", length=2048)
    assert vars(memory) == vars(ForwardMemory(deeper, dtype="float16", length=2048))


def test_every_stage_with_a_model_says_what_it_needs():
    assert list(MEMORY_AND_DISK) == [name for name in STAGES if name not in ("plan", "download", "mask", "apply")]


def test_all_gpus_are_of_one_kind(config_only: Make):
    one, other = (needed(config_only(runtime__device=device), "perplexity") for device in ("cuda", "cuda:1"))
    assert one == other


@pytest.fixture
def hidden_states(monkeypatch: Patch) -> list[int]:
    """The bytes of hidden states on disk, after each write."""
    held, write = list[int](), ActivationStore.write

    def counted(states: ActivationStore, *words: Any) -> None:
        write(states, *words)
        held.append(sum(path.stat().st_size for path in states.folder.parent.glob("*/[0-9]*")))

    monkeypatch.setattr(ActivationStore, "write", counted)
    return held


def written(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


@pytest.mark.parametrize("kind", ["norms", "gram", "fisher"])
def test_a_calibration_takes_the_disk_that_is_said(kind: str, study: Make, hidden_states: list[int]):
    """The formula counts a Gram matrix for each linear; those with one input share it. Norms are not counted."""
    made = fetch(study(calibration__statistics=kind), "model", "calibration")
    calibrate(study=made)
    found = max(hidden_states) + written(made.root / "stats") - written(made.norms)
    assert found <= needed(made, "calibrate").disk <= 1.1 * found


def test_the_dense_models_reference_takes_the_disk_that_is_said(study: Make, hidden_states: list[int]):
    made = fetch(study(), "model", "perplexity")
    run("perplexity", study=made, variant="dense")
    found = max(hidden_states) + written(made.reference("embedded"))
    assert needed(made, "perplexity").disk == pytest.approx(found, rel=0.02)


def test_the_disk_is_that_of_what_is_written(calibrated_study: Make):
    made = mask_and_apply(calibrated_study())
    kept = sum(keep.numel() for block in range(2) for keep in read_masks(made.masks, block).values())
    assert needed(made, "mask").disk == kept // 8  # without the files' headers
    written = sum(path.stat().st_size for path in made.model("pruned").glob("*.safetensors"))
    assert needed(made, "apply").disk == pytest.approx(written, rel=0.1)


@pytest.mark.parametrize("settings", [{"pattern": "blocks", "sparsity": 0.25}, {"propagation": "pruned"}], ids=named)
def test_a_mask_takes_the_disk_that_is_said(settings: dict[str, Any], study: Make, hidden_states: list[int]):
    made = fetch(study(recipe="wanda-refit", **settings))
    calibrate(study=made)
    hidden_states.clear()
    mask(study=made)
    stored = ModelSizes.read(made.model("dense")).stored * made.params.plan.propagates
    kept = sum(keep.numel() for block in range(4) for keep in read_masks(made.masks, block).values())
    assert needed(made, "mask").disk == max(hidden_states) + stored + kept // 8


def test_a_recovery_needs_the_memory_of_its_text(config_only: Make):
    made = config_only(recovery__tokens=512)
    text = made.data("calibration") / TEXT
    text.parent.mkdir(parents=True)
    text.touch()
    os.truncate(text, 10**9)
    assert needed(made, "recover").memory == FIXED + needs.TEXT_IN_MEMORY * 10**9 + 3 * 8 * 512


def test_zero_shot_needs_the_memory_of_all_questions(config_only: Make):
    made = config_only(tasks__names=["piqa", "boolq"])
    before = needed(made, "zero-shot").memory
    for name in ("piqa", "boolq"):
        items = made.data("tasks") / name / ITEMS
        items.parent.mkdir(parents=True)
        items.touch()
        os.truncate(items, 10**9)
    assert needed(made, "zero-shot").memory - before == pytest.approx(needs.ITEMS_IN_MEMORY * 2 * 10**9, rel=0.01)


def test_one_line_says_it(config_only: Make, capsys: Capture, monkeypatch: Patch):
    study = config_only()
    sizes = ModelSizes.read(study.model("dense"))
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=3 * 64 * 32 * 4 * 2))
    monkeypatch.setattr(needs, "free_memory_of", lambda device: 1)  # too little memory is said, not refused
    needs.announce(study, "calibrate", sizes)
    needs_memory = f"{needed(study, 'calibrate').memory / 1e9:.1f} GB of memory"
    expected = f"calibrate needs about {needs_memory} and 0.1 MB of disk; free: 0.1 MB and 0.1 MB\n"
    assert capsys.readouterr().err == expected


def test_a_broken_formula_is_an_error_and_a_missing_config_is_the_users(study: Make, monkeypatch: Patch):
    made = study()
    with pytest.raises(UserError, match="config.json: missing"):
        needed(made, "calibrate")
    assert "run `dvc repro download-model` first" in doctor(start=made.root)[0]
    fetch(made, "model", "calibration")
    monkeypatch.setattr(needs, "free", lambda study: study.no_such_attribute)
    with pytest.raises(AttributeError, match="no_such_attribute"):  # it printed nothing, for ever
        calibrate(study=made)


@pytest.mark.parametrize("stage", ["calibrate", "perplexity"])
def test_a_stage_builds_the_empty_model_once(study: Make, monkeypatch: Patch, stage: str):
    made, built = fetch(study()), mock.Mock(wraps=build_empty)
    for module in ("structure", "decoder"):
        monkeypatch.setattr(f"wanda_dvc.engine.{module}.build_empty", built)
    run(stage, study=made, variant="dense" if stage == "perplexity" else "norms")
    built.assert_called_once()


@pytest.mark.parametrize(("recipe", "stores_grams"), [("sparsegpt-paper", False), ("sparsegpt", True), ("admm", True)])
def test_solvers_on_pruned_blocks_need_no_room_for_all_grams(recipe: str, stores_grams: bool, study: Make, tiny: Path):
    solver = needs.solver_requirements(study(recipe=recipe), ModelSizes.read(tiny))
    assert solver
    assert solver.memory > 0
    assert (solver.disk > 0) == stores_grams
