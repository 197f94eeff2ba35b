"""Views and cards speak of what ran, by dvc.lock, and not of what params.yaml has been changed to since."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from wanda_dvc.catalog import RECIPES
from wanda_dvc.errors import UserError
from wanda_dvc.export.build import export
from wanda_dvc.stages import STAGES, run
from wanda_dvc.stages.apply import describe_pruned
from wanda_dvc.study.dvc import Revision
from wanda_dvc.study.files import write_json
from wanda_dvc.study.project import Project
from wanda_dvc.study.provenance import files_digest, read_provenance
from wanda_dvc.study.ran import BY_TEXT, Ran, settings_of, stale_stages
from wanda_dvc.study.settings import flatten
from wanda_dvc.views.show import show


def stage(out: str, dep: str | None = None, **asked: object) -> dict[str, Any]:
    """A stage of a dvc.lock; a path's hash is the path."""
    deps = [{"path": dep, "md5": dep}] if dep else []
    return {"deps": deps, "params": {"params.yaml": asked}, "outs": [{"path": out, "md5": out}]}


def test_what_ran_on_other_settings_is_stale_and_so_is_what_follows():
    asked = {"sparsity": 0.5, "dtype": "float32"}
    stages = {
        "perplexity": stage("metrics/pruned/perplexity/embedded.json", "models/pruned"),
        "apply": stage("models/pruned", "masks"),
        "mask": stage("masks", "stats", sparsity=0.5),
        "calibrate": stage("stats", dtype="float32"),
        "zero-shot": stage("metrics/dense/zero_shot.json", "data/tasks"),
    }
    assert stale_stages(stages, asked) == []
    changed = stages | {"mask": stage("masks", "stats", sparsity=0.7)}
    assert stale_stages(changed, asked) == ["perplexity", "apply", "mask"]
    assert stale_stages(changed, {}) == []
    anew = stage("models/pruned", "masks")
    anew["outs"][0]["md5"] = "other"
    assert stale_stages(stages | {"apply": anew}, {}) == ["perplexity"]


def named_by_dvc(run_name: str, row: str) -> str:
    return run_name if "@" in run_name else run_name.replace(f"{row}-", f"{row}@", 1)


def lock(project: Project) -> dict[str, Any]:
    """Write the dvc.lock of a study in which each stage has run on the settings at hand; return its stages."""
    every = dict(flatten(project.params.model_dump(mode="json")))
    stages = {}
    for row in STAGES.values():
        for name, part, _ in row.runs(["embedded"]):
            wanted = [setting.replace("NAME", "embedded") for setting in row.settings_of(part)]
            asked = {key: value for key, value in every.items() if any(f"{key}.".startswith(f"{w}.") for w in wanted)}
            stages[named_by_dvc(name, row.name)] = stage(name, **asked)
    stages["mask"] |= {"outs": [{"path": "masks", "md5": "m"}], "deps": [{"path": "stats", "md5": "s"}]}
    stages["calibrate"]["outs"] = [{"path": "stats", "md5": "s"}]
    write(project, stages)
    return stages


def write(project: Project, stages: dict[str, Any]) -> None:
    YAML().dump({"schema": "2.0", "stages": stages}, project.root / "dvc.lock")


@pytest.fixture
def edited(project: Callable[..., Project]) -> Project:
    """A study that has run, and whose params.yaml has been edited since."""
    made = project(sparsity=0.3)
    for name, part in (("download", "model"), ("download", "calibration"), ("calibrate", None), ("mask", None)):
        run(name, project=made, part=part)
    lock(made)
    return project("org/other", sparsity=0.7, calibration__windows=7, tasks__names=["rte"], runtime__device="cpu")


