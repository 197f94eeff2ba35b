"""The card of an exported model, and what export refuses. The model itself: test_pipeline.py."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import Make, Patch
from huggingface_hub import ModelCard

from wanda_dvc.commands import check_target
from wanda_dvc.commands.export import export, sections, settings_of
from wanda_dvc.errors import UserError
from wanda_dvc.params import check_params, parse_yaml, resolved
from wanda_dvc.results.card import card as card_of
from wanda_dvc.results.experiments import workspace
from wanda_dvc.results.show import show
from wanda_dvc.study.artifact import MODEL_COMMANDS, digest, read_provenance, write_provenance
from wanda_dvc.study.files import write_json
from wanda_dvc.study.folder import Study


@pytest.fixture
def pruned(finished: Path, tmp_path: Path) -> Study:
    """A project in which everything has run but the evaluation."""
    shutil.copytree(finished, tmp_path / "study", symlinks=True)
    for path in (tmp_path / "study/metrics").rglob("*.json"):
        if path.name in ("zero_shot.json", "embedded.json"):
            path.unlink()
    return Study(tmp_path / "study")


def measure(study: Study, which: str, perplexity: float | str, model: str | None = None) -> None:
    """As the stage writes it, for the model at hand or another one."""
    folder = study.model(which)
    own = digest(read_provenance(folder, MODEL_COMMANDS[which]))
    protocol = {"model": model or own, "windows": 4, "length": 64, "rest": "dropped"}
    protocol |= {"dtype": "float32", "text": {"source": "embedded, test", "sha256": "0" * 64}}
    write_json(study.details(which, "perplexity/embedded"), {"protocol": protocol, "losses": []})
    write_json(study.metrics(which, "perplexity/embedded"), {"perplexity": perplexity})


def exported(study: Study) -> ModelCard:
    target = study.root.parent / f"{study.root.name}-exported"
    export(study=study, experiment=None, target=target)
    return ModelCard.load(target / "README.md")


def test_the_card_says_what_was_done_and_what_it_costs(pruned: Study):
    measure(pruned, "dense", 12.5)
    measure(pruned, "pruned", "diverged")
    write_json(pruned.metrics("pruned", "zero_shot"), {"piqa": {"acc": 0.5}})
    assert not (pruned.model("pruned") / "README.md").exists()  # the export writes its own
    card = exported(pruned)
    tags = ["pruned", "wanda", "wanda-dvc"]
    assert card.data.to_dict() == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": tags}
    text = " ".join(card.text.split())
    measured = json.loads(pruned.metrics("pruned", "sparsity").read_text())["sparsity"]
    for said in (
        "| sparsity | 0.5 |",
        f"| measured sparsity | {measured:.6f} |",
        "| pattern | unstructured |",
        "| group | row |",
        "| propagation | dense |",
        "4 windows of 64 tokens of calibration.txt, seed 0, float32",
        "| perplexity | 12.50 | diverged |",
        "| mean acc, % | – | 50.0 |",
        "not the benchmarks",
        "Unknown: the files of the dense model name none",
        "files are no smaller",
        "Unstructured sparsity does not speed up GPU inference",
        "chosen by wanda ([Sun et al. 2024](https://arxiv.org/abs/2306.11695))",
        "sparsity: 0.5",
    ):
        assert said in text
    assert str(pruned.root.parent) not in card.content
    masks = read_provenance(pruned.masks, "mask")
    for changes, said in (
        ({"method": "sparsegpt"}, "zero, chosen by sparsegpt ("),
        ({"pattern": "neurons"}, "were removed, 25 % of the model's parameters"),
    ):
        write_provenance(pruned.masks, masks | {"params": masks["params"] | changes})
        assert said in card_of(pruned, {"sparsity": 0.5, "removed_parameters": 0.25})


def test_masks_of_other_settings_are_not_exported(pruned: Study):
    """As after `mask` by hand: the card would have the settings of dvc.lock or params.yaml."""
    path = pruned.masks / "provenance.json"
    masks = json.loads(path.read_text())
    write_json(path, masks | {"params": masks["params"] | {"sparsity": 0.6}})
    with pytest.raises(UserError, match=r"the workspace: masks/ were made with other settings: sparsity=0.6; run"):
        exported(pruned)
    stages = {
        "calibrate": {"outs": [{"path": "stats/norms", "md5": "new"}]},
        "mask": {"deps": [{"path": "stats/norms", "md5": "old"}], "outs": [{"path": "masks", "md5": "same"}]},
        "apply": {"deps": [{"path": "masks/provenance.json", "md5": "same"}]},
    }
    write_json(pruned.root / "dvc.lock", {"stages": stages})
    with pytest.raises(UserError, match=r"the workspace: dvc.lock: the inputs of mask changed after the run"):
        exported(pruned)


def test_no_figure_of_another_model_is_on_the_card(pruned: Study):
    """As after `mask` by hand, when `apply` had written its measures."""
    measure(pruned, "dense", 12.5)
    measure(pruned, "pruned", 99.75, model="another")
    write_json(pruned.metrics("pruned", "sparsity"), {"sparsity": 0.99})
    protocol = {"model": "another"}
    write_json(pruned.metrics("pruned", "zero_shot"), {"piqa": {"acc": 0.876}})
    write_json(pruned.details("pruned", "zero_shot"), {"tasks": {"piqa": {"protocol": protocol, "items": []}}})
    text = exported(pruned).text
    assert "12.50" in text
    assert not [figure for figure in ("99.75", "0.99", "87.6") if figure in text]
    assert "99.75" in pruned.metrics("pruned", "perplexity/embedded").read_text()
    assert "99.75" not in show(study=pruned)


def test_no_note_on_the_workspace_is_on_the_card(pruned: Study):
    found = workspace(pruned)
    found.notes.append("params.yaml has model=/home/someone/secret, which has not run")
    assert not [section for section in sections(found).values() if "someone" in section]


def test_the_licence_and_the_base_model_are_the_dense_models(pruned: Study):
    """The licence that its own card names comes first."""
    (pruned.model("dense") / "LICENSE").write_text("Whoever uses this owes me a beer.", encoding="utf-8")
    card = exported(pruned)
    assert card.data.to_dict()["license"] == "other"
    assert "\nLICENSE, as its files have it." in card.text
    path = pruned.model("dense") / "provenance.json"
    named = {"license": "llama3.1", "source": "meta-llama/Llama-2-7b-hf@main"}
    write_json(path, json.loads(path.read_text()) | named)
    shutil.rmtree(pruned.root.parent / f"{pruned.root.name}-exported")
    card = exported(pruned)
    assert card.data.to_dict()["license"] == "llama3.1"
    assert card.data.to_dict()["base_model"] == "meta-llama/Llama-2-7b-hf"
    assert "\nllama3.1, LICENSE, as its files have it." in card.text


def test_a_directory_that_holds_something_is_left_as_it_is(pruned: Study, tmp_path: Path, monkeypatch: Patch):
    full, file = tmp_path / "full", tmp_path / "file"
    full.mkdir()
    for path in (full / "thesis.txt", file):
        path.write_text("mine")
        says = "exists already; name a new dir.*|file is no directory with permission to write"
        with pytest.raises(UserError, match=says):
            check_target(pruned, path if path == file else full)
        assert path.read_text() == "mine"
    empty, link = tmp_path / "empty", tmp_path / "link"
    empty.mkdir()
    link.symlink_to(empty)
    assert check_target(pruned, link) == empty  # the link stays, and the model is where it leads
    with monkeypatch.context() as patch:
        patch.setattr(Path, "is_mount", lambda path: path == empty)
        with pytest.raises(UserError, match="empty one that is no mount point"):
            check_target(pruned, empty)
    (tmp_path / ".other.part/out").mkdir(parents=True)  # of a copy to another file system that was killed
    export(study=pruned, experiment=None, target=tmp_path / "other")
    assert not (tmp_path / ".other.part").exists()


def test_an_export_that_another_one_overtakes_changes_nothing(pruned: Study, tmp_path: Path, monkeypatch: Patch):
    new = tmp_path / "new"

    def overtaken(*arguments: Any) -> str:
        new.mkdir()
        (new / "config.json").write_text("the other's")
        return card_of(*arguments)

    monkeypatch.setattr("wanda_dvc.commands.export.card", overtaken)
    with pytest.raises(UserError, match="new: exists already"):
        export(study=pruned, experiment=None, target=new)
    assert [path.read_text() for path in new.iterdir()] == ["the other's"]


def test_without_masks_it_says_what_to_run(study: Make, tmp_path: Path):
    with pytest.raises(UserError, match="masks/provenance.json: missing; run `dvc repro`"):
        export(study=study(), experiment=None, target=tmp_path / "out")


def test_the_settings_on_the_card_are_the_experiments(study: Make):
    """But for local paths, of which the last part is kept."""
    words = {"pattern": "2:4", "dtype": "float16", "calibration__text__join": "\n``` #"}
    made = study(Path("/home/someone/models/tiny 7=b"), plan=False, **words)
    shown = settings_of(made.params)
    assert "someone" not in shown
    own, again = (resolved(params) for params in (made.params, check_params(parse_yaml(shown, "params.yaml", ""))))
    changed = {key: (value, again[key]) for key, value in own.items() if again[key] != value}
    assert changed.keys() == {"model", "calibration.text.source", "perplexity.texts.embedded.source"}
    assert all(Path(new) == Path("/path/to") / Path(old).name for old, new in changed.values())
