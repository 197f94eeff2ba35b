"""Results belong to the settings that ran, by dvc.lock, and not to what params.yaml has been changed to since."""

import hashlib
from collections.abc import Callable
from typing import Any

import pytest

from wanda_dvc.catalog import RECIPES
from wanda_dvc.errors import UserError
from wanda_dvc.study.files import write_json
from wanda_dvc.study.project import Project
from wanda_dvc.study.runs import Runs
from wanda_dvc.study.settings import flatten


def stage(out: str, dep: str | None = None, **asked: object) -> dict[str, Any]:
    """A stage of a dvc.lock; a path's hash is the path."""
    deps = [{"path": dep, "md5": dep}] if dep else []
    return {"deps": deps, "params": {"params.yaml": asked}, "outs": [{"path": out, "md5": out}]}


def runs(project: Project) -> Runs:
    """The runs of a study in which the masks were made with its settings."""
    return Runs({"mask": stage("masks", "stats", **project.params.model_dump(mode="json"))})


def test_what_ran_on_other_inputs_is_stale_and_so_is_what_follows():
    stages = {
        "perplexity": stage("metrics/pruned/perplexity/embedded.json", "models/pruned"),
        "apply": stage("models/pruned", "masks"),
        "mask": stage("masks", "stats/norms", sparsity=0.5),
        "calibrate": stage("stats", dtype="float32"),
    }
    stages["calibrate"]["outs"] = [{"path": "stats/norms", "md5": "stats/norms"}]
    assert Runs(stages).stale == []
    assert Runs(stages).stale_for({"sparsity": 0.5, "dtype": "float32"}) == []
    assert Runs(stages).stale_for({"sparsity": 0.7, "dtype": "float32"}) == ["perplexity", "apply", "mask"]
    anew = stage("masks", "stats/norms")
    anew["outs"][0]["md5"] = "other"
    assert Runs(stages | {"mask": anew}).stale == ["perplexity", "apply"]


def test_a_section_counts_as_a_whole_and_its_nulls_do_not():
    """`-S +perplexity.texts.ptb.source=ptb` writes no nulls into params.yaml and dvc.lock."""
    text: dict[str, Any] = {"perplexity.texts.ptb": {"source": "ptb", "split": None}}
    one = Runs({"download-perplexity@ptb": stage("data/perplexity/ptb", **text)})
    assert one.stale_for({"perplexity.texts.ptb.source": "ptb"}) == []
    for other in ({"source": "c4"}, {"source": "ptb", "split": "test"}):
        assert one.stale_for(dict(flatten({"perplexity": {"texts": {"ptb": other}}}))) == ["download-perplexity@ptb"]


@pytest.mark.parametrize("other", RECIPES)
def test_the_settings_are_those_that_ran(project: Callable[..., Project], other: str):
    before = project(recipe=other, sparsity=0.3, dtype="bfloat16", calibration__statistics="gradients")
    ran = runs(before)
    edited = project(sparsity=0.5, calibration__seed=5, calibration__statistics="gradients")
    assert ran.params(edited.params) == before.params
    unmet = {"sparsity": 0.5, "calibration.seed": 5, "dtype": "float32"}
    assert ran.unmet(edited.params).items() >= unmet.items()
    assert ran.unmet(before.params) == {}
    stale = Runs(ran.stages | {"calibrate": {"outs": [{"path": "stats", "md5": "new"}]}})
    assert stale.params(edited.params) == edited.params


def test_files_of_another_run_are_named(project: Callable[..., Project]):
    study = project()
    paths = [study.metrics("pruned", name) for name in ("sparsity", "zero_shot", "perplexity/embedded")]
    names = [path.relative_to(study.root).as_posix() for path in paths]
    for path in paths:
        write_json(path, {"a": 1})
    md5 = hashlib.md5(paths[0].read_bytes(), usedforsecurity=False).hexdigest()
    stages: dict[str, Any] = {"apply": stage("models/pruned"), "zero-shot": stage(names[1], "models/pruned")}
    stages["apply"]["outs"].append({"path": names[0], "md5": md5})
    stages["zero-shot"]["outs"][0]["md5"] = md5
    stages["perplexity"] = stage(names[2])
    assert Runs(stages).others(study.root) == {names[2]}
    stages["zero-shot"]["deps"][0]["md5"] = "older"
    assert Runs(stages).others(study.root) == {names[1], names[2]}
    assert Runs({}).others(study.root) == set()


@pytest.mark.parametrize("text", ["<<<<<<< HEAD\nschema: '2.0'\n=======\n", "[1]", "stages: [1]"])
def test_a_lock_that_is_none_is_said(text: str):
    with pytest.raises(UserError, match=r"^dvc.lock: .* expected what DVC writes; resolve the conflict"):
        Runs.parse(text)