def test_every_setting_is_that_of_the_last_run(project: Callable[..., Project]):
    before = project()
    lock(before)
    changed = project(
        "org/other", dtype="bfloat16", calibration__seed=5, sparsity=0.7, perplexity__length=32, tasks__names=["rte"],
        zero_shot__limit=9,
    )  # fmt: skip
    ran = Ran.of(changed)
    assert ran.params.model_dump() == before.params.model_dump()
    assert set(ran.unmet) == {
        "model", "dtype", "calibration.seed", "sparsity", "perplexity.length", "tasks.names", "zero_shot.limit",
    }  # fmt: skip


@pytest.mark.parametrize("other", RECIPES)
def test_the_choices_of_an_edited_recipe_are_those_that_ran(project: Callable[..., Project], other: str):
    """A copy of the settings kept the plan of params.yaml: `export` wrote other weights than `apply`."""
    before = project(calibration__statistics="gradients", recipe=other)
    lock(before)
    for recipe in RECIPES:
        edited = project(calibration__statistics="gradients", recipe=recipe)
        assert edited.params.plan.described  # as the commands read it first
        assert Ran.of(edited).params.plan == before.params.plan
        assert Ran.of(edited).params.filled == before.params.filled


def test_show_speaks_of_the_run_and_says_what_is_stale(edited: Project):
    shown = show(project=edited)
    assert "wanda, sparsity 0.3, pattern unstructured" in shown
    assert "params.yaml has model=org/other, calibration.windows=7, sparsity=0.7, tasks.names=['rte']" in shown
    assert "Stale: locate, download@model, download@tasks, calibrate, mask, zero-shot@dense, zero-shot@pruned." in shown
    assert "embedded questions, mean acc %" in shown


def test_show_rounds_no_figure_of_its_own_accord(project: Callable[..., Project]):
    """The library of the table takes a column of numbers for one, and writes six digits."""
    made = project(tasks__names=[])
    for model in ("dense", "pruned"):
        write_json(made.metrics(model, "perplexity/embedded"), {"perplexity": 1234567.0})
    write_json(made.metrics("pruned", "sparsity"), {"sparsity": 0.5})
    shown = show(project=made)
    assert shown.count("1,234,567") == 2
    assert "0.5000" in shown


def test_nothing_is_stale_where_nothing_was_edited(project: Callable[..., Project]):
    made = project()
    lock(made)
    shown = show(project=made)
    assert "Stale" not in shown
    assert "which has not run" not in shown


def test_a_removed_text_is_not_stale(edited: Project):
    """DVC keeps its stages in dvc.lock."""
    stale, stages = Ran.of(edited).stale, Ran.of(edited).stages
    removed = {name.replace("@embedded", "@ptb"): one for name, one in stages.items() if name.endswith("@embedded")}
    assert {name.partition("@")[0] for name in removed} == set(BY_TEXT)
    write(edited, stages | {name: one | {"deps": [{"path": "masks", "md5": "other"}]} for name, one in removed.items()})
    assert Ran.of(edited).stale == stale

    assert all("@ptb" not in name for name in Ran.of(edited).outdated)


def test_an_edit_of_one_text_makes_only_its_own_stages_stale(project: Callable[..., Project]):
    """`locate` reads the settings of all texts, and every `download` reads what it writes."""
    made = project()
    stages = lock(made)
    stages["locate"]["outs"] = [{"path": "sources/model", "md5": "l"}, {"path": "sources/perplexity", "md5": "l"}]
    stages["download@model"]["deps"] = [{"path": "sources/model", "md5": "l"}]
    stages["download-perplexity@embedded"]["deps"] = [{"path": "sources/perplexity/embedded", "md5": "x"}]
    write(made, stages)
    assert Ran.of(made).stale == []
    changed = project(perplexity__texts={"embedded": {"source": "embedded", "split": "train"}})
    assert Ran.of(changed).stale == ["locate", "download-perplexity@embedded"]


