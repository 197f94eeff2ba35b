"""Tied heads as transformers ties them, and activations that are not finite."""

import math
from pathlib import Path

import pytest
import torch
from cases.models import config, tensors
from conftest import Make, Patch, calibrate, fetch, outputs, save_tiny_model
from transformers import AutoModelForCausalLM

from wanda_dvc.engine.decoder import Decoder
from wanda_dvc.engine.divergence import measure
from wanda_dvc.engine.forward import ModelRunner
from wanda_dvc.engine.harness import EngineLM
from wanda_dvc.engine.sequences import TokenSequence
from wanda_dvc.errors import UserError
from wanda_dvc.results.show import show
from wanda_dvc.stages import run
from wanda_dvc.stages.device import own_device
from wanda_dvc.stages.inputs import check_ready
from wanda_dvc.stages.perplexity import perplexity
from wanda_dvc.study.files import load_json

EVERY = ("model", "calibration", "perplexity", "tasks")


def spoiled(folder: Path, **weights: float) -> Path:
    """A tiny model with one weight of some tensors set; double underscores stand for dots."""
    save_tiny_model(folder)
    tensors(lambda x: [x[name.replace("__", ".")].view(-1)[0].fill_(value) for name, value in weights.items()])(folder)
    return folder


# --- tied heads ---


@pytest.mark.parametrize("head", ["none", "the same", "another"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_head_is_tied_where_transformers_ties_it(tied: bool, head: str, tmp_path: Path):
    folder = save_tiny_model(tmp_path / "model")
    config(tie_word_embeddings=tied)(folder)
    if head != "none":
        turned = [0] if head == "another" else []
        tensors(lambda x: x.update({"lm_head.weight": x["model.embed_tokens.weight"].flip(turned).clone()}))(folder)
    if head == "none" and not tied:
        with pytest.raises(UserError, match=r"no tensor for lm_head.weight, which config.json asks for"):
            Decoder(folder, dtype=torch.float32, device=torch.device("cpu"))
        return
    tokens = torch.randint(256, (40,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        stock = AutoModelForCausalLM.from_pretrained(folder)(tokens[None], labels=tokens[None])
    decoder = Decoder(folder, dtype=torch.float32, device=torch.device("cpu"))
    (hidden,) = outputs(decoder, [TokenSequence(tokens)], tmp_path / "work")
    EngineLM(folder, ModelRunner(decoder, tmp_path / "work"), progress=iter)  # lm-eval ties heads too
    with torch.no_grad():
        assert measure(decoder, hidden[None], tokens)[0] == pytest.approx(stock.loss.item(), rel=1e-6)


# --- activations that are not finite ---

FIRST = {  # the weight that is not finite, and what the message names
    "model__layers__2__mlp__gate_proj__weight": "block 2",
    "model__layers__0__self_attn__v_proj__weight": "block 0",
    "model__layers__1__input_layernorm__weight": "block 1",
    "model__norm__weight": "output head",
}
GATED = "model__layers__1__post_attention_layernorm__weight"  # activations are finite, and their squares are not


@pytest.mark.parametrize("weight", [*list(FIRST)[:3], GATED])
def test_calibrate_names_the_block(weight: str, study: Make, tmp_path: Path):
    made = fetch(study(model=spoiled(tmp_path / "source", **{weight: 1e18 if weight == GATED else math.nan})))
    with pytest.raises(UserError) as caught:
        calibrate(study=made)
    assert all(words in str(caught.value) for words in (FIRST.get(weight, "block 1"), "not finite", "set dtype="))
    assert not made.norms.exists()


@pytest.mark.parametrize("weight", FIRST)
def test_both_measures_name_it_and_show_repeats_it(weight: str, study: Make, tmp_path: Path):
    made = fetch(study(model=spoiled(tmp_path / "source", **{weight: math.nan})), *EVERY)
    perplexity(study=made, model="dense", text="embedded")
    named = load_json(made.details("dense", "perplexity/embedded"))["not_finite"]
    assert named == FIRST[weight]
    assert named in show(study=made)
    assert load_json(made.metrics("dense", "perplexity/embedded")) == {"perplexity": "diverged"}
    run("zero-shot", study=made, variant="dense")
    details = load_json(made.details("dense", "zero_shot"))["tasks"]["piqa"]
    assert (details["not_finite"], details["items"]) == (named, [])
    assert load_json(made.metrics("dense", "zero_shot"))["piqa"] == {"acc": "diverged", "acc_norm": "diverged"}
    (row,) = [line for line in show(study=made).splitlines() if line.startswith("| piqa, acc, %")]
    assert "diverged" in row


def test_one_window_that_is_not_finite_is_enough(tmp_path: Path):
    folder = save_tiny_model(tmp_path / "model")
    tensors(lambda x: x["model.embed_tokens.weight"][7].fill_(math.nan))(folder)
    runner = ModelRunner(Decoder(folder, dtype=torch.float32, device=torch.device("cpu")), tmp_path / "work")
    starts = [20, 0, *[30] * 46]  # of windows, of which three are a chunk
    step = next(runner.forward([TokenSequence(torch.arange(start, start + 8)) for start in starts]))
    step.run()
    assert runner.progress.first_not_finite == "block 0"
    with pytest.raises(UserError, match="block 0: activations that are not finite"):
        step.record()


# --- devices, lengths and no tasks ---


@pytest.mark.parametrize("device", ["cuda", "cuda:7", "mps"])
@pytest.mark.parametrize("stage", ["calibrate", "mask", "apply", "perplexity", "zero-shot"])
def test_a_missing_device_is_refused_before_anything_is_read(device: str, stage: str, study: Make, monkeypatch: Patch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    made = study(runtime__device=device)  # without any file to read
    part = "dense" if stage in ("perplexity", "zero-shot") else ""
    with pytest.raises(UserError, match=rf"params.yaml: runtime.device: got {device}, which this machine lacks; set"):
        run(stage, study=made, variant=part)
    assert own_device(study(runtime__device="cpu").params.runtime).type == "cpu"


@pytest.mark.parametrize("stage", ["calibration", "perplexity"])
def test_windows_longer_than_the_models_positions_are_refused(stage: str, study: Make):
    made = fetch(study(**{f"{stage}__length": 513}))
    assert check_ready(made, "dense", 512)
    with pytest.raises(UserError, match=rf"{stage}.length: got 513, expected at most 512, the positions"):
        run("calibrate" if stage == "calibration" else stage, study=made, variant="dense" * (stage == "perplexity"))


def test_a_token_without_an_embedding_is_refused(study: Make, tmp_path: Path):
    """An added token may have none, as long as no text contains it."""
    source = save_tiny_model(tmp_path / "source", vocab_size=257)  # without one for <p>, id 257
    (tmp_path / "good.txt").write_text("abc " * 100)
    (tmp_path / "bad.txt").write_text("abc <p> " * 100)
    made = fetch(study(model=source, calibration__text__source=str(tmp_path / "good.txt")))
    calibrate(study=made)
    made = fetch(study(model=source, calibration__text__source=str(tmp_path / "bad.txt")))
    with pytest.raises(UserError, match=r"the tokenizer gives the id 257, expected at most 256"):
        calibrate(study=made)


def test_no_tasks_means_perplexity_only(study: Make):
    made = fetch(study(tasks__names=[]), *EVERY)
    assert [path.name for path in made.data("tasks").iterdir()] == ["none"]  # DVC warns of empty directories
    perplexity(study=made, model="dense", text="embedded")
    shown = show(study=made)
    assert "Zero-shot" not in shown
    assert " acc" not in shown
