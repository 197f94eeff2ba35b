"""What a study costs on paper, against torch's own count, the models' cards and what was measured."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, save_tiny_model, write_params
from test_families import save
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, MambaConfig
from typer.testing import CliRunner

from wanda_dvc.cli import app
from wanda_dvc.engine import pace
from wanda_dvc.engine.decoder import Decoder
from wanda_dvc.engine.sizes import choosing, sizes, walking, writing
from wanda_dvc.errors import UserError
from wanda_dvc.stages import needs
from wanda_dvc.stages.needs import NEEDS, Known, Need
from wanda_dvc.study.project import Project
from wanda_dvc.views import cost

CONFIGS = ROOT / "tests/configs"
GRAM = {"calibration__statistics": "gram"}


@pytest.fixture
def need(tmp_path: Path, tiny: Path):
    """What a stage of the tiny model needs: 32 × 2,048 tokens to calibrate on, 16 × 2,048 to measure on."""

    def found(stage: str, **changes: Any) -> Need:
        shape = {"calibration__windows": 32, "calibration__length": 2048, "perplexity__length": 2048}
        write_params(tmp_path, CONFIGS, **shape | {"perplexity__windows": 16} | changes)
        return NEEDS[stage](Known(params=Project(tmp_path).params, config=tiny))

    return found


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of 0.1 GFLOP/s, and a million FLOPs of masks a second."""
    rates = dict.fromkeys(("blocks", "head", "grams", "pruning"), 1e8) | {"choosing": 1e6}
    monkeypatch.setattr(pace, "measure", lambda *_, **__: rates)


def test_flops_are_those_that_torch_counts(tmp_path: Path):
    folder = save_tiny_model(tmp_path, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(3, 64, dtype=torch.long))
    through = sizes(folder)
    causal_half = 2 * 3 * 64 * 64 * through.pairs  # torch multiplies the other half too
    rotary = counter.get_flop_counts()["Global"][torch.ops.aten.bmm] - 2 * causal_half  # the angles of the positions
    assert 0 <= rotary < 0.001 * causal_half + 64 * 64
    assert counter.get_total_flops() - rotary == through.walking(3, 64) + 2 * 3 * 64 * through.head + causal_half


def test_a_small_models_parameters_are_not_nothing(tmp_path: Path):
    write_params(tmp_path, CONFIGS)
    folder = save_tiny_model(tmp_path / "tiny")
    table = cost.cost(start=tmp_path, config=folder)
    count = sizes(folder).parameters
    assert f"{count / 1e3:.2f} k parameters" in table
    assert " 0.00 " not in table
    assert "134.52 M parameters" in cost.cost(start=tmp_path, config=CONFIGS / "smollm2-135m.json")


def test_an_experiment_adds_weights_where_they_do_not_follow_from_its_masks(tmp_path: Path):
    trained = {"method": "admm", "reconstruction": "blockwise", "propagation": "corrected"}
    for changes, added in (
        ({}, "0.81 GB to the cache (its masks)."),
        (trained, "14.29 GB to the cache (its masks and weights)."),
    ):
        write_params(tmp_path, CONFIGS, **changes)
        assert f"One more experiment adds {added}" in cost.cost(start=tmp_path, config=CONFIGS / "llama-2-7b.json")


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
    assert sizes(config).stored == parameters * (4 if name == "smollm2-135m" else 2)
    assert sizes(config).met == sizes(config).count == linears


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
    assert sizes(tmp_path).pairs == 0
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
    assert 0 <= sizes(tmp_path).met - 2 * (attention + 2 * expert) <= routers
    assert 0 <= sizes(tmp_path).count - 2 * (attention + 8 * expert) <= routers


def test_a_recorded_statistic_adds_its_own_products_alone(need, tiny: Path):
    once, gram = need("calibrate"), need("calibrate", **GRAM)
    model = sizes(tiny)
    assert gram.work == {**once.work, "grams": 32 * 2048 * model.all_squares}
    assert gram.disk == once.disk + model.all_squares  # half of them, in float16
    back = need("calibrate", calibration__statistics="gradients")
    assert back.work["blocks"] == once.work["blocks"] * (32 + 3 * 8) / 32
    assert back.work["head"] == 2 * (2 * 8 * 2048) * model.head
    assert back.read == 3 * once.read