def test_a_setting_that_a_text_had_not_is_an_edit(project: Callable[..., Project]):
    """`-S +perplexity.texts.ptb.source=ptb` writes no nulls into params.yaml and dvc.lock."""
    texts = {"embedded": {"source": "embedded"}, "ptb": {"source": "ptb"}}
    before = project(perplexity__texts=texts)
    stages = lock(before)
    source: dict[str, Any] = {"perplexity.texts.ptb": {"source": "ptb"}}
    stages["download-perplexity@ptb"] = stage("data/perplexity/ptb", None, **source)
    stages["perplexity-pruned@ptb"] = stage("ptb", "data/perplexity/ptb")
    for name in ("locate", "download-perplexity@embedded"):
        stages[name]["params"] = {}
    write(before, stages)
    assert Ran.of(before).stale == []
    assert Ran.of(before).unmet == {}
    edited = project(perplexity__texts=texts | {"ptb": {"source": "ptb", "split": "validation"}})
    assert Ran.of(edited).stale == ["download-perplexity@ptb", "perplexity-pruned@ptb"]
    assert Ran.of(edited).unmet == {"perplexity.texts.ptb.split": "validation"}
    one = project(perplexity__texts={"embedded": {"source": "embedded"}})
    other: dict[str, Any] = {"perplexity.length": 7, "dtype": "bfloat16"}
    write(one, stages | {"perplexity-pruned@ptb": stage("ptb", None, **other)})
    assert Ran.of(one).params.model_dump() == one.params.model_dump()


def test_a_lock_without_a_texts_nulls_has_the_same_settings():
    """`-S +perplexity.texts.ptb.source=ptb` writes the source alone."""

    def of(**text: Any) -> dict[str, Any]:
        listed: dict[str, Any] = {"perplexity.texts.ptb": text}
        return settings_of(stage("data/perplexity/ptb", **listed))

    assert of(source="ptb") == of(source="ptb", split=None, column=None)
    assert of(source="ptb") != of(source="ptb", split="train")
    assert of(source="ptb") != of(source="c4")


def test_a_setting_that_the_calibration_text_had_not_is_an_edit(project: Callable[..., Project]):
    """dvc.lock has a section as params.yaml wrote it; `locate` reads the source alone."""
    before = project()
    stages = lock(before)
    text: dict[str, Any] = {"calibration.text": {"source": before.params.calibration.text.source}}
    stages["download@calibration"] = stage("data/calibration", "sources/calibration", **text)
    stages["calibrate"]["deps"] = [{"path": "data/calibration", "md5": "data/calibration"}]
    write(before, stages)
    assert Ran.of(before).stale == []
    assert Ran.of(before).unmet == {}
    edited = project(calibration__text__join="; ")
    assert Ran.of(edited).stale == ["download@calibration", "calibrate", "mask"]
    assert Ran.of(edited).unmet == {"calibration.text.join": "; "}


def test_a_text_that_was_never_measured_has_not_run(project: Callable[..., Project]):
    lock(project())
    two = project(perplexity__texts={"embedded": {"source": "embedded"}, "ptb": {"source": "ptb"}})
    shown = show(project=two)
    assert "perplexity.texts.ptb.source=ptb" in shown
    assert "which has not run: `dvc repro` runs it." in shown


def test_the_card_of_a_model_has_the_settings_that_made_it(edited: Project):
    target = edited.root / "exported"
    said = export(project=edited, experiment=None, target=target)
    assert "The model and the model card are of the last run. params.yaml has model=org/other" in said
    card = (target / "README.md").read_text(encoding="utf-8")
    recipe = card[card.index("dvc exp run") :]
    assert "-S sparsity=0.3" in recipe
    assert "-S calibration.windows=3" in recipe
    assert "other" not in recipe
    assert "rte" not in recipe


