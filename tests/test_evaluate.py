"""`wanda-dvc evaluate`: other files of a model against a study's dense model."""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from cases.models import config, tensors
from conftest import Factory, fetch, prune, save_tiny_model, tree, write_params
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from gguf_writer import write_gguf

from wanda_dvc.commands.evaluate import evaluate
from wanda_dvc.errors import UserError
from wanda_dvc.results.measures import Results, figures
from wanda_dvc.sources.models import _dequantize
from wanda_dvc.stages import run
from wanda_dvc.study.files import load_json
from wanda_dvc.study.folder import Study
from wanda_dvc.study.scaffold import changed


def make_model(folder: Path, **config: Any) -> Path:
    """A tiny Llama whose matrices GGUF can quantize, and whose tokenizer has a merge, which GGUF requires."""
    save_tiny_model(folder, hidden_size=64, intermediate_size=64, num_hidden_layers=2, **config)
    stored = json.loads((folder / "tokenizer.json").read_text())
    stored["model"]["vocab"]["th"] = 256
    stored["model"]["merges"] = [["t", "h"]]
    for number, token in enumerate(stored["added_tokens"]):
        token["id"] = 257 + number
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    return folder


@pytest.fixture(scope="module")
def measured(tmp_path_factory: Factory, texts: dict[str, str]) -> Study:
    """A study whose stages have run, without DVC."""
    root = tmp_path_factory.mktemp("evaluated") / "study"
    root.mkdir()
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 16}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    model = make_model(root.parent / "model", rope_parameters=rope, hidden_act="gelu")
    # As stored before transformers 5; a GGUF file lacks it.
    config(rope_scaling=rope, rope_theta=1e4, rope_parameters=None)(model)
    write_params(root, model, **texts)
    study = prune(fetch(fetch(Study(root)), "tasks"))
    for stage in ("perplexity", "zero-shot"):
        run(stage, study=study)
    return study


@pytest.fixture
def made(measured: Study, tmp_path: Path) -> Study:
    shutil.copytree(measured.root, tmp_path / "study", symlinks=True)
    return Study(tmp_path / "study")


def evaluated(made: Study, *paths: Path) -> Iterator[Any]:
    """The records of some paths, without the dense model's."""
    dense, *others = json.loads(evaluate(study=made, paths=paths, as_json=True))
    assert (dense["model"], dense["results"]) == ("dense", figures(Results.of(made, "dense")))
    yield from others


def test_a_directory_has_the_stages_figures(made: Study):
    folder = made.model("pruned")
    shutil.copy(made.metrics("dense", "perplexity/embedded"), made.metrics("dense", "perplexity/removed"))
    before = tree(made.root)
    (found,) = evaluated(made, folder)
    left = {path: content for path, content in tree(made.root).items() if not path.startswith(".dvc/")}
    assert left == {path: content for path, content in before.items() if not path.startswith(".dvc/")}
    own = figures(Results.of(made, "pruned"))
    assert found["results"] == {name: value for name, value in own.items() if name != "sparsity"}
    assert found["tests"][0]["measure"] == "perplexity"


