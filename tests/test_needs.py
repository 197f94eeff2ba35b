"""The formulas of memory and disk: counts from a config alone, the terms of each stage, and the line before a stage."""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT, save_tiny_model
from test_families import save
from transformers import MambaConfig

from wanda_dvc.engine.checkpoint import Checkpoint
from wanda_dvc.engine.decoder import LOGITS_AT_A_TIME, Decoder
from wanda_dvc.engine.divergence import BYTES_A_TOKEN, TEMPORARIES
from wanda_dvc.engine.questions import ROW
from wanda_dvc.engine.rows import CALLS_BYTES
from wanda_dvc.engine.sizes import FIXED, Sizes, Walk
from wanda_dvc.stages import STAGES, needs
from wanda_dvc.stages.needs import NEEDS, SELECTION, TEXT_IN_MEMORY, Known, Need, continuing, need
from wanda_dvc.study.project import Project

CONFIGS = ROOT / "tests/configs"
# The tiny model of conftest: q and o, k and v, three of the feed-forward, two norms; embeddings (tied), a norm.
PRUNABLE = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48
BLOCK = PRUNABLE + 2 * 32
REST = 260 * 32 + 32
FEATURES = 4 * 32 + 2 * (32 + 16) + 3 * (32 + 48)
SQUARES = 6 * 32**2 + 48**2
LINEAR = 32 * 48


@pytest.fixture
def config_only(project: Callable[..., Project], tiny: Path) -> Callable[..., Project]:
    """A project whose models are config.json and nothing else."""

    def make(**changes: object) -> Project:
        made = project(**changes)
        for which in ("dense", "pruned"):
            made.model(which).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(tiny / "config.json", made.model(which) / "config.json")
        return made

    return make


def test_sizes_are_those_of_the_checkpoint_and_need_no_weights(tmp_path: Path, tiny: Path):
    shutil.copyfile(tiny / "config.json", tmp_path / "config.json")
    out_squares = 3 * 32**2 + 2 * 16**2 + 2 * 48**2
    found = Sizes(tmp_path)
    assert vars(found) == {
        "count": 4 * PRUNABLE,
        "prunable": PRUNABLE,
        "linear": LINEAR,
        "features": FEATURES,
        "widest": 48,
        "squares": SQUARES,
        "all_squares": 4 * SQUARES,
        "output_squares": out_squares,
        "all_output_squares": 4 * out_squares,
        "width": 4,
        "parameters": 4 * BLOCK + REST,
        "blocks": 4,
        "block": BLOCK,
        "rest": REST,
        "scored": 0,
        "hidden": 32,
        "vocabulary": 260,
        "dtype": "float32",
    }
    assert found.parameters * found.width == sum(entry.length for entry in Checkpoint(tiny).entries.values())


def test_an_untied_head_counts(tmp_path: Path):
    assert Sizes(save_tiny_model(tmp_path, tie_word_embeddings=False)).rest == REST + 260 * 32


@pytest.mark.parametrize(
    ("name", "parameters", "linears"),
    [
        ("llama-2-7b", 6_738_415_616, 6_476_005_376),
        ("llama-3.1-8b", 8_030_261_248, 6_979_321_856),
        ("llama-2-70b", 68_976_648_192, 68_451_041_280),
        ("smollm2-135m", 134_515_008, 106_168_320),
    ],
)
def test_parameters_are_those_of_the_models_cards(name: str, parameters: int, linears: int):
    found = Sizes(CONFIGS / f"{name}.json")
    assert found.parameters == parameters
    assert found.width == (4 if name == "smollm2-135m" else 2)
    assert found.count == linears


@pytest.mark.parametrize("family", ["gpt2", "gpt_oss"])
def test_inputs_and_outputs_of_transposed_weights_are_told_apart(family: str, tmp_path: Path):
    folder = save(family, tmp_path)
    decoder = Decoder(folder, dtype=torch.float32, device=torch.device("cpu"))
    linears = [linear for index in range(len(decoder.blocks)) for linear in decoder.linears(index).values()]
    outputs = [linear.weight.shape[1 if linear.transposed else 0] for linear in linears]
    found = Sizes(folder)
    assert found.all_squares == sum(linear.features**2 for linear in linears)
    assert found.all_output_squares == sum(size**2 for size in outputs)


def test_a_model_without_attention_is_counted(tmp_path: Path):
    MambaConfig(hidden_size=32, num_hidden_layers=3, vocab_size=260).save_pretrained(tmp_path)  # it knows no heads
    assert Sizes(tmp_path).blocks == 3


def test_the_memory_of_a_walk_does_not_grow_with_depth():
    model = Sizes(CONFIGS / "llama-2-7b.json")
    for device in ("cpu", "cuda"):
        deeper = copy.copy(model)
        deeper.parameters, deeper.blocks = 2 * model.parameters, 2 * model.blocks
        found = Walk(model, dtype="float16", length=2048, device=device)
        assert vars(found) == vars(Walk(deeper, dtype="float16", length=2048, device=device))
        assert found.mapped == (device == "cpu")
    assert not Walk(model, dtype="float32", length=2048).mapped