def test_an_experiments_model_is_made_as_it_ran(project: Callable[..., Project], monkeypatch: pytest.MonkeyPatch):
    """Its commit may hold a params.yaml that was edited after the run: dvc.lock says what the model is made from."""
    before = project(calibration__statistics="gram", recipe="wanda-refit")
    for name, part in (("download", "model"), ("download", "calibration"), ("calibrate", None), ("mask", None)):
        run(name, project=before, part=part)
    lock(before)
    applied = before.root.parent / "applied"
    export(project=before, experiment=None, target=applied)
    edited, taken = project(recipe="magnitude-rows"), []

    def copy_all(_revision: object, part: str, target: Path) -> bool:
        source = edited.root / part
        taken.append(part)
        (target / part).parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if source.is_dir() else shutil.copy
        return source.exists() and bool(copy(source, target / part))

    monkeypatch.setattr(Revision, "open", classmethod(lambda cls, *_, **__: cls.__new__(cls)))
    monkeypatch.setattr(Revision, "copy_all", copy_all)
    export(project=edited, experiment="six", target=edited.root.parent / "six")
    assert "stats/gram" in taken
    with (edited.root / "params.yaml").open("a", encoding="utf-8") as file:
        file.write("of_another_version: 1\n")
    with pytest.raises(UserError, match=r"^seven: its settings are not those of this version \(.*; export it with the"):
        export(project=edited, experiment="seven", target=edited.root.parent / "seven")
    assert files_digest(edited.root.parent / "six") == files_digest(applied)


@pytest.mark.parametrize(("locked", "by_hand"), [("wanda", "wanda-refit"), ("wanda-refit", "wanda"), (None, "admm")])
@pytest.mark.parametrize("edited", ["wanda", "wanda-refit"])
def test_weights_made_by_hand_have_their_own_reconstruction(
    project: Callable[..., Project], locked: str | None, by_hand: str, edited: str
):
    """`export` wrote those of the lock, or of an edited params.yaml."""
    made = project(calibration__statistics="gram", recipe=by_hand)
    for name, part in (("download", "model"), ("download", "calibration")):
        run(name, project=made, part=part)
    for name in ("calibrate", "mask", "apply"):
        run(name, project=made)
    if locked:
        lock(project(calibration__statistics="gram", recipe=locked))
    changed = project(calibration__statistics="gram", recipe=edited)
    wanted = read_provenance(changed.model("pruned"), "apply")["reconstruction"]
    assert Ran.of(changed).params.chosen_reconstruction.name == wanted
    export(project=changed, experiment=None, target=changed.root / "exported")
    folders = changed.model("pruned"), changed.root / "exported"
    one, other = ((folder / "model.safetensors").read_bytes() for folder in folders)
    assert one == other


def test_another_version_of_apply_gives_other_results_of_solved_weights(
    project: Callable[..., Project], monkeypatch: pytest.MonkeyPatch
):
    for recipe, differs in (("wanda", False), ("wanda-refit", True)):
        made = project(calibration__statistics="gram", recipe=recipe)
        for name, part in (("download", "model"), ("download", "calibration"), ("calibrate", None), ("mask", None)):
            run(name, project=made, part=part)
        before = describe_pruned(made)
        monkeypatch.setitem(STAGES, "apply", replace(STAGES["apply"], version=STAGES["apply"].version + 1))
        assert (describe_pruned(made) != before) == differs


def test_masks_made_by_hand_have_their_own_settings(edited: Project, project: Callable[..., Project]):
    changed = project(sparsity=0.6)
    run("mask", project=changed)
    assert "-S sparsity=0.6" in (
        export(project=changed, experiment=None, target=edited.root / "exported")
        and (edited.root / "exported/README.md").read_text(encoding="utf-8")
    )


def test_masks_of_statistics_that_were_made_again_are_not_exported(edited: Project):
    stages = YAML(typ="safe").load(edited.root / "dvc.lock")["stages"]
    stages["calibrate"]["outs"][0]["md5"] = "another"
    write(edited, stages)
    with pytest.raises(UserError, match="dvc.lock: the inputs of mask changed after the run"):
        export(project=edited, experiment=None, target=edited.root / "exported")
    assert not (edited.root / "exported").exists()
