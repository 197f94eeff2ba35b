"""The comparison on held-out windows: what is compared, with which loss, on which windows, and what is said."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from wanda_dvc.engine.windows import between, draw, draw_from_documents
from wanda_dvc.errors import UserError
from wanda_dvc.export.build import export
from wanda_dvc.pruning.gram import Gram
from wanda_dvc.stages.apply import apply
from wanda_dvc.stages.inputs import calibration_windows
from wanda_dvc.stages.mask import mask
from wanda_dvc.study.files import load_json, write_json
from wanda_dvc.study.held_out import raised
from wanda_dvc.study.project import Project
from wanda_dvc.study.tensors import SEALED, read_fisher, seal, write_fisher
from wanda_dvc.views.show import show

Make = Callable[..., Project]


@pytest.fixture
def pruned(study: Make) -> Make:
    """A calibrated study, pruned with other settings."""

    def make(**changes: Any) -> Project:
        project = study(**changes)
        mask(project=project)
        apply(project=project)
        return project

    return make


def losses(project: Project) -> dict[str, dict[str, float]]:
    content = json.loads(project.metrics("pruned", "held_out").read_text())
    found: dict[str, dict[str, float]] = content.get("held_out", {})
    return found


@pytest.mark.parametrize(
    ("settings", "masks", "weights"),
    [
        ({"recipe": "wanda"}, [], []),
        ({"recipe": "wanda-paper", "method": "magnitude"}, [], []),
        ({"recipe": "admm"}, [], []),
        ({"recipe": "wanda", "allocation": "owl"}, ["uniform", "allocation owl"], []),
        ({"recipe": "wanda", "group": "linear", "allocation": "lsa"}, ["uniform", "allocation lsa"], []),
        ({"recipe": "wanda", "group": "outputs"}, ["uniform", "group outputs"], []),
        ({"recipe": "fisher", "pattern": "2:4"}, [], ["least-squares", "reconstruction output-weighted"]),
        (
            {"recipe": "fisher"},
            ["uniform", "group outputs", "allocation sensitivity"],
            ["least-squares", "reconstruction output-weighted"],
        ),
        ({"recipe": "blockwise"}, ["uniform", "group outputs", "allocation sensitivity"], []),
    ],
    ids=str,
)
def test_each_choice_that_statistics_decide_is_compared(pruned: Make, settings: Any, masks: Any, weights: Any):
    found = losses(pruned(**settings))
    assert list(found.get("masks", {})) == masks
    assert list(found.get("weights", {})) == weights


def test_the_losses_are_those_of_transformers(pruned: Make):
    """Of the pruned model; and of Wanda's masks as the last of those compared, which is the model's own here."""
    project = pruned(recipe="fisher")
    model = AutoModelForCausalLM.from_pretrained(project.model("pruned"), dtype=torch.float32).eval()
    words = {"samples": 4, "length": project.params.calibration.length, "seed": 0}
    windows = calibration_windows(project, words, held_out=2)

    def loss(model: Any) -> float:
        with torch.no_grad():
            return sum(model(input_ids=x[None], labels=x[None]).loss.item() for x in windows) / len(windows)

    assert len(windows) == 2
    assert losses(project)["weights"]["reconstruction output-weighted"] == pytest.approx(loss(model), abs=2e-4)
    project = pruned(recipe="wanda", group="outputs", allocation="sensitivity")
    model = AutoModelForCausalLM.from_pretrained(project.model("pruned"), dtype=torch.float32).eval()
    assert losses(project)["masks"]["allocation sensitivity"] == pytest.approx(loss(model), abs=2e-4)


def test_a_choice_that_raises_the_loss_is_named_with_both_figures():
    assert not list(raised({}))
    assert not list(raised({"held_out": {}}))
    compared: dict[str, dict[str, float]] = {
        "masks": {"uniform": 3.5, "group outputs": 3.4, "allocation sensitivity": 3.75},
        "weights": {"a": 2.0, "b": 2.0},
    }
    assert list(raised({"held_out": compared})) == [
        "allocation sensitivity raises the loss of held-out calibration windows from 3.4000 to 3.7500; "
        "try the recipe without it"
    ]


def test_the_environment_turns_the_comparison_off(pruned: Make, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDA_DVC_HELD_OUT", "0")
    project = pruned(recipe="fisher")
    assert losses(project) == {}
    monkeypatch.setenv("WANDA_DVC_HELD_OUT", "some")
    with pytest.raises(UserError, match="WANDA_DVC_HELD_OUT: got some, expected a number of windows"):
        apply(project=project)


@pytest.mark.parametrize("seed", range(5))
def test_windows_between_share_no_token_with_the_drawn_ones(seed: int):
    tokens, words = torch.arange(500), {"samples": 6, "length": 20, "seed": seed}
    measured, found = draw(tokens, **words), between(tokens, windows=99, **words)
    assert len(found) > 6
    every = torch.cat([*found, measured.flatten().unique()])
    assert all(len(x) == 20 for x in found)
    assert len(every.unique()) == len(every)
    assert torch.equal(between(tokens, windows=2, **words), found[:2])
    assert not len(between(torch.arange(25), windows=2, **words))


def test_held_out_windows_of_documents_are_of_other_documents():
    documents = [f"{letter}" * 30 for letter in "abcdef"]
    words: dict[str, Any] = {"samples": 4, "length": 10, "seed": 1}

    def tokens(text: str) -> torch.Tensor:
        return torch.tensor([ord(letter) for letter in text])

    measured = draw_from_documents(documents, tokens, **words)
    both = draw_from_documents(documents, tokens, **words, held_out=9)
    assert torch.equal(both[:4], measured)
    assert not set(both[4:, 0].tolist()) & set(measured[:, 0].tolist())
    assert set(both[:, 0].tolist()) <= set(map(ord, "abcdef"))


def test_show_and_the_card_keep_the_warning(pruned: Make, tmp_path: Path):
    project = pruned(recipe="wanda", allocation="owl")
    write_json(project.metrics("pruned", "held_out"), {"held_out": {"masks": {"uniform": 3.0, "allocation owl": 4.0}}})
    warning = "allocation owl raises the loss of held-out calibration windows from 3.0000 to 4.0000"
    assert f"Warning: {warning}" in show(project=project)
    export(project=project, experiment=None, target=tmp_path / "exported")
    assert f"The choice {warning}; try the recipe without it." in (tmp_path / "exported/README.md").read_text(
        encoding="utf-8"
    )


def test_a_loss_that_is_not_finite_is_written_and_warned_of(pruned: Make, monkeypatch: pytest.MonkeyPatch):
    """JSON has no such number."""
    given = iter([3.0, float("nan")])
    monkeypatch.setattr("wanda_dvc.engine.losses.window_losses", lambda *_: [next(given)])
    project = pruned(recipe="wanda", allocation="owl")
    assert losses(project) == {"masks": {"uniform": 3.0, "allocation owl": "diverged"}}
    assert "from 3.0000 to diverged" in show(project=project)


def test_an_interrupted_comparison_resumes_with_the_same_weights_alone(pruned: Make, monkeypatch: pytest.MonkeyPatch):
    """Another Fisher tier gives other weights on the same masks: hidden states of before do not count."""
    project = pruned(recipe="admm", reconstruction="output-weighted")
    expected = losses(project)
    given = iter([[3.0]])
    monkeypatch.setattr("wanda_dvc.engine.losses.window_losses", lambda *_: next(given))
    with pytest.raises(StopIteration):  # after all blocks of the second model
        apply(project=project)
    monkeypatch.undo()
    for block in range(2):
        sums = {name: 1 + torch.arange(len(x)).double() for name, x in read_fisher(project.gradients, block).items()}
        grams = {name: Gram(torch.diag(x), 1) for name, x in sums.items()}
        write_fisher(project.gradients, block, sums, grams)
    made = {name: x for name, x in load_json(project.gram / "provenance.json").items() if name not in SEALED}
    seal(project.gradients, made | {"kind": "gradients", "windows": 8})
    apply(project=project)
    resumed = losses(project)
    shutil.rmtree(project.work_root)
    apply(project=project)
    assert losses(project) == resumed
    assert resumed != expected
