"""What the models write: greedy continuations of prompts, in the stage, the report and on the model card."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_stages import fetch
from transformers import AutoModelForCausalLM, AutoTokenizer

from wanda_dvc.results.show import show
from wanda_dvc.stages.zero_shot import CONTINUED, continuations, read_prompts, zero_shot
from wanda_dvc.study.files import load_json, write_json
from wanda_dvc.study.project import Project
from wanda_dvc.study.scaffold import FILES, PROMPTS

CPU = torch.device("cpu")


def greedy(folder: Path, prompt: str, end: int = 2) -> list[int]:
    """The likeliest tokens, one after another, each by a forward pass over all tokens."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(prompt)["input_ids"]
    start = len(tokens)
    while len(tokens) < start + CONTINUED and (len(tokens) == start or tokens[-1] != end):
        with torch.no_grad():
            tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[start:]


def text_of(folder: Path, tokens: list[int]) -> str:
    return str(AutoTokenizer.from_pretrained(folder).decode(tokens, skip_special_tokens=True))


def written(folder: Path, *prompts: str) -> list[str]:
    return continuations(folder, prompts, dtype=torch.float32, device=CPU)


def test_each_token_is_the_likeliest_one(tiny: Path):
    prompts = ["To sit", "A much longer prompt"]
    assert written(tiny, *prompts) == [text_of(tiny, greedy(tiny, prompt)) for prompt in prompts]


def test_only_the_end_of_a_text_is_taken_from_the_models_settings(tiny: Path, tmp_path: Path):
    folder = shutil.copytree(tiny, tmp_path / "model")
    end = greedy(tiny, "To sit")[5]
    settings = {"eos_token_id": [end, 259], "do_sample": True, "temperature": 5.0, "repetition_penalty": 3.0}
    write_json(folder / "generation_config.json", settings)
    (found,) = written(folder, "To sit")
    assert found == text_of(tiny, greedy(tiny, "To sit", end))


def test_a_prompt_that_leaves_no_positions_is_continued_from_its_last_tokens(tiny: Path):
    assert written(tiny, "b" * 9 + "a" * 472) == written(tiny, "a" * 472)


def test_a_stage_writes_the_same_bytes_again_and_runs_a_model_once(
    project: Callable[..., Project], monkeypatch: pytest.MonkeyPatch
):
    made = fetch(project(tasks__names=[]), "model")
    prompts, place = made.root / PROMPTS, made.details("dense", "continuations")
    prompts.write_text("To sit\r\n\n  The sea \n")
    zero_shot(project=made, model="dense")
    first, content = place.read_bytes(), load_json(place)
    assert [one["prompt"] for one in content["prompts"]] == ["To sit", "The sea"]
    assert content["prompts"][0]["text"] == text_of(made.model("dense"), greedy(made.model("dense"), "To sit"))
    with monkeypatch.context() as kept:
        kept.setattr("wanda_dvc.stages.zero_shot.continuations", lambda *_, **__: 1 / 0)
        zero_shot(project=made, model="dense")
        assert place.read_bytes() == first
    prompts.write_text("The sea\n")
    zero_shot(project=made, model="dense")
    assert load_json(place)["prompts"] == content["prompts"][1:]
    shutil.rmtree(made.answers)
    prompts.write_text("To sit\nThe sea\n")
    zero_shot(project=made, model="dense")
    assert place.read_bytes() == first


def test_without_prompts_of_its_own_a_study_has_those_of_a_new_one(project: Callable[..., Project]):
    expected = FILES[PROMPTS].read_text(encoding="utf-8").splitlines()
    assert read_prompts(project()) == expected
    assert len(expected) == 5


def test_a_model_that_does_not_fit_in_memory_is_skipped_and_said(
    project: Callable[..., Project], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    made = fetch(project(tasks__names=[]), "model")
    with monkeypatch.context() as small:
        small.setattr("wanda_dvc.stages.zero_shot.free_memory", lambda _: 10**8)
        zero_shot(project=made, model="dense")
    skipped = "the model needs 0.1 GB of memory, and 0.1 GB were free"
    assert load_json(made.details("dense", "continuations"))["skipped"] == skipped
    again = "`dvc repro --force --single-item zero-shot-dense` writes them when there is more"
    assert f"zero-shot dense: no continuations: {skipped}; {again}" in capsys.readouterr().err
    assert f"No continuations by the dense model: {skipped}." in show(project=made)
    zero_shot(project=made, model="dense")
    assert load_json(made.details("dense", "continuations"))["prompts"]
