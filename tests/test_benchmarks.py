"""The benchmark compares like with like: its baseline prunes as we do, and it counts what it says it counts."""

import sys
from collections.abc import Callable

import pytest
import torch
from conftest import ROOT
from transformers import AutoModelForCausalLM

from wanda_dvc.stages.calibrate import calibrate
from wanda_dvc.stages.download import download
from wanda_dvc.stages.inputs import calibration_windows
from wanda_dvc.stages.mask import mask
from wanda_dvc.study.project import Project
from wanda_dvc.study.tensors import block_count, read_masks

sys.path.insert(0, str(ROOT / "benchmarks"))

import bench
import plain


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_the_plain_procedure_prunes_the_same_weights(project: Callable[..., Project], method: str):
    made = project(method=method, propagation="pruned", group="layer" if method == "magnitude" else "row")
    for part in ("model", "calibration"):
        download(project=made, part=part)
    calibrate(project=made)
    mask(project=made)
    model = AutoModelForCausalLM.from_pretrained(made.model("dense")).eval()
    if method == "wanda":
        plain.prune_wanda(model, calibration_windows(made), made.params.sparsity)
    else:
        plain.prune_magnitude(model, made.params.sparsity)
    weights = dict(model.named_parameters())
    for block in range(block_count(made.masks)):
        for name, keep in read_masks(made.masks, block).items():
            assert torch.equal(weights[f"{name}.weight"] != 0, keep)


def test_the_floor_counts_each_needed_token_once():
    floor = {"linears": 1.0, "head": 1000.0, "attention": 1e6, "attention_flops_a_pair": 1}
    one = {"tasks": {"task": {"needed": [[[10, [3, 1]]], [[5, [1]], [6, [2]]]]}}}
    seconds, tokens = bench.needed_floor(floor, one)
    assert tokens == (10 + 2 + 0) + 5 + (6 + 1)
    heads = 1 + 2 + 1 + 1 + 1
    pairs = 50 + (2 * 10 + 2) + 12.5 + 18 + (6 + 0.5)
    assert seconds == tokens + 1000 * heads + 1e6 * pairs
    assert bench.pass_floor(floor, 2, 4, head=True) == 8 * 1001 + 1e6 * 16


def test_a_baseline_is_held_to_the_speed_of_its_time():
    """Measured while the machine was twice as slow, it counts half."""
    slow, ours = {"wall": 30.0, "floor": {"linears": 2e-3}}, {"floor": {"linears": 1e-3}}
    assert bench.then(slow, ours) == 15


def test_answers_differ_only_where_the_choice_was_clear():
    stock = {"tasks": {"task": {"loglikelihoods": [[-1.0, -2.0], [-1.0, -1.0005], [-3.0, -1.0]]}}}
    ours = {"loglikelihoods": {"task": [[-2.0, -1.0], [-1.0005, -1.0], [-3.0, -1.0]]}}
    assert bench.other_answers(ours, stock, 1e-3) == (1, 1, 1.0)


def test_a_row_says_whether_its_goal_is_met():
    assert bench.reach("a", 1, 2, 2, "≥ 2").met
    assert not bench.reach("a", 1, 2, 1.99, "≥ 2").met
    assert bench.reach("a", 1, 2, 0.049, "< 0.05").met
    assert not bench.reach("a", 1, 2, 0.05, "< 0.05").met
    row = bench.Row("mask", 0.5, None, 0.5, "< 1 s", True)
    lines = bench.table([row, bench.without_units("calibrate", "≥ 0.45")], notes=False).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert cells == [["mask", "0.50", "–", "0.50 s", "< 1 s", "yes"], ["calibrate", "–", "–", "–", "≥ 45 %", "–"]]
