"""The benchmark compares like with like, counts what it says, and its table, files and resumed runs agree."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT, calibrate, text_of
from transformers import AutoModelForCausalLM

from wanda_dvc.catalog import STATISTICS
from wanda_dvc.stages import STAGES, times
from wanda_dvc.stages import calibrate as stage
from wanda_dvc.stages.download import download
from wanda_dvc.stages.inputs import calibration_windows
from wanda_dvc.stages.mask import mask
from wanda_dvc.stages.running import timed
from wanda_dvc.study.project import Project
from wanda_dvc.study.tensors import block_count, read_masks

sys.path.insert(0, str(ROOT / "benchmarks"))

import bench
import comparisons
import limits
import ours
import plain
from measures import Bench
from processes import Runner
from results import Measured, Result, judge, page, table, without_units, write
from rows import ROWS, Row
from studies import FULL, QUICK, Studies

BENCHMARKS = ROOT / "benchmarks"


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_the_plain_procedure_prunes_the_same_weights(project: Callable[..., Project], method: str):
    made = project(method=method, propagation="pruned", group="linear" if method == "magnitude" else "row")
    for part in ("model", "calibration"):
        download(project=made, part=part, text=text_of(part))
    calibrate(project=made)
    mask(project=made)
    model = AutoModelForCausalLM.from_pretrained(made.model("dense")).eval()
    if method == "wanda":
        plain.prune_wanda(model, calibration_windows(made), made.params.sparsity)
    else:
        plain.prune_magnitude(model, made.params.sparsity)
    weights = dict(model.named_parameters())
    for block in range(block_count(made.masks, "mask")):
        for name, keep in read_masks(made.masks, block).items():
            assert torch.equal(weights[f"{name}.weight"] != 0, keep)


def test_the_floor_counts_each_needed_token_once():
    floor = {"linears": 1.0, "head": 1000.0, "attention": 1e6, "attention_flops_a_pair": 1}
    one = {"tasks": {"task": {"needed": [[[10, [3, 1]]], [[5, [1]], [6, [2]]]]}}}
    seconds, tokens = comparisons.needed_floor(floor, one)
    assert tokens == (10 + 2 + 0) + 5 + (6 + 1)
    heads = 1 + 2 + 1 + 1 + 1
    pairs = 50 + (2 * 10 + 2) + 12.5 + 18 + (6 + 0.5)
    assert seconds == tokens + 1000 * heads + 1e6 * pairs
    assert comparisons.pass_floor(floor, 2, 4, head=True) == 8 * 1001 + 1e6 * 16


def test_a_baseline_is_held_to_the_speed_of_its_time():
    """Measured while the machine was twice as slow, it counts half."""
    ours, slow = {"floor": {"linears": 1e-3}}, {"wall": 30.0, "floor": {"linears": 2e-3}}
    assert comparisons.at_speed_of(ours, slow) == 15


def test_answers_differ_only_where_the_choice_was_clear():
    stock = {"tasks": {"task": {"loglikelihoods": [[-1.0, -2.0], [-1.0, -1.0005], [-3.0, -1.0]]}}}
    ours = {"loglikelihoods": {"task": [[-2.0, -1.0], [-1.0005, -1.0], [-3.0, -1.0]]}}
    assert comparisons.other_answers(ours, stock, 1e-3) == (1, 1, 1.0)


@pytest.mark.parametrize(
    ("goal", "met", "missed"), [("≥ 2", 2, 1.99), ("< 0.05", 0.049, 0.05), ("< 1 s", 0.99, 1), ("0", 0, 1)]
)
def test_a_row_says_whether_its_goal_is_met(goal: str, met: float, missed: float):
    assert judge("a", goal, Measured(met)).met
    assert not judge("a", goal, Measured(missed)).met
    assert not judge("a", goal, Measured(met, holds=False)).met


def test_a_row_shows_seconds_percentages_and_what_was_not_measured():
    results = [judge("mask", "< 1 s", Measured(0.5, 0.5)), without_units("calibrate", "≥ 0.45")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")][:-1] for line in table(results).splitlines()[2:]]
    assert cells == [["mask", "0.50", "–", "0.50 s", "< 1 s", "yes"], ["calibrate", "–", "–", "–", "≥ 45 %", "–"]]


def committed() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((BENCHMARKS / "results.json").read_text(encoding="utf-8"))
    return content


def test_the_committed_results_are_the_rows_of_the_table():
    full: Any = SimpleNamespace(sizes=FULL)
    assert [(row.title(full), row.goal) for row in ROWS] == [(row["name"], row["goal"]) for row in committed()["rows"]]


def test_the_committed_page_shows_the_committed_results():
    content = committed()
    results = [Result(**row) for row in content["rows"]]
    assert page(content["machine"], results, {}) == (BENCHMARKS / "results.md").read_text(encoding="utf-8")


def test_rows_of_an_earlier_run_stay_only_on_the_same_machine(tmp_path: Path):
    def names(machine: dict[str, Any], *new: str) -> list[str]:
        write(tmp_path / "results", machine, [judge(name, "0", Measured(0)) for name in new], {})
        return [row["name"] for row in json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["rows"]]

    assert names({"cores": 2}, "a", "b") == ["a", "b"]
    assert names({"cores": 2}, "b", "c") == ["a", "b", "c"]
    assert names({"cores": 4}, "c") == ["c"]


@pytest.fixture
def studies(tmp_path: Path) -> Studies:
    return Studies(Runner(tmp_path), QUICK, mirror=None, given=None)


def test_what_a_run_has_measured_a_resumed_one_does_not_measure_again(studies: Studies):
    assert Bench(studies).part("a", lambda: {"wall": 1.0}) == {"wall": 1.0}
    assert Bench(studies).part("a", lambda: {"wall": 2.0}) == {"wall": 1.0}


def test_a_row_that_fails_costs_only_the_rows_of_its_name(
    studies: Studies, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fails(_: Bench) -> Measured:
        raise RuntimeError("no luck")

    def works(_: Bench) -> Measured:
        return Measured(0)

    rows = [Row("one", "a", fails, "0"), Row("one", "b", works, "0"), Row("two", "c", works, "0")]
    monkeypatch.setattr(bench, "ROWS", rows)
    assert bench.measure(studies, [], tmp_path / "results") == {"one": "no luck"}
    assert [row["name"] for row in json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["rows"]] == ["c"]
    assert "Failed: one: no luck" in (tmp_path / "results.md").read_text(encoding="utf-8")


def test_rows_that_take_much_are_measured_only_where_they_are_asked_for(
    studies: Studies, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(bench, "ROWS", [Row("one", "a", lambda _: Measured(0), "0")])
    monkeypatch.setattr(bench, "ASKED", [Row("large", "b", lambda _: Measured(0), "0")])
    for names, measured in (([], "a"), (["large"], "b")):
        bench.measure(studies, names, tmp_path / measured)
        content = json.loads((tmp_path / f"{measured}.json").read_text(encoding="utf-8"))
        assert [row["name"] for row in content["rows"]] == [measured]


def test_a_limit_needs_a_control_group_and_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(limits, "LIMITS", {tmp_path: "memory.max", tmp_path / "missing": "memory.limit_in_bytes"})
    with pytest.raises(RuntimeError, match="run it as root on Linux"), limits.limited(10**9):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_row_in_bfloat16_needs_native_bf16():
    without: Any = SimpleNamespace(bf16=False)
    assert Row("one", "a in {dtype}", Measured, "≥ 2", "bfloat16").result(without) == without_units(
        "a in bfloat16", "≥ 2"
    )


def test_a_process_that_fails_is_quoted(tmp_path: Path):
    with pytest.raises(RuntimeError, match=r"exit 3: one \| two$"):
        Runner(tmp_path).run(sys.executable, "-c", "print('one\\ntwo'); raise SystemExit(3)")


def test_the_seconds_inside_a_stage_are_those_of_its_last_run(project: Callable[..., Project]):
    made = project()
    for part in ("model", "calibration"):
        download(project=made, part=part, text=text_of(part))
    with pytest.raises(RuntimeError, match="no time of calibrate, expected one of none"):
        ours.seconds_inside(made.root, "calibrate")
    for tier in STATISTICS:
        with timed(made, STAGES["calibrate"], tier):
            stage.calibrate(project=made, tier=tier)
    every = [times(made)[f"calibrate-{tier}"]["seconds"] for tier in STATISTICS]
    assert ours.seconds_inside(made.root, "calibrate") == sum(every)
