"""The stage `plan`, presets, and the settings that results belong to: those that ran, by dvc.lock."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cases.grids import short
from conftest import Capture, Make, committed, read_preset, write_params, write_settings

from wanda_dvc.catalog import RECIPES, STATISTICS
from wanda_dvc.errors import UserError
from wanda_dvc.params import check_params, flatten, nested, read_params, settings
from wanda_dvc.plan import Plan
from wanda_dvc.pruning.statistics import InputStats
from wanda_dvc.results.current import current_results, stale_stages
from wanda_dvc.stages import STAGES, run, stage_inputs
from wanda_dvc.stages.plan import plan
from wanda_dvc.study.files import write_json
from wanda_dvc.study.folder import Study
from wanda_dvc.study.lock import Lock, md5
from wanda_dvc.study.scaffold import PRESETS


def test_a_method_that_is_not_installed_is_described_and_cannot_be_called(study: Make):
    """Its masks would be Wanda's, under its name."""
    described = study().params.plan.to_dict() | {"method": "theirs"}
    stored = Plan.from_dict(described)
    assert stored.to_dict() == described
    with pytest.raises(ValueError, match="invalid format"):
        stored.method(torch.ones(2, 4), InputStats.empty(4))


def test_every_file_of_the_plan_is_read_by_a_stage(study: Make):
    made = study(recipe="fisher")
    files = {f"plan/{name}.json" for name in stage_inputs(made.params)}
    read = {dep for row in STAGES.values() for part in row.variants.values() for dep in part.deps if dep[:5] == "plan/"}
    assert files == {dep.replace("{text}", "embedded") for dep in read}
    assert made.plan.to_dict() == made.params.plan.to_dict()
    written = {path.relative_to(made.root).as_posix() for path in (made.root / "plan").rglob("*.json")}
    assert written == files


def test_a_stage_does_not_run_on_an_older_plan(study: Make, tiny: Path, texts: dict[str, str], tmp_path: Path):
    """By hand, after an edit of params.yaml: the figure would be of the earlier settings."""
    study(sparsity=0.5)
    write_settings(tmp_path, tiny, **texts, sparsity=0.7)
    with pytest.raises(UserError) as refused:
        run("mask", study=Study(tmp_path))
    expected = "found sparsity 0.5, expected 0.7 as params.yaml has it now; run `wanda-dvc plan`, then `dvc repro`"
    assert str(refused.value).startswith("plan/mask.json: ")
    assert expected in str(refused.value)


def test_a_relative_source_is_refused_where_it_is_a_place_of_the_study(tmp_path: Path):
    """It reads as a Hub id, and `download` said that it is on the Hub."""
    (tmp_path / "models/mine").mkdir(parents=True)
    write_settings(tmp_path, "models/mine")
    with pytest.raises(UserError, match="model: models/mine is a place in this study, .* write its absolute path"):
        plan(study=Study(tmp_path))
    (tmp_path / "org/text").mkdir(parents=True)
    write_settings(tmp_path, "org/model", perplexity__texts={"tasks": {"source": "org/text"}})
    with pytest.raises(UserError, match="perplexity.texts.tasks.source: org/text is a place in this study"):
        plan(study=Study(tmp_path))
    (tmp_path / "models/pruned").mkdir()
    write_settings(tmp_path, tmp_path / "models/pruned")  # each run would prune the last one's result
    with pytest.raises(UserError, match="models/pruned is written by this study, expected another place; copy it"):
        plan(study=Study(tmp_path))


def test_a_pattern_says_what_it_replaces(tmp_path: Path, capsys: Capture):
    write_params(tmp_path, "org/model", recipe="fisher", pattern="1:4", sparsity=0.5)
    said = capsys.readouterr().err
    assert "pattern 1:4 sets the sparsity to 0.75; sparsity 0.5 ignored" in said
    assert "group outputs, allocation sensitivity ignored (recipe fisher)" in said
    assert json.loads((tmp_path / "plan/mask.json").read_text())["sparsity"] == 0.75
    assert read_params(tmp_path / "params.yaml").statistics == STATISTICS


def stage(out: str, *deps: str, **asked: object) -> dict[str, Any]:
    """A stage of a dvc.lock; a path's hash is the path."""
    read = [{"path": dep, "md5": dep} for dep in deps]
    return {"deps": read, "params": {"params.yaml": asked}, "outs": [{"path": out, "md5": out}]}


def runs(study: Study) -> Lock:
    """The runs of a study in which the masks were made with its settings."""
    plan = stage("plan", **study.params.model_dump(mode="json"))
    masks = stage("masks", "stats/norms", "plan/mask.json")
    masks["deps"][1]["md5"] = md5((study.root / "plan/mask.json").read_bytes())
    calibrate = stage("stats/norms", "plan/calibrate/norms.json")
    calibrate["deps"][0]["md5"] = md5((study.root / "plan/calibrate/norms.json").read_bytes())
    return Lock({"plan": plan, "mask": masks, "apply": stage("models/pruned", "masks"), "calibrate-norms": calibrate})


