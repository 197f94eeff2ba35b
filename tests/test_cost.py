"""What a study costs on paper, against torch's own count, the models' cards and what was measured."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, save_tiny_model, write_params
from test_families import save
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, MambaConfig
from typer.testing import CliRunner

from wanda_dvc.cli import app
from wanda_dvc.engine.costs import CPU_EFFICIENCY, DEVICES, HOST, NETWORK, Device, Setting, work
from wanda_dvc.engine.decoder import Decoder
from wanda_dvc.engine.sizes import choosing, sizes, walking, writing
from wanda_dvc.errors import UserError
from wanda_dvc.params import Params
from wanda_dvc.stages import STAGES
from wanda_dvc.study.project import Project
from wanda_dvc.views import cost

CONFIGS = ROOT / "tests/configs"


@pytest.fixture
def params(tmp_path: Path) -> Params:
    """Of docs/experiments.md: 32 × 2,048 tokens to calibrate on, 16 × 2,048 to measure on."""
    changes = {"calibration__samples": 32, "calibration__length": 2048, "perplexity__length": 2048}
    write_params(tmp_path, CONFIGS, **changes, perplexity__windows=16)
    return Project(tmp_path).params


def test_flops_are_those_that_torch_counts(tmp_path: Path):
    folder = save_tiny_model(tmp_path, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(3, 64, dtype=torch.long))
    through = work(folder)
    causal_half = 2 * 3 * 64 * 64 * through.pairs  # torch multiplies the other half too
    rotary = counter.get_flop_counts()["Global"][torch.ops.aten.bmm] - 2 * causal_half  # the angles of the positions
    assert 0 <= rotary < 0.001 * causal_half + 64 * 64
    assert counter.get_total_flops() - rotary == through.flops(3, 64, logits=3 * 64) + causal_half


def test_a_small_models_parameters_are_not_nothing(tmp_path: Path):
    write_params(tmp_path, CONFIGS)
    folder = save_tiny_model(tmp_path / "tiny")
    table = cost.cost(start=tmp_path, config=folder)
    count = sizes(folder).parameters
    assert f"{count / 1e3:.2f} k parameters" in table
    assert " 0.00 " not in table
    assert "134.52 M parameters" in cost.cost(start=tmp_path, config=CONFIGS / "smollm2-135m.json")


def test_an_experiment_adds_weights_where_they_do_not_follow_from_its_masks(tmp_path: Path):
    trained = {"method": "admm", "reconstruction": "block", "propagation": "corrected"}
    for changes, added in (
        ({}, "0.81 GB to the cache (its masks)"),
        (trained, "14.29 GB to the cache (its masks and weights)"),
    ):
        write_params(tmp_path, CONFIGS, **changes)
        assert f"One more experiment adds {added} and" in cost.cost(start=tmp_path, config=CONFIGS / "llama-2-7b.json")


@pytest.mark.parametrize("device", DEVICES)
def test_every_device_has_an_estimate(tmp_path: Path, device: str):
    write_params(tmp_path, CONFIGS)
    table = cost.cost(start=tmp_path, config=CONFIGS / "llama-2-7b.json", device=device, dtype="float16")
    assert f"{DEVICES[device].name}: " in table


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
    config = CONFIGS / f"{name}.json"
    assert sizes(config).parameters == parameters
    assert work(config).linears == linears


@pytest.mark.parametrize("family", ["gpt2", "gpt_oss"])
def test_inputs_and_outputs_of_transposed_weights_are_told_apart(family: str, tmp_path: Path):
    folder = save(family, tmp_path)
    decoder = Decoder(folder, dtype=torch.float32, device=torch.device("cpu"))
    linears = [linear for index in range(len(decoder.blocks)) for linear in decoder.linears(index).values()]
    outputs = [linear.weight.shape[1 if linear.transposed else 0] for linear in linears]
    found = sizes(folder)
    assert found.all_squares == sum(linear.features**2 for linear in linears)
    assert found.all_output_squares == sum(size**2 for size in outputs)


def test_a_model_without_attention_has_a_cost(tmp_path: Path):
    MambaConfig(hidden_size=32, num_hidden_layers=3, vocab_size=260).save_pretrained(tmp_path)  # it knows no heads
    assert work(tmp_path).pairs == 0
    assert "parameters" in cost.cost(start=tmp_path, config=tmp_path)


def test_a_token_meets_some_experts_and_all_are_pruned(tmp_path: Path):
    config = {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 260,
        "num_local_experts": 8, "num_experts_per_tok": 2,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    attention, expert = 2 * 32 * 32 + 2 * 16 * 32, 3 * 32 * 48
    routers = 2 * 8 * 32
    assert 0 <= work(tmp_path).linears - 2 * (attention + 2 * expert) <= routers
    assert 0 <= work(tmp_path).all_linears - 2 * (attention + 8 * expert) <= routers


def test_the_model_gives_what_was_measured_on_the_reference_machine(params: Params):
    config = CONFIGS / "smollm2-135m.json"
    device = Device("two cores with AVX-512", {"float32": 205e9}, HOST, None, CPU_EFFICIENCY)
    on = Setting(sizes(config), work(config), device, "float32", tokens=16 * 2048)
    seconds = {name: row.seconds for name, stage in STAGES.items() if (row := stage.cost(params, on))}
    assert seconds["calibrate"] == pytest.approx(108, rel=0.1)
    assert seconds["perplexity"] == pytest.approx(65, rel=0.1)
    assert seconds["mask"] == pytest.approx(0.61, rel=0.25)  # and 9.5 s at 1.5 B parameters: one rate for both


def test_the_measured_seconds_of_apply_with_gram_matrices(params: Params):
    """On two cores of a Zen 5 at 453 GFLOP/s: 9.1 s with the start, 3 of them, and 17.4 s with least squares."""
    config = CONFIGS / "smollm2-135m.json"
    device = Device("two cores of a Zen 5", {"float32": 453e9}, HOST, None, CPU_EFFICIENCY)
    on = Setting(sizes(config), work(config), device, "float32", tokens=1)
    measured = {("none", "none"): 0.7, ("float32", "none"): 6.1, ("float32", "least-squares"): 14.4}
    for (gram, reconstruction), expected in measured.items():
        calibration = params.calibration.model_copy(update={"gram": gram})
        row = STAGES["apply"].cost(
            params.model_copy(update={"calibration": calibration, "reconstruction": reconstruction}), on
        )
        assert row is not None
        assert row.seconds == pytest.approx(expected, rel=0.3)


@pytest.mark.parametrize("gram", ["none", "float32"])
def test_the_worker_with_the_most_shards_decides(params: Params, gram: str):
    """1,600 windows are 16 shards; the sums of Gram matrices come over the network besides."""
    changed = params.calibration.model_copy(update={"gram": gram, "samples": 1600})
    settings, model = params.model_copy(update={"calibration": changed}), sizes(CONFIGS / "llama-2-7b.json")
    alone = Setting(model, work(CONFIGS / "llama-2-7b.json"), DEVICES["h100"], "float32", tokens=1)

    def seconds(workers: int) -> float:
        row = STAGES["calibrate"].cost(settings, replace(alone, workers=workers))
        assert row
        return row.seconds

    sent = 16 * 8 * model.all_squares / NETWORK if gram != "none" else 0
    for workers, shards in ((2, 8), (5, 4), (16, 1), (50, 1)):
        assert seconds(workers) == pytest.approx(seconds(1) * shards / 16 + sent, rel=1e-6)


def test_what_a_card_holds_does_not_grow_with_depth():
    model = sizes(CONFIGS / "llama-2-7b.json")
    deeper = replace(model, parameters=2 * model.parameters)
    for words in ({"statistics": True}, {"logits": True}):
        held = walking(model, dtype="float16", length=2048, device="cuda", **words)
        assert held == walking(deeper, dtype="float16", length=2048, device="cuda", **words)
        assert held.anonymous == held.total
    assert writing(linear=2).anonymous < choosing(block=10, linear=2, threads=1, by_row=True).anonymous
    on_cpu = walking(model, dtype="float16", length=2048, statistics=True)
    assert on_cpu.anonymous == on_cpu.total - (2 * model.block + model.rest) * 2
    assert walking(model, dtype="float32", length=2048, statistics=True).anonymous > on_cpu.total


def test_it_needs_no_weights_and_no_project(tmp_path: Path):
    table = cost.cost(start=tmp_path, config=CONFIGS / "llama-2-7b.json", device="l40s", dtype="float16", windows=128)
    assert "6.74 B parameters" in table
    assert "no card was at hand" in table
    assert [line.split()[1] for line in table.splitlines() if line.startswith("| ")][1:] == [
        "calibrate", "mask", "apply", "perplexity", "zero-shot",
    ]  # fmt: skip


def test_in_a_project_it_is_the_projects_model_and_settings(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
):
    write_params(tmp_path, "org/name", calibration__samples=7)
    with pytest.raises(UserError, match=r"models/dense: no config.json, .* fetch .*: `dvc repro download@model`"):
        cost.cost(start=tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models/dense").symlink_to(tiny)
    monkeypatch.chdir(tmp_path)
    shown = CliRunner().invoke(app, ["cost"]).output
    assert "7 windows of 64 to calibrate" in shown
    assert "measured now" in shown


def test_a_local_model_is_read_where_it_is_before_it_is_downloaded(tmp_path: Path, tiny: Path):
    write_params(tmp_path, tiny, calibration__samples=7)
    assert "7 windows of 64 to calibrate" in cost.cost(start=tmp_path)


def test_fewer_windows_are_fewer_that_go_back(tmp_path: Path, tiny: Path):
    write_params(tmp_path, tiny, calibration__samples=9, calibration__statistics="fisher")
    assert "4 windows of 64 to calibrate" in cost.cost(start=tmp_path, windows=4)


def test_a_device_that_is_not_known(tmp_path: Path, tiny: Path):
    with pytest.raises(UserError, match="--device: got abacus, expected cpu, l40s, h100, h200"):
        cost.cost(start=tmp_path, config=tiny, device="abacus")
    with pytest.raises(UserError, match="no project here; name a config.json"):
        cost.cost(start=tmp_path)
