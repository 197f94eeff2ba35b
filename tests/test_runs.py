"""Results belong to the settings that ran, by dvc.lock, and not to what params.yaml has been changed to since."""

from collections.abc import Callable
from typing import Any

import pytest

from wanda_dvc.catalog import RECIPES
from wanda_dvc.errors import UserError
from wanda_dvc.params import flatten, nested
from wanda_dvc.stages.runs import Runs, md5
from wanda_dvc.study.files import write_json
from wanda_dvc.study.project import Project


def stage(out: str, *deps: str, **asked: object) -> dict[str, Any]:
    """A stage of a dvc.lock; a path's hash is the path."""
    read = [{"path": dep, "md5": dep} for dep in deps]
    return {"deps": read, "params": {"params.yaml": asked}, "outs": [{"path": out, "md5": out}]}


def runs(project: Project) -> Runs:
    """The runs of a study in which the masks were made with its settings."""
    plan = stage("plan", **project.params.model_dump(mode="json"))
    masks = stage("masks", "stats/norms", "plan/mask.json")
    masks["deps"][1]["md5"] = md5(project.root / "plan/mask.json")
    calibrate = stage("stats/norms", "plan/calibrate/norms.json")
    calibrate["deps"][0]["md5"] = md5(project.root / "plan/calibrate/norms.json")
    return Runs({"plan": plan, "mask": masks, "apply": stage("models/pruned", "masks"), "calibrate-norms": calibrate})


def test_what_ran_on_another_plan_or_other_inputs_is_stale_and_so_is_what_follows(project: Callable[..., Project]):
    ran = runs(project(sparsity=0.5))
    assert ran.stale == []
    assert ran.stale_for(dict(flatten(project(sparsity=0.5).params.model_dump(mode="json")))) == []
    other = dict(flatten(project(sparsity=0.7).params.model_dump(mode="json")))
    assert ran.stale_for(other) == ["mask", "apply"]
    assert Runs(ran.stages | {"plan": stage("plan", **nested(other))}).stale == ["mask", "apply"]  # `mask` has failed
    anew = ran.stages["calibrate-norms"] | {"outs": [{"path": "stats/norms", "md5": "other"}]}
    assert Runs(ran.stages | {"calibrate-norms": anew}).stale == ["mask", "apply"]


@pytest.mark.parametrize("other", RECIPES)
def test_the_settings_are_those_that_ran(project: Callable[..., Project], other: str):
    before = project(recipe=other, sparsity=0.3, dtype="bfloat16", calibration__statistics="gradients")
    ran = runs(before)
    edited = project(sparsity=0.5, calibration__seed=5, calibration__statistics="gradients")
    assert ran.params(edited.params) == before.params
    unmet = {"sparsity": 0.5, "calibration.seed": 5, "dtype": "auto"}
    assert ran.unmet(edited.params).items() >= unmet.items()
    assert ran.unmet(before.params) == {}


def test_files_of_another_run_are_named(project: Callable[..., Project]):
    study = project()
    paths = [study.metrics("pruned", name) for name in ("sparsity", "zero_shot", "perplexity/embedded")]
    names = [path.relative_to(study.root).as_posix() for path in paths]
    for path in paths:
        write_json(path, {"a": 1})
    own = md5(paths[0])
    stages: dict[str, Any] = {"apply": stage("models/pruned"), "zero-shot": stage(names[1], "models/pruned")}
    stages["apply"]["outs"].append({"path": names[0], "md5": own})
    stages["zero-shot"]["outs"][0]["md5"] = own
    stages["perplexity"] = stage(names[2])
    assert Runs(stages).others(study.root) == {names[2]}
    stages["zero-shot"]["deps"][0]["md5"] = "older"
    assert Runs(stages).others(study.root) == {names[1], names[2]}
    assert Runs({}).others(study.root) == set()


@pytest.mark.parametrize("text", ["<<<<<<< HEAD\nschema: '2.0'\n=======\n", "[1]", "stages: [1]"])
def test_a_lock_that_is_none_is_said(text: str):
    with pytest.raises(UserError, match=r"^dvc.lock: .* expected what DVC writes; resolve the conflict"):
        Runs.parse(text)