def test_what_ran_on_another_plan_or_other_inputs_is_stale_and_so_is_what_follows(study: Make):
    lock = runs(study(sparsity=0.5))
    settings = dict(flatten(study(sparsity=0.5).params.model_dump(mode="json")))
    other = dict(flatten(study(sparsity=0.7).params.model_dump(mode="json")))
    assert stale_stages(lock, settings) == stale_stages(lock, nested(settings)) == []
    failed = Lock(lock.stages | {"plan": stage("plan", **nested(other))})  # `mask` has failed
    assert stale_stages(lock, other) == stale_stages(failed, failed.settings) == ["mask", "apply"]
    new = lock.stages["calibrate-norms"] | {"outs": [{"path": "stats/norms", "md5": "other"}]}
    assert Lock(lock.stages | {"calibrate-norms": new}).stale({}) == ["mask", "apply"]
    inside = stage("metrics/dense/zero_shot.json", "masks/provenance.json")  # no digest of the file is known
    assert Lock(lock.stages | {"zero-shot": inside, "calibrate-norms": new}).stale({}) == ["mask", "apply", "zero-shot"]


@pytest.mark.parametrize("other", short(RECIPES, "fisher"))
def test_the_settings_are_those_that_ran(study: Make, other: str):
    before = study(recipe=other, sparsity=0.3, dtype="bfloat16", calibration__statistics="fisher")
    ran = runs(before)
    edited = study(sparsity=0.5, calibration__seed=5, calibration__statistics="fisher")
    assert ran.params(edited.params) == before.params
    changes = {"sparsity": 0.5, "calibration.seed": 5, "dtype": "auto"}
    assert ran.not_run(edited.params).items() >= changes.items()
    assert ran.not_run(before.params) == {}


def test_results_that_are_not_of_the_lock_are_left_out_with_the_stage_to_run(study: Make):
    made = study()
    paths = {name: made.metrics("pruned", name) for name in ("sparsity", "zero_shot", "perplexity/embedded")}
    names = {name: path.relative_to(made.root).as_posix() for name, path in paths.items()}
    for path in paths.values():
        write_json(path, {"a": 1})
    own = md5(paths["sparsity"].read_bytes())
    stages: dict[str, Any] = {"apply": stage("models/pruned"), "zero-shot": stage(names["zero_shot"], "models/pruned")}
    stages["apply"]["outs"].append({"path": names["sparsity"], "md5": own})
    stages["zero-shot"]["outs"][0]["md5"] = own
    stages["perplexity-pruned@embedded"] = stage(names["perplexity/embedded"])
    removed = stage("metrics/pruned/perplexity/removed.json", "models/pruned")  # of a text that the settings lack
    removed["deps"][0]["md5"] = "older"
    stages["perplexity-pruned@removed"] = removed
    changes = {"another file": {}, "another input": {"zero-shot": ["zero-shot"]}}
    for change, left_out in changes.items():
        if change == "another input":
            stages["zero-shot"]["deps"][0]["md5"] = "older"
        results, notes = current_results(made, Lock(stages))
        assert results["pruned"].metrics.keys() == {"sparsity"} | ({"zero_shot"} if not left_out else set())
        rerun = ", ".join([*left_out, "perplexity-pruned@embedded"])
        (note,) = notes
        assert note.startswith(f"Left out, because inputs or files have changed since the run: {rerun}; run")
    assert current_results(made, Lock({}))[0]["pruned"].metrics.keys() == set(paths)  # stages ran without DVC


def test_a_lock_with_a_merges_conflict_is_said():
    with pytest.raises(UserError, match=r"^dvc.lock: .* expected what DVC writes; resolve the conflict"):
        Lock.parse("<<<<<<< HEAD\nschema: '2.0'\n=======\n")


def test_the_default_is_the_committed_params_yaml():
    given = {name: value for name, value in flatten(committed()) if not name.startswith("runtime.")}
    found = read_preset("default")
    assert found | given == found
    for name, field in settings():
        if name not in given and not field.is_required() and not name.startswith(("runtime.", "perplexity.texts.")):
            assert found[name] == (field.get_default() if name != "recovery.text" else None)  # no texts are null


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_is_a_study_that_differs_from_the_default(name: str):
    found, default = read_preset(name), read_preset("default")
    assert check_params(nested(found)).model_dump(mode="json", exclude={"runtime"}) == nested(found)
    assert (found == default) == (name == "default")