def test_what_reads_gram_matrices_is_solved_for_once(need, tiny: Path):
    model = sizes(tiny)
    refit = GRAM | {"reconstruction": "least-squares"}
    assert need("mask", **refit).work == {"choosing": model.count}
    assert need("apply", **refit).work == {"pruning": model.count + (20 + 3) * model.products}
    pruned = refit | {"propagation": "pruned"}  # then it is solved for in mask
    assert need("mask", **pruned).work["pruning"] == 20 * model.products
    assert need("apply", **pruned).work == {"pruning": model.count + 3 * model.products}
    assert need("apply").work == {"pruning": model.count}


def test_pruned_propagation_walks_twice_and_sums_once(need):
    once = need("calibrate", **GRAM)
    walked = need("mask", method="admm", propagation="pruned", **GRAM)
    assert walked.work["blocks"] == 2 * once.work["blocks"]
    assert walked.work["grams"] == once.work["grams"]
    assert walked.hidden == 2 * once.hidden
    assert walked.least == once.least


def test_cost_and_the_line_before_a_stage_count_the_same_cores(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
):
    write_params(tmp_path, tiny)
    project = Project(tmp_path)
    project.model("dense").parent.mkdir()
    project.model("dense").symlink_to(tiny)
    found = []
    for cores in ("1", "2"):
        monkeypatch.setenv("OMP_NUM_THREADS", cores)
        printed = json.loads(cost.cost(start=tmp_path, as_json=True))["stages"]
        (mask,) = (row["memory_bytes"] for row in printed if row["stage"] == "mask")
        assert mask == needs.need(project, "mask").memory.anonymous
        found.append(mask)
    assert found[0] < found[1]