@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("float16", 2)])
def test_what_each_stage_needs(
    config_only: Callable[..., Project], monkeypatch: pytest.MonkeyPatch, dtype: str, width: int
):
    def needed(project: Project, stage: str, part: str = "") -> tuple[int, int]:
        """Memory beyond what is the same for all models, and disk."""
        found = need(project, stage, part)
        is_mapped = stage in ("calibrate", "perplexity", "zero-shot") and dtype == "float32"
        assert found.mapped == is_mapped * (2 * BLOCK + REST) * width
        return found.memory - FIXED, found.disk

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    project = config_only(dtype=dtype)  # 3 × 64 tokens to calibrate on, 4 × 64 to measure on
    walked = (2 * BLOCK + REST + LINEAR + 64 * FEATURES) * width
    assert needed(project, "calibrate") == (walked + 64 * 48 * 8, 3 * 64 * 32 * width * 2)
    assert needed(project, "mask") == (PRUNABLE + SELECTION * LINEAR, 4 * PRUNABLE // 8)
    assert needed(project, "apply") == (9 * LINEAR, (project.model("dense") / "config.json").stat().st_size)
    logits = 64 * 260 * (width + 8)
    slices = TEMPORARIES * 64 * 260
    hidden = 4 * 64 * 32 * width * 2
    assert needed(project, "perplexity", "pruned") == (walked + logits + slices + 64 * BYTES_A_TOKEN, hidden)
    assert needed(project, "perplexity", "dense")[1] == hidden + 4 * 64 * BYTES_A_TOKEN
    packed = (2 * BLOCK + REST + LINEAR + ROW * FEATURES) * width + ROW * 260 * (width + 8) + CALLS_BYTES["cpu"]
    assert needed(project, "zero-shot", "dense")[0] == packed
    cache = 2 * 4 * 64 * 32 * width
    whole = (4 * BLOCK + REST + LINEAR + 64 * FEATURES) * width + logits + cache
    assert continuing(Known(project), 64) == FIXED + whole
    monkeypatch.setenv("OMP_NUM_THREADS", "99")
    assert needed(project, "mask")[0] == PRUNABLE + SELECTION * PRUNABLE
    project = config_only(dtype=dtype, perplexity__windows=None)
    assert needed(project, "perplexity", "dense")[1] == 0  # not known yet
    project.data("perplexity/embedded").mkdir(parents=True)
    (project.data("perplexity/embedded") / "text.txt").write_text("x" * 4000)
    memory, disk = needed(project, "perplexity", "dense")
    assert memory == walked + logits + slices + 4000 * TEXT_IN_MEMORY + 64 * BYTES_A_TOKEN  # 15 windows are 15 shards
    assert disk == 1000 * (32 * width * 2 + BYTES_A_TOKEN)


def test_every_stage_that_computes_says_what_it_needs():
    assert list(NEEDS) == [name for name in STAGES if name not in ("plan", "download")]


def test_masks_of_pruned_inputs_take_a_walk_more(config_only: Callable[..., Project]):
    masks = need(config_only(), "mask")
    assert need(config_only(propagation="pruned", method="magnitude"), "mask") == masks
    project = config_only(propagation="pruned")
    walked, both = need(project, "calibrate"), need(project, "mask")
    assert both.memory == walked.memory + masks.memory - FIXED + BLOCK * 4  # a pruned block is no view
    assert both.mapped == walked.mapped
    assert both.disk == walked.disk + masks.disk


def test_each_tier_of_statistics_adds_its_own(config_only: Callable[..., Project]):
    once, gram, back = (
        need(config_only(calibration__statistics=tier), "calibrate") for tier in ("norms", "gram", "gradients")
    )
    assert gram.disk == once.disk + 4 * SQUARES  # half of them, in float16
    assert once.memory < gram.memory <= back.memory
    assert once.disk < gram.disk < back.disk


def test_rows_that_are_chosen_apart_need_no_more_than_some(config_only: Callable[..., Project], monkeypatch):
    monkeypatch.setattr("wanda_dvc.stages.needs.WEIGHTS_AT_A_TIME", 100)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    cases: list[tuple[dict[str, Any], int]] = [
        ({}, 100),
        ({"group": "linear"}, LINEAR),
        ({"group": "linear", "pattern": "2:4"}, 100),
        ({"method": "wanda-variant"}, LINEAR),
    ]
    for changes, scores in cases:
        assert need(config_only(**changes), "mask").memory == FIXED + PRUNABLE + SELECTION * scores


def test_logits_are_a_chunk_at_most(tiny: Path):
    assert Walk(Sizes(tiny), dtype="float32", length=2**20).logits == LOGITS_AT_A_TIME * 12


def test_before_there_is_a_config_only_what_is_known_is_said(
    project: Callable[..., Project], capsys: pytest.CaptureFixture[str]
):
    made = project()
    assert need(made, "calibrate") == Need()
    needs.announce(project=made, stage="calibrate")
    assert capsys.readouterr().err == ""


def test_one_line_says_it(
    config_only: Callable[..., Project], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    project = config_only()
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=3 * 64 * 32 * 4 * 2))
    monkeypatch.setattr(needs, "free_memory", lambda device: 1)  # too little memory is said, not refused
    needs.announce(project=project, stage="calibrate")
    needs_memory = f"{need(project, 'calibrate').memory / 1e9:.1f} GB of memory"
    assert capsys.readouterr().err == (
        f"calibrate needs about {needs_memory} and 0.1 MB of disk; free: 0.1 MB and 0.1 MB\n"
    )


def test_a_config_that_means_nothing_stops_no_stage(
    project: Callable[..., Project], capsys: pytest.CaptureFixture[str]
):
    made = project()
    made.model("dense").mkdir(parents=True)
    for content in ("{", '{"model_type": "abacus"}', "{}"):
        (made.model("dense") / "config.json").write_text(content)
        needs.announce(project=made, stage="calibrate")
    assert capsys.readouterr().err == ""
