"""The stage `plan`: what it writes, what it refuses, and that no stage runs on an older plan."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import write_params, write_settings

from wanda_dvc.errors import UserError
from wanda_dvc.params import read_params
from wanda_dvc.stages import STAGES, planned, run
from wanda_dvc.stages.plan import plan
from wanda_dvc.study.project import Project

Make = Callable[..., Project]


def test_every_file_of_the_plan_is_read_by_a_stage(project: Make):
    made = project(recipe="fisher")
    files = {f"plan/{name}.json" for name in planned(made.params)}
    read = {dep for row in STAGES.values() for part in row.parts.values() for dep in part.deps if dep[:5] == "plan/"}
    assert files == {dep.replace("{text}", "embedded") for dep in read}
    assert made.plan.described == made.params.plan.described
    written = {path.relative_to(made.root).as_posix() for path in (made.root / "plan").rglob("*.json")}
    assert written == files


def test_a_stage_does_not_run_on_an_older_plan(project: Make, tiny: Path, texts: dict[str, str], tmp_path: Path):
    """By hand, after an edit of params.yaml: the figure would be of the earlier settings."""
    project(sparsity=0.5)
    write_settings(tmp_path, tiny, **texts, sparsity=0.7)
    with pytest.raises(UserError) as refused:
        run("mask", project=Project(tmp_path))
    expected = "found sparsity 0.5, expected 0.7 as params.yaml has it now; run `dvc repro` or `wanda-dvc plan`"
    assert str(refused.value).startswith("plan/mask.json: ")
    assert expected in str(refused.value)


def test_a_relative_source_is_refused_where_it_is_a_place_of_the_study(tmp_path: Path):
    """It reads as a Hub id, and `download` said that it is on the Hub."""
    (tmp_path / "models/mine").mkdir(parents=True)
    write_settings(tmp_path, "models/mine")
    with pytest.raises(UserError, match="model: models/mine is a place in this study, .* write its absolute path"):
        plan(project=Project(tmp_path))


def test_a_pattern_says_what_it_replaces(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_params(tmp_path, "org/model", recipe="fisher", pattern="1:4", sparsity=0.5)
    said = capsys.readouterr().err
    assert "pattern 1:4 sets the sparsity to 0.75; sparsity 0.5 ignored" in said
    assert "group outputs, allocation sensitivity ignored (recipe fisher)" in said
    assert json.loads((tmp_path / "plan/mask.json").read_text())["sparsity"] == 0.75
    assert read_params(tmp_path / "params.yaml").tier == "gradients"