def test_the_dense_model_differs_in_nothing_from_itself(made: Study, tmp_path: Path):
    """In the dense model's dtype, whatever dtype its files are said to have."""
    same = shutil.copytree(made.model("dense"), tmp_path / "same")
    config(dtype="bfloat16")(same)
    stopped = mock.patch("wanda_dvc.commands.evaluate.zero_shot", side_effect=KeyboardInterrupt)
    with stopped, pytest.raises(KeyboardInterrupt):
        evaluate(study=made, paths=[same])
    (own,) = evaluated(made, same)
    on_text = {name: own["results"][name]["embedded"]["value"] for name in ("divergence", "top1_agreement")}
    assert on_text == {"divergence": 0, "top1_agreement": 1}
    assert own["results"]["perplexity"] == figures(Results.of(made, "dense"))["perplexity"]
    assert {test["value"] for test in own["tests"]} == {0, 1}


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_0"])
def test_a_gguf_file_is_the_directory_of_its_dequantized_weights(made: Study, tmp_path: Path, kind: str):
    file, folder = tmp_path / "model.gguf", shutil.copytree(made.model("dense"), tmp_path / "same")
    write_gguf(made.model("dense"), file, kind)
    stored = GGMLQuantizationType[kind]

    def rounded(weight: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(dequantize(quantize(weight.numpy(), stored), stored))

    tensors(lambda x: [weight.copy_(rounded(weight)) for weight in x.values() if weight.ndim == 2])(folder)
    own, same = evaluated(made, file, folder)
    assert (own["results"]["divergence"]["embedded"]["value"] > 0) == (kind != "F32")
    assert own["results"] == same["results"]
    with pytest.raises(UserError, match="transformers does not read llama.rope.scaling.factor, a scaling of rotary"):
        _dequantize(file, tmp_path / "packaged")  # as of a package, which has no dense model beside it
    _dequantize(file, tmp_path / "read", scaled=True)
    saved = load_json(tmp_path / "read/tokenizer_config.json")
    assert saved["tokenizer_class"] == "PreTrainedTokenizerFast"  # llama.cpp converts with transformers 4


def test_what_is_no_variant_of_the_model_is_refused_with_the_reason(made: Study, tmp_path: Path):
    def refused(path: Path, match: str) -> None:
        with pytest.raises(UserError, match=match):
            evaluate(study=made, paths=[path])

    refused(tmp_path / "nothing", "nothing: no config.json, expected a Hugging Face model directory")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "empty: no config.json")
    other = make_model(tmp_path / "other", vocab_size=300)
    refused(other, "other: vocabulary size 300, expected 260 as in the dense model; name a variant of it")
    config(model_type="mistral")(third := make_model(tmp_path / "third"))
    refused(third, "third: architecture mistral, expected llama as in the dense model")
    (tmp_path / "a.gguf").write_bytes(b"no GGUF")
    refused(tmp_path / "a.gguf", "a.gguf: .*, expected a GGUF file that transformers reads; name one")
    part = shutil.copytree(made.model("dense"), tmp_path / "part")
    tensors(lambda x: x.update({"model.layers.1.mlp.up_proj.bias": torch.ones(64)}))(part)
    write_gguf(part, file := tmp_path / "c.gguf", "F32")
    refused(file, "c.gguf: transformers does not read 64 of its numbers; name a directory")
    tensors(lambda x: [x.pop(f"model.layers.1.mlp.up_proj.{name}") for name in ("bias", "weight")])(part)
    refused(part, f"^{part}: no tensor for model.layers.1.mlp.up_proj.weight")  # not the copy that the stages read
    shard = tmp_path / "m-00001-of-00002.gguf"  # transformers would draw the weights of the other at random
    write_gguf(part, shard, "F32")
    refused(shard, "00002.gguf: lacks model.layers.1.mlp.up_proj.weight, expected all weights")
    tensors(lambda x: x.pop("model.embed_tokens.weight"))(part)  # as in an importance matrix of llama.cpp
    write_gguf(part, file := tmp_path / "d.gguf", "F32")
    refused(file, "d.gguf: lacks token_embd.weight, expected all weights of a model")


def test_a_study_without_tasks_compares_on_its_texts(made: Study, tmp_path: Path):
    """As that of `prune`."""
    shutil.rmtree(made.data("tasks"))
    made.metrics("dense", "zero_shot").unlink()
    (same,) = evaluated(made, shutil.copytree(made.model("dense"), tmp_path / "same"))
    assert same["results"]["divergence"]["embedded"]["value"] == 0
    assert "acc" not in same["results"]


def test_a_model_that_is_not_finite_has_diverged(made: Study, tmp_path: Path):
    """Its answers are meaningless: a comparison with NaN chooses the first."""
    folder = shutil.copytree(made.model("dense"), tmp_path / "nan")
    tensors(lambda x: x["model.layers.1.mlp.up_proj.weight"][0, 0].fill_(math.nan))(folder)
    (found,) = evaluated(made, folder)
    assert found["results"]["perplexity"]["embedded"] == "diverged"
    assert found["results"]["mean_acc"] == found["results"]["acc"]["piqa"] == "diverged"
    assert found["tests"] == []


def test_without_results_of_these_settings_it_says_what_to_run(made: Study):
    for name in ("perplexity/embedded", "zero_shot"):
        path = made.metrics("dense", name)
        away = path.rename(path.with_suffix(".away"))
        with pytest.raises(UserError, match="metrics/dense: no results of the dense model on all texts and tasks"):
            evaluate(study=made, paths=[made.model("pruned")])
        away.rename(path)
    file = made.root / "params.yaml"
    file.write_text(changed(file.read_text(), {"tasks": {"limit": 3}})[1])
    with pytest.raises(UserError, match=r"plan/zero-shot.json: found limit \S+, expected 3"):
        evaluate(study=Study(made.root), paths=[made.model("pruned")])


def test_a_tokenizer_is_compared_on_the_studys_texts(made: Study, tmp_path: Path):
    other = shutil.copytree(made.model("dense"), tmp_path / "other")
    stored = json.loads((other / "tokenizer.json").read_text())
    goals = {"type": "Replace", "pattern": {"String": "sol1"}, "content": "x"}  # a column of the task's items
    merges = stored["model"] | {"merges": []}
    for what, change in (("text embedded", {"model": merges}), ("task piqa", {"normalizer": goals})):
        (other / "tokenizer.json").write_text(json.dumps(stored | change))
        with pytest.raises(UserError, match=f"other: gives other token ids for the {what}, exp"):
            evaluate(study=made, paths=[other])
