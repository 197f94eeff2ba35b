"""The Python interface runs the pipeline: its studies, its results and its errors.

DVC and the stages are real processes here, because starting them is all that the interface does.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Factory, save_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import wanda_dvc as wd

pytestmark = pytest.mark.pipeline
SMALL: dict[str, Any] = {"perplexity": {"length": 64, "windows": 4}, "dtype": "float32"}


@pytest.fixture(scope="module")
def study(tmp_path_factory: Factory, texts: dict[str, str]) -> wd.Study:
    folder = save_tiny_model(tmp_path_factory.mktemp("tiny"), num_hidden_layers=2)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    source = {"source": texts["calibration__text__source"], "split": None}
    measured = {"embedded": {"source": texts["perplexity__texts__embedded__source"], "split": None}}
    settings = SMALL | {"perplexity": SMALL["perplexity"] | {"texts": measured}}
    calibration = {"windows": 3, "length": 64, "text": source}
    return wd.calibrate(
        model, tmp_path_factory.mktemp("made") / "study", tokenizer=tokenizer, calibration=calibration, **settings
    )


def test_a_study_of_a_model_in_memory_gives_masks_a_model_and_figures(study: wd.Study):
    assert study.path.joinpath("dvc.lock").is_file()
    norm = study.statistics(0).inputs["model.layers.0.self_attn.q_proj"].norm
    assert norm.shape == (32,)
    keep = wd.mask(study, recipe="wanda", sparsity=0.5)
    assert {float(one.float().mean()) for one in keep.values()} == {0.5}
    pruned = wd.prune(study).state_dict()
    dense = AutoModelForCausalLM.from_pretrained(study.path / "model").state_dict()
    for name, weight in dense.items():
        mask = keep[linear] if (linear := name.removesuffix(".weight")) in keep else torch.tensor(True)
        assert torch.equal(pruned[name], weight * mask), name
    measured = wd.perplexity(study, "dense"), wd.perplexity(study)
    files = [
        json.loads((study.path / f"metrics/{one}/perplexity/embedded.json").read_text()) for one in ("dense", "pruned")
    ]
    assert list(measured) == [one["perplexity"] for one in files]
    assert measured[0] != measured[1]
    workspace = study.results()[0]
    assert (workspace["sparsity"], workspace["pruned.perplexity.embedded"]) == (0.5, measured[1])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"sparsity": 2}, "sparsity"),
        ({"calibration": {"nope": 1}}, "calibration.nope: no such setting"),
        ({"recipe": "wand"}, "recipe"),
    ],
)
def test_a_wrong_setting_is_named_and_changes_nothing(study: wd.Study, settings: dict[str, Any], says: str):
    before = (study.path / "params.yaml").read_bytes()
    with pytest.raises(wd.UserError, match=says):
        wd.mask(study, **settings)
    assert (study.path / "params.yaml").read_bytes() == before


def test_a_failed_stage_is_an_error_with_its_message(study: wd.Study):
    with pytest.raises(wd.UserError, match="2:3"):
        wd.mask(study, pattern="2:3")
    wd.mask(study, pattern="unstructured")


def test_wrong_arguments_are_errors(study: wd.Study, tmp_path: Path):
    with pytest.raises(wd.UserError, match="tokenizer: missing"):
        wd.calibrate(AutoModelForCausalLM.from_pretrained(study.path / "model"), tmp_path / "new")
    with pytest.raises(wd.UserError, match="model: got Linear"):
        wd.calibrate(torch.nn.Linear(2, 2), tmp_path / "other")  # type: ignore[arg-type]
    with pytest.raises(wd.UserError, match="model: got both"):
        wd.perplexity(study, "both")


def test_importing_the_package_loads_nothing():
    code = "import sys, wanda_dvc; print(sorted({'torch', 'transformers', 'dvc', 'pydantic'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_all_names_are_there_and_no_others():
    for name in wd.__all__:
        assert getattr(wd, name)
    with pytest.raises(AttributeError, match="prunes"):
        _ = wd.prunes