@pytest.mark.usefixtures("at_once")
def test_another_experiment_takes_the_stages_that_its_recipe_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Wherever `calibrate` stands in the table."""
    write_params(tmp_path, CONFIGS)
    rows = json.loads(cost.cost(start=tmp_path, config=CONFIGS / "llama-2-7b.json", measure=True, as_json=True))
    seconds = {row["stage"]: row["seconds"] for row in rows["stages"]}
    assert seconds["calibrate"] == rows["stages"][0]["flops"] / 1e8
    again = sum(seconds.values()) - seconds["calibrate"]
    monkeypatch.setattr(cost, "NEEDS", dict(reversed(NEEDS.items())))
    table = cost.cost(start=tmp_path, config=CONFIGS / "llama-2-7b.json", measure=True)
    assert f"takes {again / 3600:.1f} h; the first one takes {sum(seconds.values()) / 3600:.1f} h" in table
    assert f"its dense baselines {(seconds['perplexity'] + seconds['zero-shot']) / 3600:.1f} h more." in table


@pytest.mark.parametrize(("pattern", "sparsity", "family"), [("blocks", 0.25, "llama"), ("experts", 0.25, "mixtral")])
def test_scores_of_complete_units_are_measured(pattern: str, sparsity: float, family: str, tmp_path: Path):
    write_params(tmp_path, CONFIGS, pattern=pattern, sparsity=sparsity)
    measured = cost.cost(start=tmp_path, config=save(family, tmp_path / "model"), measure=True, as_json=True)
    assert all(row["seconds"] > 0 for row in json.loads(measured)["stages"])


def test_a_pattern_of_units_says_what_is_left(tmp_path: Path):
    write_params(tmp_path, CONFIGS, pattern="neurons", sparsity=0.2)
    config = CONFIGS / "smollm2-135m.json"
    said = cost.cost(start=tmp_path, config=config)
    assert "pattern neurons, sparsity 0.2: the smaller model has 117.93 M parameters, 0.47 GB, 12.3 % less" in said
    content = json.loads(cost.cost(start=tmp_path, config=config, as_json=True))
    assert content["smaller"] == {"parameters": 117_926_208, "stored_bytes": 4 * 117_926_208}
    heads = tmp_path / "config.json"
    heads.write_text(json.dumps({"model_type": "stablelm", "num_hidden_layers": 2}))
    write_params(tmp_path, CONFIGS, pattern="heads", sparsity=0.5)
    assert "pattern heads, sparsity 0.5: only `wanda-dvc mask` knows" in cost.cost(start=tmp_path, config=heads)
    write_params(tmp_path, CONFIGS, pattern="unstructured", sparsity=0.5)
    assert json.loads(cost.cost(start=tmp_path, config=config, as_json=True))["smaller"] is None


def test_without_a_measurement_there_is_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pace, "measure", lambda *_, **__: pytest.fail("measured"))
    write_params(tmp_path, CONFIGS)
    assert "time" not in cost.cost(start=tmp_path, config=CONFIGS / "llama-2-7b.json")


@pytest.mark.parametrize("family", ["gpt2", "deepseek_v3", "jamba mixed"])
def test_one_block_is_measured_whatever_the_configuration_says_of_each(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pace, "ENOUGH", 0)
    write_params(tmp_path, CONFIGS, recipe="admm", calibration__length=32, **GRAM)
    measured = cost.cost(start=tmp_path, config=save(family, tmp_path / "model"), measure=True, as_json=True)
    for row in json.loads(measured)["stages"]:
        assert row["seconds"] > 0


def test_what_a_card_holds_does_not_grow_with_depth():
    model = sizes(CONFIGS / "llama-2-7b.json")
    deeper = replace(model, parameters=2 * model.parameters)
    for words in ({"statistics": True}, {"logits": True}):
        held = walking(model, dtype="float16", length=2048, device="cuda", **words)
        assert held == walking(deeper, dtype="float16", length=2048, device="cuda", **words)
        assert held.anonymous == held.total
    assert writing(model).anonymous < choosing(model, threads=1, by_row=False).anonymous
    on_cpu = walking(model, dtype="float16", length=2048, statistics=True)
    assert on_cpu.anonymous == on_cpu.total - (2 * model.block + model.rest) * 2
    assert walking(model, dtype="float32", length=2048, statistics=True).anonymous > on_cpu.total


def test_it_needs_no_weights_and_no_project(tmp_path: Path):
    table = cost.cost(start=tmp_path, config=CONFIGS / "llama-2-7b.json", dtype="float16", windows=128)
    assert "6.74 B parameters" in table
    assert [line.split()[1] for line in table.splitlines() if line.startswith("| ")][1:] == [
        "calibrate", "mask", "apply", "perplexity", "zero-shot",
    ]  # fmt: skip


def test_in_a_project_it_is_the_projects_model_and_settings(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
):
    write_params(tmp_path, "org/name", calibration__windows=7)
    with pytest.raises(UserError, match=r"models/dense: no config.json, .* fetch .*: `dvc repro download@model`"):
        cost.cost(start=tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models/dense").symlink_to(tiny)
    monkeypatch.chdir(tmp_path)
    shown = CliRunner().invoke(app, ["cost"]).output
    assert "7 windows of 64 to calibrate" in shown
    measured = CliRunner().invoke(app, ["cost", "--measure"]).output
    assert "Measured: one block of this shape" in measured
    assert "extrapolated" in measured


def test_a_local_model_is_read_where_it_is_before_it_is_downloaded(tmp_path: Path, tiny: Path):
    write_params(tmp_path, tiny, calibration__windows=7)
    assert "7 windows of 64 to calibrate" in cost.cost(start=tmp_path)


def test_fewer_windows_are_fewer_that_go_back(need, tmp_path: Path, tiny: Path):
    four, nine = (need("calibrate", calibration__windows=n, calibration__statistics="gradients") for n in (4, 9))
    assert 2 * four.work["head"] == nine.work["head"]  # of 4 and of 8: calibration runs the head on no other windows
    write_params(tmp_path, tiny, calibration__windows=9)
    assert "4 windows of 64 to calibrate" in cost.cost(start=tmp_path, windows=4)


def test_without_a_study_a_configuration_is_named(tmp_path: Path):
    with pytest.raises(UserError, match="no project here; name a config.json"):
        cost.cost(start=tmp_path)
